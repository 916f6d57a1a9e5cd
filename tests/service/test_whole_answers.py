"""Answers that are known to their end: they leave in one piece, and no thread waits for their clients
(wsgi.connections, collecting_worker, gunicorn_worker)."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from service.client import fake_worker
from worker_orcd.wsgi import collecting_worker, gunicorn_worker
from worker_orcd.wsgi.collecting_worker import RESTING
from worker_orcd.wsgi.connections import Budget, Connection, Deadlines
from worker_orcd.wsgi.gunicorn_worker import StreamWorker

pytestmark = pytest.mark.timeout(60)

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
DOCUMENT = GET.replace(b" / ", b" /openapi.json ")


def bare_worker(body, fails=False, is_long=False):
    """A `StreamWorker` outside of gunicorn, whose application answers with the chunks `body`."""

    def application(environ, start_response):
        start_response("200 OK", [("Content-Length", str(sum(map(len, body))))])
        yield from body
        if fails:
            raise ZeroDivisionError

    worker = object.__new__(StreamWorker)
    worker.wsgi, worker.cfg, worker.alive = application, Config(), True
    worker.told = lambda error, head, address: error.code.encode()
    worker._thread, worker._budget, worker._rests_lock = threading.local(), Budget(1 << 20), threading.Lock()
    worker._n_rests = worker._rest_bytes = 0
    worker._pool = SimpleNamespace(is_long=is_long)
    return worker


def asked(worker, ours, request=GET):
    """The connection of a request that has arrived whole."""
    conn = Connection(worker.cfg, ours, ("127.0.0.1", 1), ("127.0.0.1", 2))
    conn.buffer.feed(request)
    conn.reader.give(conn.buffer)
    return conn


@pytest.fixture
def pair():
    """Two sockets that keep the bounds of what is sent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


def test_head_and_body_leave_together(pair):
    """Or a process that ends between them would leave a status without its reason."""
    ours, theirs = pair
    worker = bare_worker([b"all ", b"of it"])
    assert worker.handle(asked(worker, ours)) is True
    data = theirs.recv(1 << 16)
    assert data.startswith(b"HTTP/1.1 200 OK\r\n") and data.endswith(b"\r\n\r\nall of it")


def test_an_answer_that_fails_half_way_is_replaced_by_its_error(pair):
    ours, theirs = pair
    worker = bare_worker([b"half"], fails=True)
    assert worker.handle(asked(worker, ours)) is False
    assert theirs.recv(1 << 16) == b"INTERNAL"


BODY = b"x" * 900_000


@pytest.fixture
def streams():
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


def test_a_rest_waits_in_the_main_loop(streams):
    ours, _ = streams
    worker = bare_worker([BODY])
    conn = asked(worker, ours)
    assert worker.handle(conn) is RESTING and conn.rest.keep and worker._n_rests == 1
    assert 0 < len(conn.rest.data) < len(BODY) and worker._rest_bytes == len(conn.rest.data)
    worker._forget_rest(conn)
    assert worker._n_rests == worker._rest_bytes == 0


@pytest.mark.parametrize(("is_long", "reads"), [(True, True), (True, False), (False, False)])
def test_where_too_much_waits_only_a_long_call_waits_for_its_client(monkeypatch, streams, is_long, reads):
    monkeypatch.setattr(collecting_worker, "MAX_REST_BYTES", 1000)
    monkeypatch.setattr(gunicorn_worker, "LONG_WRITE_SEC", 5.0 if reads else 0.2)
    ours, theirs = streams
    worker, results = bare_worker([BODY], is_long=is_long), []
    conn = asked(worker, ours)
    thread = threading.Thread(target=lambda: results.append(worker.handle(conn)))
    thread.start()
    data = b""
    while reads and not data.endswith(b"\r\n\r\n" + BODY):
        data += theirs.recv(1 << 20)
    thread.join(5)
    assert results == [reads] and conn.rest is None and worker._n_rests == 0


@pytest.mark.parametrize("then", ["_served", "_close"])
def test_f1_a_connection_that_the_system_does_not_watch_ends_alone(then):
    """And not the main loop, which calls this."""

    class Full:
        def register(self, *args):
            raise OSError(28, "No space left on device")

    worker = bare_worker([b"x"])
    worker.poller, worker.nr_conns, worker.log = Full(), 2, logging.getLogger("test")
    worker._idle, worker._closing = Deadlines(5), Deadlines(1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        conn = asked(worker, ours)
        assert worker.handle(conn) is True
        worker._served(conn, True) if then == "_served" else worker._close(conn)
        assert worker.nr_conns == 1 and ours.fileno() == -1 and conn.waits is None
        assert theirs.recv(1 << 16).endswith(b"x") and theirs.recv(1) == b""


# -- under gunicorn


@pytest.fixture(scope="module")
def worker():
    worker = fake_worker("--max-seqs", 2, "--max-queue", 0, "--send-buffer", 1 << 12)
    yield worker
    code, _ = worker.stop()
    worker.kill()
    assert code == 0


def deaf(worker, request=DOCUMENT):
    """A client that has asked, and takes little."""
    sock = socket.socket()
    sock.settimeout(20)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    sock.connect(("127.0.0.1", worker.port))
    sock.sendall(request)
    return sock


def all_of(sock):
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    return data


@pytest.mark.timeout(90)
def test_s7_clients_that_do_not_read_hold_up_nobody_and_may_read_later(worker):
    expected = worker.json("GET", "/openapi.json")[1]
    last = DOCUMENT.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with ExitStack() as stack:
        clients = [stack.enter_context(deaf(worker, last if n % 3 else DOCUMENT + last)) for n in range(60)]
        clients[1].shutdown(socket.SHUT_WR)  # it has said all
        for _ in range(5):
            began = time.monotonic()
            assert worker.request("GET", "/health")[0] == 200
            assert time.monotonic() - began < 2
        for n, sock in enumerate(clients):
            answers = all_of(sock).split(b"HTTP/1.1 200 OK\r\n")[1:]
            assert [json.loads(a.split(b"\r\n\r\n", 1)[1]) for a in answers] == [expected] * (1 if n % 3 else 2)


def test_s7_a_client_that_leaves_before_it_has_all_is_forgotten(worker):
    for n in range(10):
        sock = deaf(worker)
        assert sock.recv(100)
        if n % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        sock.close()
    assert worker.execute("say hi", job_id="after").all()[-1][0] == "end"
    assert not worker.events("server")


def test_a_rest_that_is_under_way_when_the_server_stops_arrives():
    worker = fake_worker("--max-seqs", 2, "--send-buffer", 1 << 12)
    expected = worker.json("GET", "/openapi.json")[1]
    with deaf(worker) as sock:
        head = sock.recv(100)
        reader: list[bytes] = []
        thread = threading.Thread(target=lambda: reader.append(all_of(sock)))
        stopper = threading.Thread(target=worker.stop)
        stopper.start()
        thread.start()
        thread.join(10)
        stopper.join(10)
    assert json.loads((head + reader[0]).split(b"\r\n\r\n", 1)[1]) == expected
    worker.kill()
