"""`worker-orcd serve` with a real model on the CPU: the whole way from a request to its tokens."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from service.client import Worker

pytestmark = pytest.mark.timeout(120)

COMMAND = [sys.executable, "-m", "worker_orcd", "serve", "--device", "cpu", "--port", "0"]
PROMPT = "Once upon a time, there was a little robot who"


@pytest.fixture(scope="module")
def smollm2(model_path):
    return str(model_path("smollm2"))


@pytest.fixture(scope="module")
def worker(smollm2):
    worker = Worker([*COMMAND, "--model", smollm2, "--max-seqs", "8", "--print-curl", "--max-tokens-in", "2000"])
    yield worker
    code, seconds = worker.stop()
    worker.kill()
    assert code == 0 and seconds < 5


def text_of(events):
    assert events[0][0] == "started" and events[-1][0] == "end", events[-1]
    return "".join(data["t"] for name, data in events if name == "token")


def test_health_tells_what_is_served(worker):
    status, health = worker.json("GET", "/health")
    assert status == 200 and health["status"] == "healthy" and health["quant_kind"] == "Q4_1"
    assert health["tokenizer_kind"] == "gguf-bpe" and health["vocab_size"] == 49152 and health["device"] == "cpu"
    assert health["vram_bytes_used"] == 0 and 0 < health["context_length"] <= 8192 and health["sm"] is None


def test_a_long_text_is_tokenized_without_a_pool_of_threads(worker):
    """A call that would start one is not used; the one that is used lets other requests run: see tokenizer.library."""

    def tokens(n):
        status, answer = worker.json("POST", "/tokenize", {"prompt": "the sea " * n, "add_special_tokens": False})
        return len(answer["tokens"]) if status == 200 else answer

    (pid,) = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()[-1:]
    assert tokens(10) in (20, 21)
    before = len(os.listdir(f"/proc/{pid}/task"))
    assert tokens(20_000) in (40_000, 40_001)
    assert len(os.listdir(f"/proc/{pid}/task")) <= before


def test_the_printed_curl_line_works_as_it_is(worker):
    line = worker.raw_out[0].strip()
    assert line.startswith("curl -N http://127.0.0.1:")
    first, second = (
        subprocess.run(["bash", "-c", f"{line} -sS"], capture_output=True, text=True, timeout=60, check=True).stdout
        for _ in range(2)
    )
    events = re.findall(r"^event: (\w+)$", first, re.MULTILINE)
    assert events[0] == "started" and events[-2:] == ["metrics", "end"] and set(events[1:-2]) == {"token"}
    tokens = [re.findall(r'^data: (\{"t":.*)$', run, re.MULTILINE) for run in (first, second)]
    assert tokens[0] == tokens[1] and len(tokens[0]) > 20


def test_the_same_request_in_a_crowd_gives_the_same_text(worker):
    alone = {
        n: text_of(worker.execute(PROMPT, job_id=f"a{n}", max_tokens=16, seed=n, temperature=n % 2).all())
        for n in range(6)
    }
    crowd = {}

    def run(n):
        crowd[n] = text_of(worker.execute(PROMPT, job_id=f"b{n}", max_tokens=16, seed=n, temperature=n % 2).all())

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert crowd == alone and len(set(alone.values())) > 2


def test_health_is_quick_while_the_processor_is_busy(worker):
    streams = [worker.execute(PROMPT, job_id=f"busy{n}", max_tokens=2000, seed=n) for n in range(4)]
    times = []
    for _ in range(40):
        began = time.monotonic()
        assert worker.request("GET", "/health")[0] == 200
        times.append(time.monotonic() - began)
    for stream in streams:
        stream.abort()
    times.sort()
    print(f"/health beside 4 streams: median {1e3 * times[20]:.1f} ms, slowest {1e3 * times[-1]:.1f} ms")
    assert times[20] < 0.030  # 10 ms of an idle machine, and the scheduler's share on a busy one
    for n in range(4):
        worker.event("execute_end", job_id=f"busy{n}")


def test_s6_cancel_in_prefill_decode_and_queue(worker):
    long = " ".join(["word"] * 1900)
    jobs = {f"prefill{n}": worker.execute(long, job_id=f"prefill{n}", max_tokens=100) for n in range(8)}
    jobs["queued"] = worker.execute(PROMPT, job_id="queued", max_tokens=100)
    time.sleep(0.2)
    for job_id, stream in jobs.items():
        assert stream.next()[0] == "started"
        began = time.monotonic()
        assert worker.json("POST", "/cancel", {"job_id": job_id})[1]["state"] == "cancelling"
        assert stream.all()[-1][1]["code"] == "CANCELLED"
        assert time.monotonic() - began < 0.5
    assert text_of(worker.execute(PROMPT, job_id="after", max_tokens=4).all())


def test_s7_jobs_of_clients_that_went_away_leave_room(worker):
    for n in range(3):
        streams = [worker.execute(PROMPT, job_id=f"gone{n}-{m}", max_tokens=2000) for m in range(8)]
        for stream in streams:
            assert stream.next()[0] == "started"
            stream.abort()
    began = time.monotonic()
    assert text_of(worker.execute(PROMPT, job_id="next", max_tokens=4).all())
    assert time.monotonic() - began < 5


def test_a_deadline_ends_a_running_job(worker):
    deadline = str(int(time.time() * 1000) + 700)
    # with this seed the answer has 2000 tokens; others may end before the deadline
    events = worker.execute(PROMPT, job_id="late", max_tokens=2000, seed=1, headers={"X-Deadline": deadline}).all()
    assert events[-1][0] == "error" and events[-1][1]["code"] == "INFERENCE_TIMEOUT" and events[-1][1]["retriable"]


def test_limits_that_the_model_sets(worker):
    status, error = worker.json("POST", "/execute", {"job_id": "x", "prompt": "x", "top_k": 49153})
    assert status == 400 and error["field"] == "top_k"
    status, error = worker.json("POST", "/execute", {"job_id": "x", "prompt": "word " * 2100, "max_tokens": 1})
    assert status == 400 and error["field"] == "prompt"
    status, error = worker.json("POST", "/execute", {"job_id": "x", "prompt": "x", "stop": ["word " * 40]})
    assert status == 400 and error["field"] == "stop"
    events = worker.execute("The capital of France is", job_id="stop", temperature=0, max_tokens=20, stop=["is", "."])
    assert "." not in text_of(events.all())


def test_no_prompt_and_no_text_in_the_log(worker):
    text = text_of(worker.execute("Sesame street is", job_id="log", max_tokens=8, temperature=0).all())
    worker.event("execute_end", job_id="log")
    log = "".join(worker.raw_log)
    assert "Sesame" not in log and text.strip() not in log and "little robot" not in log


def test_bad_model_is_one_error_and_exit_1(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\xff" * 60)
    done = subprocess.run(
        [*COMMAND, "--model", str(bad), "--log-format", "json"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if '"event":"error"' in line]
    assert len(errors) == 1 and "MODEL_LOAD_FAILED" in errors[0] and str(bad) in errors[0]


def test_on_a_terminal_the_log_is_text_and_the_curl_line_is_there(smollm2):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--model", smollm2], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    seen, end = b"", time.monotonic() + 30
    while not (b"curl -N" in seen and b" ready url=" in seen) and time.monotonic() < end:
        seen += os.read(master, 65536)
    process.terminate()
    assert process.wait(10) == 0
    os.close(master)
    assert b"curl -N http://127.0.0.1:" in seen and b" ready url=" in seen and b'{"ts"' not in seen
