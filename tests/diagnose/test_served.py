"""The bench's client: what it counts however its bytes are cut, what it says of a stream that fails, and its worker."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

import pytest

from worker_orcd.diagnose import served
from worker_orcd.diagnose.served import StreamTimes, Worker, read_streams
from worker_orcd.errors import InternalError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STARTED = b'event: started\ndata: {"job_id":"x"}\n\n'
# a text that looks like an event's name does not count
TOKENS = [b'event: token\ndata: {"t":"event: token","i":%d}\n\n' % i for i in range(5)]
END = b'event: metrics\ndata: {}\n\nevent: end\ndata: {"tokens_out":6,"finish_reason":"length"}\n\n'


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.fixture
def serve():
    """Start a server that sends each connection the pieces of one answer, `pause` seconds apart, and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked = []

    def answer(connection, pieces, pause):
        with connection, contextlib.suppress(OSError):  # the client has seen enough
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            asked.append(data)
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)

    def run(answers, pause):
        for pieces in answers:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection, pieces, pause), daemon=True).start()

    def start(*answers, pause=0.0):
        threading.Thread(target=run, args=(answers, pause), daemon=True).start()
        return listener.getsockname()[1]

    start.asked = asked
    yield start
    listener.close()


@pytest.mark.parametrize("size", [1, 7, 13, 4096])
def test_events_are_counted_however_the_bytes_are_cut(serve, size):
    answer = HEAD + chunk(STARTED) + b"".join(map(chunk, TOKENS)) + chunk(END)
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    (times,) = read_streams(serve(pieces), [{"job_id": "x", "prompt": "p"}])
    assert len(times.arrivals) == 5 and times.tokens_out == 6
    assert times.began <= times.arrivals[0] <= times.arrivals[-1] <= times.ended
    assert serve.asked[0].startswith(b"POST /execute HTTP/1.1\r\nHost: 127.0.0.1:")
    assert serve.asked[0].endswith(b'{"job_id": "x", "prompt": "p"}')


def test_streams_of_completions_are_counted_too(serve):
    said = [b'data: {"choices":[{"text":"\\"finish_reason\\":null","finish_reason":null}]}\n\n'] * 3
    end = b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
    port = serve([HEAD + b"".join(map(chunk, said)) + chunk(end)])
    (times,) = read_streams(port, [{"prompt": [1, 2]}], served.COMPLETIONS)
    assert len(times.arrivals) == 3 and times.ended >= times.arrivals[-1]
    assert serve.asked[0].startswith(b"POST /v1/completions HTTP/1.1\r\n")
    with pytest.raises(InternalError, match=r"a stream failed.*no such"):
        read_streams(serve([HEAD, chunk(b'data: {"error":{"message":"no such"}}\n\n')]), [{}], served.COMPLETIONS)


def test_times_are_those_of_the_arrivals(serve):
    pieces = [HEAD + chunk(STARTED + TOKENS[0]), chunk(TOKENS[1] + TOKENS[2]), chunk(TOKENS[3]), chunk(END)]
    many = read_streams(serve(*[pieces] * 20, pause=0.05), [{"prompt": str(n)} for n in range(20)])
    for times in many:
        gaps = times.gaps
        assert len(times.arrivals) == 4 and gaps[1] == 0.0
        assert gaps[0] >= 0.03 and gaps[2] >= 0.03 and times.first_token < 2
        assert times.per_token == pytest.approx(sum(gaps) / 3)


def test_a_stream_of_one_token_has_no_time_per_token():
    assert StreamTimes(0.0, [1.0]).per_token is None and StreamTimes(0.0, [1.0]).first_token == 1.0
    assert StreamTimes(0.0).per_token is None and StreamTimes(0.0).gaps == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'HTTP/1.1 429 Too Many Requests\r\n\r\n{"code":"QUEUE_FULL"}', "refuses a stream.*429.*QUEUE_FULL"),
        (HEAD + chunk(STARTED + b'event: error\ndata: {"code":"CUDA_ERROR"}\n\n'), "a stream failed.*CUDA_ERROR"),
        (HEAD + chunk(STARTED + TOKENS[0]), "was cut"),
        (b"", "was cut"),
    ],
)
def test_a_stream_that_fails_is_an_error(serve, answer, said):
    with pytest.raises(InternalError, match=said):
        read_streams(serve([answer[:9], answer[9:]]), [{"prompt": "p"}])


def test_a_server_that_says_nothing_is_an_error(serve, monkeypatch):
    monkeypatch.setattr(served, "SILENCE_SEC", 0.2)
    with pytest.raises(InternalError, match="1 streams were silent"):
        read_streams(serve([HEAD, chunk(STARTED)], pause=1.0), [{"prompt": "p"}])


def test_a_worker_that_cannot_serve_says_why(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(InternalError, match=r"the worker cannot serve: .*bad\.gguf"):
        Worker(["--model", str(bad), "--device", "cpu"])


def test_no_line_of_the_log_is_lost_while_it_is_read(monkeypatch):
    program = """
import json, sys, time
for n in range(3000):
    print(json.dumps({"event": "startup" if n == 0 else f"e{n}", "port": 7}), file=sys.stderr, flush=True)
print(json.dumps({"event": "ready"}), file=sys.stderr, flush=True)
time.sleep(60)
"""
    start = served.subprocess.Popen
    monkeypatch.setattr(
        served.subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", program], **how)
    )
    monkeypatch.setattr(served, "_LOOK_SEC", 0)
    with Worker([]) as worker:
        assert worker.port == 7
        assert [event["event"] for event in worker._events()] == [
            "startup",
            *(f"e{n}" for n in range(1, 3000)),
            "ready",
        ]


def test_flags_of_the_environment_do_not_reach_the_worker(goldens_dir, monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_API_KEY", "secret")
    monkeypatch.setenv("WORKER_ORCD_MAX_TOKENS_OUT", "1")
    with Worker(["--model", str(goldens_dir / "llama-Q4_0.gguf"), "--device", "cpu"]) as worker:
        body = {"job_id": "x", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        (times,) = read_streams(worker.port, [body])
        assert 1 <= times.tokens_out <= 8
    worker.close()
    assert worker._process.returncode == 0
