"""256 streams at once, as many as a GPU decodes together: each has what its request gets alone."""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
from itertools import accumulate

import pytest
from helpers import tiny_chat

from service.client import JSON, Worker

pytestmark = pytest.mark.timeout(120)

N = 256
EXECUTE, COMPLETIONS = "/execute", "/v1/completions"
TEXT = "the sea a boat of old wood sails and no wind comes from an island where birds sing"


class Stream:
    """A streamed answer, asked for at once and read when somebody wants to."""

    def __init__(self, port, path, body, name):
        self.path = path
        body = {**body, "job_id": name} if path == EXECUTE else {**body, "stream": True}
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.connection.request("POST", path, json.dumps(body).encode(), JSON)

    def read(self):
        """(text, why it ended, tokens, log-probabilities) of the whole answer."""
        response = self.connection.getresponse()
        assert response.status == 200, response.read()
        lines = response.read().decode().splitlines()
        self.connection.close()
        if self.path == COMPLETIONS:
            assert lines[-2:] == ["data: [DONE]", ""]
        data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return execute_answer(lines, data) if self.path == EXECUTE else completions_answer(data)


def execute_answer(lines, data):
    events = [line[7:] for line in lines if line.startswith("event: ")]
    n = len(events) - 3
    assert events == ["started", *["token"] * n, "metrics", "end"], events
    assert [d["i"] for d in data[1:-2]] == list(range(n))
    return "".join(d["t"] for d in data[1:-2]), data[-1]["finish_reason"], data[-1]["tokens_out"], None


def completions_answer(data):
    choices = [chunk["choices"][0] for chunk in data if chunk["choices"]]
    logprobs = [c["logprobs"] for c in choices if c["logprobs"]]
    ids = [token for c in choices for token in c.get("token_ids", ())]
    return "".join(c["text"] for c in choices), choices[-1]["finish_reason"], ids, logprobs


def requests(rng, fewest, most):
    """(route, body) of each, of `fewest` to `most` tokens: greedy and drawn in every way, a few with log-probabilities,
    with a bias."""
    asked = []
    for i in range(N):
        body = {
            "prompt": " ".join(rng.choices(TEXT.split(), k=rng.randint(1, 12))),
            "max_tokens": rng.randint(fewest, most),
        }
        body["temperature"] = rng.choice((0.7, 1.0)) if i % 4 else 0.0
        body["seed"] = rng.randrange(1 << 53)
        if i % 4 == 1:
            body |= {"top_k": rng.choice((5, 40, 400)), "top_p": 0.9}
        elif i % 4 == 2:
            body |= {"top_p": rng.choice((0.5, 0.95)), "min_p": 0.02, "repetition_penalty": 1.1}
        if i % 2:
            body |= {"ignore_eos": True, "return_token_ids": True}
        if i % 32 == 1:
            body["logprobs"] = 3
        elif i % 32 == 3:
            body["logit_bias"] = {"7": -100, "9": 4}
        asked.append((COMPLETIONS if i % 2 else EXECUTE, body))
    return asked


def most_at_once(log):
    """The most jobs that had begun and not ended."""
    return max(accumulate((e["event"] == "execute_start") - (e["event"] == "execute_end") for e in log))


def check(worker, fewest, most):
    rng = random.Random(0)
    asked, began = requests(rng, fewest, most), time.monotonic()
    alone = [Stream(worker.port, *request, f"alone{i}").read() for i, request in enumerate(asked)]
    for i in range(0, N, 5):  # a stop string ends a fifth of them
        at = rng.randrange(max(len(alone[i][0]) - 4, 1))
        if stop := alone[i][0][at : at + 4]:
            asked[i][1]["stop"] = [stop]
            alone[i] = Stream(worker.port, *asked[i], f"stopped{i}").read()
    n_log, middle = len(worker.log), time.monotonic()
    streams = [Stream(worker.port, *request, f"crowd{i}") for i, request in enumerate(asked)]
    crowd = [stream.read() for stream in streams]
    seconds = time.monotonic() - middle
    for i, (got, right) in enumerate(zip(crowd, alone, strict=True)):
        assert got == right, f"stream {i}: {asked[i]}"
    at_once = most_at_once(worker.log[n_log:])
    n_stopped = sum("stop" in body and right[1] == "stop" for (_, body), right in zip(asked, alone, strict=True))
    print(f"alone {middle - began:.1f} s, together {seconds:.1f} s, {at_once} at once, {n_stopped} ended by their stop")
    assert at_once > N // 4 and n_stopped > N // 8
    assert len({right[0] for right in alone}) > N // 2 and sum(bool(right[3]) for right in alone) == N // 32


@pytest.fixture
def start(goldens_dir, tmp_path):
    """A function that starts a worker with as many slots as there are streams, and no queue."""
    workers = []

    def make(device, n_context):
        model = tiny_chat.write(goldens_dir, tmp_path, n_context)
        command = [
            sys.executable,
            "-m",
            "worker_orcd",
            "serve",
            "--device",
            device,
            "--port",
            "0",
            "--model",
            str(model),
        ]
        workers.append(Worker([*command, "--max-streams", str(N), "--max-queue", "0"]))
        return workers[-1]

    yield make
    for worker in workers:
        code, _ = worker.stop()
        worker.kill()
        assert code == 0


def test_256_streams_have_what_each_has_alone(start):
    check(start("cpu", 256), 80, 120)


def test_256_streams_of_a_gpu_have_what_each_has_alone(start, gpu):
    """Longer ones, or the first have ended before the last begin."""
    check(start(f"cuda:{gpu}", 1024), 500, 800)
