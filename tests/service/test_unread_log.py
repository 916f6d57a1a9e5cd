"""A log that nobody reads, or that leads nowhere: the server serves, and ends in time with its code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.client import FAKE_APP, Stream

pytestmark = pytest.mark.timeout(60)


class Unread:
    """A server whose standard error is a pipe that is read up to the line that tells its port, and no further."""

    def __init__(self, *args, **streams):
        command = [sys.executable, str(FAKE_APP), "0", *map(str, args)]
        streams = {"stdout": subprocess.DEVNULL, **streams}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0, start_new_session=True, **streams)
        self.port = self._event("startup")["port"]
        self._event("ready")

    def _event(self, name):
        while (event := json.loads(self.process.stderr.readline()))["event"] != name:
            pass
        return event

    def execute(self, prompt, job_id):
        return Stream(self.port, {"job_id": job_id, "prompt": prompt})


@pytest.fixture
def start():
    servers = []

    def make(*args, **streams):
        servers.append(Unread(*args, **streams))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server.process.stderr.close()


def serve_jobs(server, n):
    for i in range(n):
        assert server.execute("say hello", f"job{i}").all()[-1][0] == "end"


@pytest.mark.parametrize("told", [signal.SIGTERM, None])
def test_jobs_go_on_and_the_end_is_in_time_with_its_code(start, told):
    server = start("--grace", 1)
    serve_jobs(server, 300)
    held = server.execute("quiet", "held")
    assert held.next()[0] == "started"
    began = time.monotonic()
    if told:
        server.process.send_signal(told)
        assert held.all()[-1][1]["code"] == "NOT_READY"
    else:
        assert server.execute("sticky", "sticky").all()[-1][1]["code"] == "CUDA_ERROR"
        assert held.all()[-1][1]["code"] == "CUDA_ERROR"
    assert server.process.wait(10) == (0 if told else 70)
    assert time.monotonic() - began < 3


def test_a_reader_that_comes_back_finds_whole_lines_and_how_many_are_missing(start):
    server = start()
    n_jobs = 700  # their lines fill the pipe, and the queue
    serve_jobs(server, n_jobs)
    lines, dropped = [], 0
    while not dropped:
        lines.append(json.loads(server.process.stderr.readline()))
        if lines[-1]["event"] == "log_lines_dropped":
            dropped = lines[-1]["n"]
            assert lines[-1]["level"] == "warning" and lines[-1]["worker_id"]
    jobs = [e for e in lines if e["event"].startswith("execute_")]
    print(f"{len(jobs)} lines of jobs kept, {dropped} dropped")
    assert len(jobs) + dropped == 2 * n_jobs
    expected = [(f"job{i}", name) for i in range(n_jobs) for name in ("execute_start", "execute_end")]
    assert [(e["job_id"], e["event"]) for e in jobs] == expected[: len(jobs)]
    serve_jobs(server, 1)
    assert json.loads(server.process.stderr.readline())["event"] == "execute_start"
    server.process.send_signal(signal.SIGTERM)
    rest = server.process.stderr.read().decode().splitlines()
    assert server.process.wait(10) == 0 and json.loads(rest[-1])["event"] == "shutdown"


def test_a_standard_output_that_is_full_holds_up_nothing(start):
    """The curl line goes there."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_fd, b"x" * 4096)
    os.set_blocking(write_fd, True)
    server = start("--print-curl", stdout=write_fd)
    os.close(write_fd)
    serve_jobs(server, 3)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0 and time.monotonic() - began < 2
    os.close(read_fd)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed(closed):
    """No socket and no file takes their numbers, or it would get what is printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, str(FAKE_APP), str(port), "--print-curl"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end, status = time.monotonic() + 20, 0
        while status != 200 and time.monotonic() < end:
            time.sleep(0.02)
            try:
                stream = Stream(port, {"job_id": "j", "prompt": "say hello"})
                status = stream.status
            except ConnectionRefusedError:
                pass
        assert status == 200 and stream.all()[-1][0] == "end"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *children):
            for fd in range(3):
                assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        process.terminate()
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
