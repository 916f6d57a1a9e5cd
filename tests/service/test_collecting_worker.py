"""What other clients do while one wants an answer, under a real gunicorn: send a byte each, close slowly, do not read
(wsgi.collecting_worker, connections, gunicorn_worker); and what is answered before the application is asked
(raw_answers)."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from contextlib import ExitStack

import pytest

from service.client import fake_worker

pytestmark = pytest.mark.timeout(60)

EXECUTE = b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CANCEL = EXECUTE.replace(b"/execute", b"/cancel")
HEAD = EXECUTE + b"X-Correlation-Id: mine\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def worker():
    worker = fake_worker("--max-seqs", 4, "--max-queue", 0)  # twelve threads
    yield worker
    code, _ = worker.stop()
    worker.kill()
    assert code == 0


@pytest.fixture
def sockets():
    """A function: worker, how many -> that many connections, closed after the test."""
    with ExitStack() as stack:
        yield lambda worker, n: [
            stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=10)) for _ in range(n)
        ]


def answers_of(sock):
    """Every answer until the other side closes: (status, headers, body)."""
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except TimeoutError:
        raise AssertionError(f"still open after {data[:200]!r}") from None
    answers = []
    while data:
        head, data = data.split(b"\r\n\r\n", 1)
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", 0))
        answers.append((int(status.split()[1]), headers, data[:length]))
        data = data[length:]
    return answers


def refused(sock, status, correlation=None):
    """The one JSON error that the connection ends with."""
    ((got, headers, body),) = answers_of(sock)
    assert got == status and headers["content-type"] == "application/json", (got, headers, body)
    assert headers["connection"] == "close"
    assert len(headers["x-correlation-id"]) == 32 if correlation is None else headers["x-correlation-id"] == correlation
    error = json.loads(body)
    assert error["code"] and error["message"].isprintable()
    return error


def health_times(worker, n=20):
    times = []
    for _ in range(n):
        began = time.monotonic()
        assert worker.request("GET", "/health")[0] == 200
        times.append(time.monotonic() - began)
    times.sort()
    print(f"/health: median {1e3 * times[n // 2]:.1f} ms, slowest {1e3 * times[-1]:.1f} ms (limits 50, 500)")
    assert times[n // 2] < 0.05 and times[-1] < 0.5
    return times


# -- crowds


def test_s4_two_hundred_clients_that_send_a_byte_each_hold_up_nobody(worker, sockets):
    slow = sockets(worker, 200)
    for i, sock in enumerate(slow):
        sock.sendall((b"G", HEAD, HEAD + b"Content-Length: 99\r\n\r\n{", CHUNKED + b"5\r\n{")[i % 4])
    for step in range(4):
        health_times(worker, 5)
        for sock in slow:
            sock.sendall(b"ETX{"[step : step + 1])
    assert worker.execute("say x", job_id="beside").all()[-1][0] == "end"


def test_two_hundred_clients_that_do_not_close_hold_up_nobody(worker, sockets):
    asked = sockets(worker, 200)
    for sock in asked:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    for sock in asked:
        assert b" 200 " in sock.recv(65536)[:20]
    health_times(worker)


def test_health_answers_while_every_stream_is_taken_and_others_crowd(worker, sockets):
    streams = [worker.execute("slow", job_id=f"taken{n}") for n in range(4)]
    assert [stream.next()[0] for stream in streams] == ["started"] * 4
    for sock in sockets(worker, 100):
        sock.sendall(b"P")
    health_times(worker)
    assert worker.execute("say x", job_id="more").status == 429
    for n, stream in enumerate(streams):
        assert worker.json("POST", "/cancel", {"job_id": f"taken{n}"})[0] == 202
        assert stream.all()[-1][1]["code"] == "CANCELLED"


def test_clients_that_do_not_read_their_answers_take_no_thread_of_others(start, sockets):
    """Nine threads, sixteen connections with eighty requests each and nobody who reads an answer."""
    worker = start("--max-seqs", 1, "--max-queue", 0, "--send-buffer", 4096)
    deaf = sockets(worker, 16)
    for sock in deaf:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.sendall(GET * 80)
    time.sleep(1)
    health_times(worker)
    deaf[0].settimeout(10)
    data = b""
    while data.count(b"HTTP/1.1 200 OK") < 20:
        data += deaf[0].recv(65536)


def test_streams_that_nobody_reads_count_after_their_jobs_have_ended(worker, sockets):
    """The fake's jobs end at once and leave 8 MB to send; their clients take no more threads than streams may."""
    deaf = sockets(worker, 16)
    for n, sock in enumerate(deaf):
        body = json.dumps({"job_id": f"deaf{n}", "prompt": "flood"}).encode()
        sock.sendall(EXECUTE + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    statuses = [int(sock.recv(20).split()[1]) for sock in deaf]
    assert sorted(set(statuses)) == [200, 429] and statuses.count(200) <= 4
    health_times(worker)
    for sock in deaf:
        sock.close()
    end = time.monotonic() + 5
    while worker.execute("say x", job_id="after").status != 200:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_arrives_at_once_has_a_bound_and_small_requests_pass(start, sockets):
    worker = start("--max-received-bytes", 100_000)
    first, second, third = sockets(worker, 3)
    for sock in (first, second):
        sock.sendall(HEAD + b"Content-Length: 900000\r\n\r\n" + b" " * 60_000)
    time.sleep(0.3)
    third.sendall(HEAD + b"Content-Length: 900000\r\n\r\n" + b" " * 60_000)
    assert refused(third, 503, "mine")["code"] == "NOT_READY"
    assert worker.event("refused", status=503)["correlation_id"] == "mine"
    assert worker.execute("say x").all()[-1][0] == "end"
    for sock in (first, second):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends without a word
        sock.close()
    time.sleep(0.3)
    status, body = worker.json("POST", "/execute", b" " * 100_000 + b"{}")
    assert status == 400 and body["field"] == "job_id", "what was given up was not given back"


# -- how requests come


def test_requests_that_come_together_or_in_pieces_are_answered_one_by_one(worker, sockets):
    body = b'{"job_id":"nobody"}'
    post = CANCEL + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    chunks = CANCEL + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nX-T: 1\r\n\r\n" % (
        len(body),
        body,
    )
    last = b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    data = GET + post + chunks + GET + post + last
    together, pieces = sockets(worker, 2)
    together.sendall(data)
    pieces.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for i in range(0, len(data), 3):
        pieces.sendall(data[i : i + 3])
    for sock in (together, pieces):
        assert [status for status, _, _ in answers_of(sock)] == [200, 202, 202, 200, 202, 200]


