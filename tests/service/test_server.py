"""A real gunicorn (wsgi.gunicorn_worker) on a loopback port, with a model that speaks on command: what in-process
clients cannot see."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.client import FAKE_APP, fake_worker
from worker_orcd.wsgi.sse import PING_SEC

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def worker():
    worker = fake_worker()
    yield worker
    code, _ = worker.stop()
    worker.kill()
    assert code == 0


def raw(worker, data, read=65536, timeout=10.0):
    """Send bytes, return the first answer bytes."""
    with socket.create_connection(("127.0.0.1", worker.port), timeout=timeout) as sock:
        sock.sendall(data)
        return sock.recv(read)


# -- streaming


def test_events_come_one_by_one_in_order(worker):
    stream = worker.execute("slow", job_id="order", max_tokens=10, headers={"X-Correlation-Id": "corr-1"})
    assert stream.status == 200 and stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["X-Correlation-Id"] == "corr-1"
    events, times = [], []
    while (event := stream.next()) is not None:
        events.append(event)
        times.append(time.monotonic())
    assert [n for n, _ in events] == ["started", *["token"] * 10, "metrics", "end"]
    assert [d["i"] for n, d in events if n == "token"] == list(range(10))
    assert times[8] - times[1] > 0.1, "the tokens came in one lump"
    stream.close()


def test_every_piece_is_utf8_and_the_connection_stays_usable(worker):
    text = "dĺžeň 😀 👩‍👩‍👧 日本 مرحبا"
    connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=10)
    for n in range(3):
        body = json.dumps({"job_id": f"utf{n}", "prompt": f"say {text}"}).encode()
        connection.request("POST", "/execute", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        pieces = [json.loads(line[6:])["t"] for line in body.decode("utf-8").split("\n") if '"t":' in line]
        assert "".join(pieces) == text
    connection.close()


def test_silence_is_broken_by_a_comment(start):
    assert PING_SEC == 10
    stream = start("--ping-sec", 0.5).execute("quiet")
    assert stream.next()[0] == "started"
    for _ in range(2):
        began = time.monotonic()
        assert stream.response.readline() == b": ping\n" and stream.response.readline() == b"\n"
        assert 0.4 < time.monotonic() - began < 1
    stream.abort()


def test_twenty_streams_at_once(worker):
    results = {}

    def run(n):
        results[n] = worker.execute("slow", job_id=f"many{n}", max_tokens=20 + n).all()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(20)]
    began = time.monotonic()
    for t in threads:
        t.start()
    time.sleep(0.2)
    slowest = max(health_seconds(worker) for _ in range(10))
    for t in threads:
        t.join()
    assert sorted(results) == list(range(20))
    for n, events in results.items():
        assert [d["i"] for name, d in events if name == "token"] == list(range(20 + n))
        assert events[-1][1]["tokens_out"] == 20 + n
    seconds = time.monotonic() - began
    print(f"20 streams: {seconds:.2f} s (each takes 0.8 s alone); slowest /health meanwhile {1e3 * slowest:.1f} ms")
    assert seconds < 6


def health_seconds(worker):
    began = time.monotonic()
    worker.request("GET", "/health")
    return time.monotonic() - began


def test_health_is_quick(worker):
    times = sorted(health_seconds(worker) for _ in range(50))
    print(f"/health: median {1e3 * times[25]:.1f} ms, slowest {1e3 * times[-1]:.1f} ms (limit 10 for the median)")
    assert times[25] < 0.010


# -- ending a job


def test_s6_cancel_ends_the_stream_within_100_ms(worker):
    stream = worker.execute("slow", job_id="cancelled")
    assert [stream.next()[0] for _ in range(3)] == ["started", "token", "token"]
    began = time.monotonic()
    assert worker.json("POST", "/cancel", {"job_id": "cancelled"}) == (
        202,
        {"job_id": "cancelled", "state": "cancelling"},
    )
    rest = stream.all()
    seconds = time.monotonic() - began
    assert rest[-1][0] == "error" and rest[-1][1]["code"] == "CANCELLED"
    assert [n for n, _ in rest].count("error") == 1
    assert seconds < 0.15, f"{seconds:.3f} s"
    for _ in range(10):
        assert worker.json("POST", "/cancel", {"job_id": "cancelled"})[1]["state"] == "finished"
    assert worker.execute("say again", job_id="cancelled").all()[-1][0] == "end"


def test_s6_a_running_duplicate_is_409(worker):
    first = worker.execute("slow", job_id="twice")
    assert first.next()[0] == "started"
    second = worker.execute("slow", job_id="twice")
    assert second.status == 409 and json.loads(second.response.read())["code"] == "DUPLICATE_JOB"
    assert first.next()[0] == "token"
    first.abort()


@pytest.mark.parametrize("prompt", ["quiet", "slow", "flood"])
@pytest.mark.parametrize("how", ["abort", "close"])
def test_s7_a_client_that_goes_away_is_noticed(worker, prompt, how):
    job_id = f"gone-{prompt}-{how}"
    stream = worker.execute(prompt, job_id=job_id)
    assert stream.next()[0] == "started"
    began = time.monotonic()
    getattr(stream, how)()
    event = worker.event("execute_end", job_id=job_id)
    seconds = time.monotonic() - began
    print(f"{prompt} {how}: noticed after {1e3 * seconds:.0f} ms (limit 100, 50 of slack for the log reader)")
    # of the flood more may have waited unread than may, before it went
    cut_off = prompt == "flood" and event["outcome"] == "error" and event["code"] == "CANCELLED"
    assert (event["outcome"] == "disconnected" or cut_off) and seconds < 0.15
    assert worker.json("POST", "/cancel", {"job_id": job_id})[1]["state"] == "finished"


def test_s7_a_client_that_does_not_read_holds_up_nobody(worker):
    stream = worker.execute("flood", job_id="deaf")
    assert stream.next()[0] == "started"
    assert worker.execute("say hi", job_id="beside").all()[-1][0] == "end"
    assert health_seconds(worker) < 0.5
    stream.abort()
    worker.event("execute_end", job_id="deaf")


def test_the_deadline_of_a_header_and_the_servers_own_are_given_to_the_job(start):
    worker = start("--timeout", 7)
    deadline = str(int((time.time() + 3) * 1000))
    assert worker.execute("say x", headers={"X-Deadline": deadline}).all()[-1][0] == "end"
    assert 2 < worker.event("execute_start")["deadline_in_sec"] <= 3


# -- refusing


def test_queue_full_is_429_and_passes(start):
    worker = start("--max-seqs", 1, "--max-queue", 1)
    held = [worker.execute("quiet", job_id=f"held{n}") for n in range(2)]
    for stream in held:
        assert stream.next()[0] == "started"
    status, headers, body = worker.request("POST", "/execute", {"job_id": "third", "prompt": "say x"})
    assert status == 429 and json.loads(body)["code"] == "QUEUE_FULL" and int(headers["Retry-After"]) >= 1
    assert worker.json("GET", "/health")[0] == 200
    held[0].abort()
    worker.event("execute_end", job_id="held0")
    assert worker.execute("say x", job_id="third").all()[-1][0] == "end"


def test_s4_bodies_that_lie(worker):
    head = b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert b" 400 " in raw(worker, head + b"\r\n")[:20], "no length"
    assert b" 413 " in raw(worker, head + b"Content-Length: 2147483648\r\n\r\n{")[:20], "2 GiB announced"
    assert b" 400 " in raw(worker, head + b"Content-Length: -1\r\n\r\n{}")[:20]
    assert b" 400 " in raw(worker, head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}")[:20]
    body = b'{"job_id":"c","prompt":"say x"}'
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    good = chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert b" 200 " in raw(worker, good)[:20]
    with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as sock:  # shorter than announced
        sock.sendall(head + b"Content-Length: 500\r\n\r\n{}")
        sock.shutdown(socket.SHUT_WR)
        assert b" 400 " in sock.recv(65536)[:20]
    with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as sock:  # chunks without end
        sock.sendall(chunked)
        piece = b"%x\r\n%s\r\n" % (65536, b"[" * 65536)
        try:
            for _ in range(20):
                sock.sendall(piece)
        except OSError:
            pass  # it may have hung up on us by now
        assert b" 413 " in sock.recv(65536)[:20]
    assert worker.json("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GARBAGE\r\n\r\n",
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n"
        + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 8000) for n in range(100))
        + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Correlation-Id: " + b"y" * 10_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Correlation-Id: a\rb\r\n\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=range(7),
)
def test_s4_malformed_http_is_a_4xx_and_its_text_stays_out_of_the_log(worker, head):
    n_lines = len(worker.raw_log)
    try:
        answer = raw(worker, head)
        assert answer[:10].startswith(b"HTTP/1.1 4") or answer[:10].startswith(b"HTTP/1.1 5"), answer[:60]
    except ConnectionResetError:
        pass  # refused while it still talked
    assert worker.json("GET", "/health")[0] == 200
    assert "GARBAGE" not in "".join(worker.raw_log[n_lines:]) and "yyyy" not in "".join(worker.raw_log[n_lines:])


def test_s4_idle_and_slow_connections_hold_no_thread(start):
    worker = start("--max-seqs", 1, "--max-queue", 0)  # nine threads
    idle = [socket.create_connection(("127.0.0.1", worker.port), timeout=10) for _ in range(200)]
    assert worker.execute("say x").all()[-1][0] == "end"
    assert health_seconds(worker) < 1.0
    for sock in idle:
        sock.close()


def test_s4_slowloris(start):
    """Nine threads, twelve clients of each kind that send a byte now and then: they are cut off, and the next client is
    served."""
    beginnings = (
        b"POST /exe",
        b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Le",
        b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"POST /execute HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    )
    worker = start("--max-seqs", 1, "--max-queue", 0, "--read-limit-sec", 1)
    slow = [socket.create_connection(("127.0.0.1", worker.port), timeout=10) for _ in range(12 * len(beginnings))]
    for n, sock in enumerate(slow):
        sock.sendall(beginnings[n % len(beginnings)])
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        time.sleep(0.3)
        for sock in slow:
            try:
                sock.sendall(b"1")
            except OSError:
                pass  # cut off
    began = time.monotonic()
    assert worker.execute("say x").all()[-1][0] == "end"
    assert time.monotonic() - began < 5
    for sock in slow:
        sock.close()
    statuses = [e["status"] for e in worker.events("refused")]
    assert statuses.count(408) == len(slow), "not all were cut off"


def test_a_client_that_does_not_close_holds_up_nobody(worker):
    """The answer to Connection: close is followed by a linger; it must not happen where other clients wait."""
    with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"200" in sock.recv(65536)
        times = []
        for _ in range(20):
            times.append(health_seconds(worker))
        assert max(times) < 0.5, f"{max(times):.2f} s"


# -- starting and stopping


def test_health_answers_while_loading(start):
    worker = start("--load-seconds", 1.5, wait=False)
    percents = []
    while not worker.events("ready"):
        began = time.monotonic()
        status, body = worker.json("GET", "/health")
        if status == 503:
            assert body["status"] == "loading" and time.monotonic() - began < 0.5
            percents.append(body["percent"])
            assert worker.request("POST", "/execute", {"job_id": "j", "prompt": "say x"})[0] in (200, 503)
        time.sleep(0.05)
    assert len(percents) > 5 and percents == sorted(percents) and percents[-1] > 50
    assert worker.json("GET", "/health")[0] == 200
    shown = [e["percent"] for e in worker.events("model_load_progress")]
    assert shown == [0, 25, 50, 75, 100]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("model", "MODEL_LOAD_FAILED"),
        ("vram", "INSUFFICIENT_VRAM"),
        ("crash", "INTERNAL"),
        ("panic", "INTERNAL"),
        ("kill", "INTERNAL"),
    ],
)
def test_a_failed_load_is_one_readable_error_and_exit_1(start, fault, code):
    worker = start("--load-error", fault, "--load-seconds", 0.2, wait=False)
    began = time.monotonic()
    assert worker.process.wait(10) == 1
    assert time.monotonic() - began < 3
    worker.stop()
    (error,) = worker.events("error")
    assert error["code"] == code and error["message"]
    assert "Traceback" not in "".join(worker.raw_log) and not worker.raw_out
    assert len(worker.events("model_load_start")) == 1, "the worker was started again"
    if fault == "vram":
        assert error["bytes_required"] == 100 and error["bytes_available"] == 10 and error["device"] == "cpu"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_f4_a_signal_while_idle_ends_with_0_at_once(start, sig):
    worker = start()
    code, seconds = worker.stop(sig)
    assert code == 0 and seconds < 2 and worker.events("shutdown")
    assert "Traceback" not in "".join(worker.raw_log)


def test_f4_sigterm_during_load_ends_with_0(start):
    worker = start("--load-seconds", 30, wait=False)
    worker.event("model_load_progress")
    code, seconds = worker.stop()
    assert code == 0 and seconds < 2 and not worker.events("error")


def test_f4_ctrl_c_reaches_master_and_worker(start):
    worker = start()
    stream = worker.execute("slow")
    assert stream.next()[0] == "started"
    began = time.monotonic()
    os.killpg(worker.process.pid, signal.SIGINT)
    assert stream.all()[-1][1]["code"] == "NOT_READY"
    assert worker.process.wait(10) == 0 and 0.9 < time.monotonic() - began < 3


def test_f4_sigterm_lets_jobs_finish_within_the_grace_time_and_refuses_new_ones(start):
    worker = start("--grace", 3)
    stream = worker.execute("slow", max_tokens=60, job_id="runs")
    assert stream.next()[0] == "started"
    worker.process.send_signal(signal.SIGTERM)
    worker.event("shutdown")
    status, body = worker.json("POST", "/execute", {"job_id": "late", "prompt": "say x"})
    assert status == 503 and body["code"] == "NOT_READY"
    status, body = worker.json("GET", "/health")
    assert status == 503 and body["status"] == "stopping"
    assert stream.all()[-1][0] == "end"
    assert worker.process.wait(10) == 0


def test_f4_sigterm_ends_streams_with_an_error_event_within_5_s(start):
    """Of three servers at once, since most of the time is waiting; nobody reads the last one's streams."""
    servers = {prompt: start("--grace", 4) for prompt in ("slow", "quiet", "flood")}
    streams = {p: [worker.execute(p, job_id=f"s{n}") for n in range(3)] for p, worker in servers.items()}
    for stream in (*streams["slow"], *streams["quiet"], *streams["flood"]):
        assert stream.next()[0] == "started"
    began = {}
    for prompt, worker in servers.items():
        began[prompt] = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)

    def end_of(prompt):
        """What the streams said last, and when they and the process had ended."""
        last = [stream.all()[-1] for stream in streams[prompt]] if prompt != "flood" else []
        said_after = time.monotonic() - began[prompt]
        code = servers[prompt].process.wait(10)
        return last, said_after, code, time.monotonic() - began[prompt]

    refused = {"code": "NOT_READY", "message": "the worker is shutting down", "retriable": True}
    with ThreadPoolExecutor(len(servers)) as pool:
        for prompt, (last, said_after, code, seconds) in zip(servers, pool.map(end_of, servers), strict=True):
            print(f"{prompt}: gone after {seconds:.2f} s (limit 5)")
            assert code == 0 and seconds < 5, prompt
            if prompt != "flood":
                assert last == [("error", refused)] * 3, prompt
                assert 3.5 < said_after < 4.6, prompt


