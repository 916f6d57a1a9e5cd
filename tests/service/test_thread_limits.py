"""A system that gives no more threads or processes: the request or the load fails by name, and nothing else does."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("thread", ["exit", "writer", "stop", "request-0", "request-1", "dead", "load", "provenance"])
def test_a_load_without_a_thread_that_it_needs_fails_by_name(start, thread):
    worker = start("--no-thread", thread, wait=False)
    began = time.monotonic()
    assert worker.process.wait(10) == 1 and time.monotonic() - began < 4
    worker.stop()
    (error,) = worker.events("error")
    assert "thread" in error["message"] and error["path"] == "/nowhere/fake.gguf"
    assert not worker.events("ready") and "Traceback" not in "".join(worker.raw_log)


def test_without_a_thread_for_the_log_it_is_written_all_the_same(start):
    worker = start("--no-thread", "log")
    assert worker.execute("say x").all()[-1][0] == "end"
    worker.event("execute_end")
    assert worker.stop()[0] == 0 and worker.events("shutdown")


def test_without_new_threads_all_go_on_streams_among_them(start, tmp_path):
    """A stream needs no thread of its own; the fake's jobs do, so a new one fails, and that alone."""
    limit = tmp_path / "limit"
    worker = start("--no-threads-while", limit)
    streams = [worker.execute("slow", job_id=f"held{n}", max_tokens=100) for n in range(3)]
    for stream in streams:
        assert stream.next()[0] == "started"
    limit.touch()
    statuses = []
    # those threads that there are answer them, one by one
    held = [threading.Thread(target=lambda: statuses.append(worker.json("GET", "/health")[0])) for _ in range(10)]
    for thread in held:
        thread.start()
    for thread in held:
        thread.join()
    assert statuses == [200] * 10
    status, headers, body = worker.request("POST", "/execute", {"job_id": "refused", "prompt": "say x"})
    error = json.loads(body)
    assert status == 503 and error["code"] == "NOT_READY" and "thread" in error["message"] and error["retriable"]
    assert headers["Retry-After"] == "1" and headers["X-Correlation-Id"]
    assert worker.json("POST", "/cancel", {"job_id": "held0"})[0] == 202
    assert streams[0].all()[-1][1]["code"] == "CANCELLED"
    limit.unlink()
    assert worker.json("GET", "/health")[0] == 200
    assert worker.execute("say x", job_id="again").all()[-1][0] == "end"
    for stream in streams[1:]:
        assert stream.all()[-1][0] == "end"
    assert worker.stop()[0] == 0


def test_many_requests_without_a_thread_of_their_own_are_answered_and_leave_no_connection_behind(start, tmp_path):
    """The count of connections bounds how many are accepted: one that leaked would stop the server in the end."""

    def n_open():
        (pid,) = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
        return len(os.listdir(f"/proc/{pid}/fd"))

    limit = tmp_path / "limit"
    worker = start("--no-threads-while", limit, "--max-seqs", 1, "--max-queue", 0)
    stream = worker.execute("quiet", job_id="held")
    assert stream.next()[0] == "started"
    limit.touch()
    before = n_open()
    answered = [worker.request("GET", "/health")[0] for _ in range(100)]
    assert answered == [200] * 100
    end = time.monotonic() + 5
    while n_open() > before:
        assert time.monotonic() < end, "connections are left"
        time.sleep(0.02)
    limit.unlink()
    assert worker.json("GET", "/health")[0] == 200
    code, seconds = worker.stop()
    assert code == 0 and seconds < 3 and stream.all()[-1][0] == "error"


@pytest.mark.parametrize("signal_comes", [False, True])
def test_an_end_needs_no_new_thread(start, tmp_path, signal_comes):
    limit = tmp_path / "limit"
    worker = start("--no-threads-while", limit)
    stream = worker.execute("quiet", job_id="held")
    assert stream.next()[0] == "started"
    sticky = worker.execute("late-sticky", job_id="sticky") if not signal_comes else None
    limit.touch()
    if signal_comes:
        code, seconds = worker.stop()
        assert code == 0 and seconds < 3 and stream.all()[-1][1]["code"] == "NOT_READY"
    else:
        assert sticky.all()[-1][1]["code"] == "CUDA_ERROR" and stream.all()[-1][1]["code"] == "CUDA_ERROR"
        assert worker.process.wait(10) == 70