def test_thousands_of_probes_in_one_go_are_each_answered_and_hold_up_nobody(worker, sockets):
    """The main loop answers a few in each of its turns."""
    (sock,) = sockets(worker, 1)
    last = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    sender = threading.Thread(target=sock.sendall, args=(GET * 2000 + last,))
    sender.start()
    answered = []
    reader = threading.Thread(target=lambda: answered.extend(answers_of(sock)))
    reader.start()
    health_times(worker)
    assert worker.execute("say x", job_id="among probes").all()[-1][0] == "end"
    for thread in (sender, reader):
        thread.join(30)
    assert [status for status, _, _ in answered] == [200] * 2001


def test_100_is_said_once_and_only_for_what_will_be_taken(worker, sockets):
    body = b'{"job_id":"nobody"}'
    expect = CANCEL + b"Connection: close\r\nExpect: 100-continue\r\n"
    waits, at_once, chunked, too_large, odd = sockets(worker, 5)
    waits.sendall(expect + b"Content-Length: %d\r\n\r\n" % len(body))
    assert waits.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    waits.sendall(body)
    assert [status for status, _, _ in answers_of(waits)] == [202]
    at_once.sendall(expect + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    assert [status for status, _, _ in answers_of(at_once)] == [202]
    chunked.sendall(expect + b"Transfer-Encoding: chunked\r\n\r\n")
    assert chunked.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    chunked.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert [status for status, _, _ in answers_of(chunked)] == [202]
    too_large.sendall(expect + b"Content-Length: 2000000\r\n\r\n")
    refused_body = answers_of(too_large)
    assert [status for status, _, _ in refused_body] == [413]
    odd.sendall(expect.replace(b"100-continue", b"a miracle") + b"Content-Length: 5\r\n\r\n")
    refused(odd, 417)


def test_a_request_that_comes_too_slowly_is_408(start, sockets):
    worker = start("--read-limit-sec", 0.5)
    beginnings = (b"P", HEAD, HEAD + b"Content-Length: 99\r\n\r\n{", CHUNKED + b"5\r\n{")
    slow = sockets(worker, 4)
    began = time.monotonic()
    for sock, data in zip(slow, beginnings, strict=True):
        sock.sendall(data)
    for sock, data in zip(slow, beginnings, strict=True):
        error = refused(sock, 408, "mine" if b"mine" in data else None)
        assert "0.5 s" in error["message"]
        worker.event("refused", status=408, peer=f"127.0.0.1:{sock.getsockname()[1]}")
    assert 0.4 < time.monotonic() - began < 3


# -- answers before the application


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET /\x01 HTTP/1.1\r\n\r\n", 400),
        (b"get /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\nHost: x\n\n", 400),
        (b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /" + b"a" * 9000, 414),
        (GET[:-2] + b"X: " + b"y" * 9000 + b"\r\n\r\n", 431),
        (GET[:-2] + b"X: y\r\n" * 100 + b"\r\n", 431),
        (GET[:-2] + b"X: %s\r\n" % (b"y" * 8000) * 10, 431),
        (GET[:-2] + b"bad header\r\n\r\n", 400),
        (GET[:-2] + b"X Y: z\r\n\r\n", 400),
        (GET[:-2] + b"X: a\x00b\r\n\r\n", 400),
        (GET[:-2] + b"X: a\r\n b\r\n\r\n", 400),
        (GET[:-2] + b"Host: y\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: nonsense, chunked\r\n\r\n", 501),
        (HEAD + b"Expect: nonsense\r\n\r\n", 417),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"\r\n\x00", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\n", 400),
    ],
    ids=range(24),
)
def test_s4_what_the_server_itself_refuses_is_json_with_a_correlation_id_and_logged(worker, sockets, data, status):
    n_lines = len(worker.raw_log)
    (sock,) = sockets(worker, 1)
    sock.sendall(data)
    error = refused(sock, status, "mine" if b"mine" in data else None)
    assert error["code"] == "INVALID_REQUEST" and error["retriable"] is False
    at = f"127.0.0.1:{sock.getsockname()[1]}"
    line = worker.event("refused", peer=at, status=status, message=error["message"])
    assert len(line["correlation_id"]) == (4 if b"mine" in data else 32)
    new = "".join(worker.raw_log[n_lines:])
    assert "GARBAGE" not in new + error["message"] and "nonsense" not in new + error["message"]
    assert "yyyy" not in new and not [e for e in worker.log if e["event"] == "server"]


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n{}\r\n0\r\n\r\n",
        b"\r\n",
        b"-1\r\n{}\r\n",
        b"0x2\r\n{}\r\n0\r\n\r\n",
        b"1\r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}0\r\n\r\n",
        b"2;=\r\n{}\r\n0\r\n\r\n",
        b'2;a="\r\n{}\r\n0\r\n\r\n',
        b"2\r\n{}\r\n0\r\nbad trailer\r\n\r\n",
        b"2\r\n{}\r\n0\r\nHost: x\r\n\r\n",
        b"2\n{}\n0\n\n",
        b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 100 + b"\r\n",
    ],
    ids=range(12),
)
@pytest.mark.parametrize("path", [b"/execute", b"/cancel"])
def test_s4_malformed_chunks_are_400_and_no_fault_of_ours(worker, sockets, chunks, path):
    n_errors = len(worker.events("error"))
    (sock,) = sockets(worker, 1)
    sock.sendall(CHUNKED.replace(b"/execute", path) + chunks)
    error = refused(sock, 400, "mine")
    assert error["code"] == "INVALID_REQUEST" and "could not be read" in error["message"]
    assert len(worker.events("error")) == n_errors


def test_malformed_chunks_that_nobody_reads_end_the_connection_without_a_second_answer(worker, sockets):
    first, second = sockets(worker, 2)
    request = GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    first.sendall(request + b"zz\r\n" + GET)
    second.sendall(request + b"2;=\r\n{}\r\n0\r\n\r\n" + GET)  # well framed, and malformed
    for sock in (first, second):
        assert [status for status, _, _ in answers_of(sock)] == [200]


def test_head_over_the_wire_has_no_body_and_keeps_the_connection(worker, sockets):
    (sock,) = sockets(worker, 1)
    sock.sendall(GET.replace(b"GET", b"HEAD") * 2 + b"HEAD /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    data = b""
    while piece := sock.recv(65536):
        data += piece
    heads = data.split(b"\r\n\r\n")
    assert len(heads) == 4 and not heads[3] and all(h.startswith(b"HTTP/1.1 200 OK") for h in heads[:3])
    assert all(b"content-length: " in h.lower() for h in heads[:3])
