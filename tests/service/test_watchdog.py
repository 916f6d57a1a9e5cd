"""An engine that hangs in a call, under the real server: streams get their errors, the process leaves with 70."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from service.client import Worker

pytestmark = pytest.mark.timeout(60)

APP = Path(__file__).parent / "hanging_app.py"


@pytest.fixture
def start(goldens_dir):
    workers = []

    def run(*numbers):
        model = goldens_dir / "llama-Q4_0.gguf"
        workers.append(Worker([sys.executable, str(APP), str(model), *map(str, numbers)]))
        return workers[-1]

    yield run
    for worker in workers:
        worker.kill()


def test_an_engine_that_hangs_ends_the_worker(start):
    worker = start(1.0, 10, 0)
    # two run, one waits, one has gone
    streams = [worker.execute("Hello", job_id=f"j{n}", max_tokens=100, seed=n) for n in range(3)]
    began = time.monotonic()
    ends = [stream.all()[-1] for stream in streams]
    assert [name for name, _ in ends] == ["error"] * 3
    for _, error in ends:
        assert error["code"] == "INTERNAL" and "no step for 1 s" in error["message"]
    assert worker.process.wait(10) == 70
    assert 0.5 < time.monotonic() - began < 8
    assert "no step" in worker.event("error", level="error", code="INTERNAL")["message"]
    assert sum(1 for e in worker.events("execute_end") if e["outcome"] == "error") == 3


def test_without_a_watchdog_it_waits_and_can_be_stopped(start):
    worker = start(0, 3, 0)
    stream = worker.execute("Hello", job_id="j", max_tokens=100)
    time.sleep(1.0)
    assert worker.json("GET", "/health")[1]["status"] == "healthy" and worker.process.poll() is None
    code, seconds = worker.stop()
    assert code == 0 and seconds < 5
    assert stream.all()[-1][1]["code"] == "NOT_READY"


def test_a_worker_that_was_suspended_goes_on(start):
    """Three times the limit passes while nothing of it runs."""
    worker = start(1.0, 10**9, 0.02)
    stream = worker.execute("Hello", job_id="j", max_tokens=120, temperature=2.0, seed=2)
    assert stream.next()[0] == "started"
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGSTOP)
    time.sleep(3.0)
    for pid in children:
        os.kill(int(pid), signal.SIGCONT)
    events = stream.all()
    assert events[-1][0] == "end" and events[-1][1]["tokens_out"] > 50, events[-1]
    time.sleep(1.5)
    assert worker.json("GET", "/health")[1]["status"] == "healthy" and not worker.events("error")
    assert worker.stop()[0] == 0