def test_f2_a_poisoned_context_ends_every_job_and_the_process_with_70(start):
    worker = start()
    other = worker.execute("quiet", job_id="other")
    assert other.next()[0] == "started"
    events = worker.execute("sticky", job_id="bad").all()
    assert events[-1][0] == "error" and events[-1][1]["code"] == "CUDA_ERROR"
    assert other.all()[-1][1]["code"] == "CUDA_ERROR"
    began = time.monotonic()
    assert worker.process.wait(10) == 70 and time.monotonic() - began < 3


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGABRT])  # what gunicorn sends a silent worker is SIGABRT
def test_a_killed_worker_ends_the_server_with_1(start, sig):
    worker = start()
    pgrep = ["pgrep", "-P", str(worker.process.pid)]
    children = subprocess.run(pgrep, capture_output=True, text=True, check=True).stdout.split()
    assert len(children) == 1, "one master, one worker"
    os.kill(int(children[0]), sig)
    assert worker.process.wait(10) == 1
    worker.stop()
    assert len(worker.events("model_load_start")) == 1, "a second worker was started"
    if sig == signal.SIGKILL:
        assert "SIGKILL" in worker.events("error")[0]["message"]


def test_shutdown_over_http(start):
    worker = start()
    assert worker.json("POST", "/shutdown")[0] == 202
    assert worker.process.wait(10) == 0


def test_a_port_in_use_is_one_error_line(worker):
    command = [sys.executable, str(FAKE_APP), str(worker.port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode != 0 and "in use" in result.stderr


def test_the_log_is_json_lines_only(worker):
    assert worker.raw_log and all(line.startswith("{") for line in worker.raw_log)
    assert all({"ts", "level", "event", "worker_id", "model_ref"} <= set(e) for e in worker.log)
