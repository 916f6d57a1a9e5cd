"""The master process: one worker, never a second one; it ends with it, and ends it in time whatever it does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from worker_orcd.wsgi.arbiter import WorkerArbiter

pytestmark = pytest.mark.timeout(60)


def worker_pid(worker):
    (pid,) = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    return int(pid)


def test_a_worker_process_that_cannot_be_forked_is_one_error_and_exit_1(start):
    worker = start("--no-fork", wait=False)
    assert worker.process.wait(10) == 1
    worker.stop()
    (error,) = worker.events("error")
    assert "process" in error["message"] and "Resource temporarily unavailable" in error["message"]
    assert "Traceback" not in "".join(worker.raw_log)


def test_a_worker_that_hangs_is_killed_when_its_time_is_over(start):
    worker = start("--grace", 0.5)
    os.kill(worker_pid(worker), signal.SIGSTOP)
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(10) == 0 and 1 < time.monotonic() - began < 3


def test_a_worker_that_is_told_alone_takes_the_server_with_it_in_order(start):
    worker = start("--grace", 0.5)
    stream = worker.execute("quiet")
    assert stream.next()[0] == "started"
    os.kill(worker_pid(worker), signal.SIGTERM)
    assert stream.all()[-1][1]["code"] == "NOT_READY"
    assert worker.process.wait(10) == 0, "".join(worker.raw_log)


def test_signals_for_more_workers_or_another_master_change_nothing(start):
    worker = start()
    before = worker_pid(worker)
    for number in (signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH, signal.SIGUSR1):
        os.killpg(worker.process.pid, number)
        time.sleep(0.1)
    assert worker.json("GET", "/health")[0] == 200 and worker_pid(worker) == before
    assert worker.stop()[0] == 0


def test_no_exit_code_of_gunicorns_own():
    """Who watches the server knows 0, 1 and 70."""
    assert WorkerArbiter.WORKER_BOOT_ERROR == WorkerArbiter.APP_LOAD_ERROR == 1
