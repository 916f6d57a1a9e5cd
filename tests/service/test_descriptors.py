"""Few file descriptors and many connections: no spinning, and /health answers (wsgi.descriptors, collecting_worker)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from service.client import FAKE_APP, Worker
from worker_orcd.wsgi.descriptors import MAX_CONNECTIONS, SPARE, connections_within, streams_within

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("limit", "n"),
    [(10, 8), (64, 32), (256, 192), (1024, 896), (4096, 3968), (MAX_CONNECTIONS + SPARE, 4096), (1 << 20, 4096)],
)
def test_connections_leave_descriptors_for_the_rest(limit, n):
    assert connections_within(limit) == n


@pytest.mark.parametrize(
    ("n", "wanted", "streams"), [(32, 96, 24), (4096, 96, 96), (8, 96, 4), (8, 1, 1), (32, 24, 24)]
)
def test_streams_leave_connections_for_the_rest(n, wanted, streams):
    assert streams_within(n, wanted) == streams


def limited_worker(*args):
    """A fake worker with at most 64 open files."""
    command = [sys.executable, str(FAKE_APP), "0", "--max-queue", "0", *map(str, args)]
    return Worker(["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command])


def cpu_seconds(worker):
    """What the worker process has computed so far."""
    children = subprocess.run(["pgrep", "-P", str(worker.process.pid)], capture_output=True, text=True, check=True)
    with open(f"/proc/{children.stdout.split()[0]}/stat") as stat:
        user, system = stat.read().rsplit(") ", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("hold", [0, 40], ids=["by number", "none left"])
def test_400_connections_on_64_descriptors(hold):
    """Of which a third sends nothing, a third the first byte of a head, and a third that of a body."""
    beginnings = (b"", b"P", b"POST /execute HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
    worker = limited_worker("--max-seqs", 2, "--hold-files", hold)
    with ExitStack() as stack:
        stack.callback(worker.kill)
        stream = worker.execute("slow", job_id="before")
        assert stream.next()[0] == "started"
        for n in range(400):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=10))
            try:
                sock.sendall(beginnings[n % 3])
            except OSError:
                pass  # it has made room for another
        began = time.monotonic()
        assert worker.request("GET", "/health")[0] == 200
        first = time.monotonic() - began
        time.sleep(0.3)
        before = cpu_seconds(worker)
        time.sleep(1.0)
        used = cpu_seconds(worker) - before
        print(f"/health after {1e3 * first:.0f} ms (limit 2000); the worker takes {used:.2f} of a core (limit 0.15)")
        assert first < 2 and used < 0.15
        while (event := stream.next())[1].get("i", 0) < 60:
            assert event[0] == "token", "a stream was ended for the crowd"
        assert worker.json("POST", "/cancel", {"job_id": "before"})[0] == 202
    if hold:
        complaints = [e for e in worker.events("server") if "descriptor" in e["message"]]
        assert len(complaints) == 1, "it is told once, not for each connection"


def test_who_has_just_come_is_not_ended_for_those_who_send_slowly():
    """A client whose request is on its way, among others that hold a connection each with half a head, and new ones."""
    worker = limited_worker()
    with ExitStack() as stack:
        stack.callback(worker.kill)

        def connect(data):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=10))
            sock.sendall(data)
            return sock

        for _ in range(40):
            connect(b"P")
        mine = connect(b"")
        for _ in range(20):
            connect(b"P")
        assert worker.request("GET", "/health")[0] == 200
        mine.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in mine.recv(65536)[:20]


def test_as_many_streams_as_connections_bear_leave_health_reachable():
    """Forty are wanted, twenty-four fit; the rest is told so, and /health answers among 400 that do nothing."""
    worker = limited_worker("--max-seqs", 40)
    with ExitStack() as stack:
        stack.callback(worker.kill)
        told = worker.event("server")
        assert told["level"] == "warning"
        assert told["message"] == "at most 24 streams at once, as at most 64 files may be open"
        streams = [worker.execute("quiet", job_id=f"held{n}") for n in range(40)]
        assert [stream.status for stream in streams] == [200] * 24 + [429] * 16
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=10))
        assert worker.request("GET", "/health")[0] == 200


def test_accepting_pauses_where_no_descriptor_is_left_and_goes_on_when_one_is():
    worker = limited_worker("--max-seqs", 40, "--hold-files", 40)
    request = b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    with ExitStack() as stack:
        stack.callback(worker.kill)
        served = []
        for n in range(24):
            body = json.dumps({"job_id": f"held{n}", "prompt": "quiet"}).encode()
            waiting = stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=0.5))
            waiting.sendall(request % (len(body), body))
            try:
                assert b" 200 " in waiting.recv(65536)[:20]
            except TimeoutError:
                break
            served.append(waiting)
        else:
            raise AssertionError("descriptors were left")
        before = cpu_seconds(worker)
        time.sleep(0.7)
        assert cpu_seconds(worker) - before < 0.1, "it tries again and again"
        served[0].close()
        waiting.settimeout(5)
        assert b" 200 " in waiting.recv(65536)[:20]
        assert len([e for e in worker.events("server") if "descriptor" in e["message"]]) == 1
