"""Correlation ids under both of their names, on every kind of answer and in every line of a job; and the API key."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from service.client import fake_worker
from service.in_process import App, error_of, events_of
from worker_orcd.wsgi import raw_answers
from worker_orcd.wsgi.middleware import CORRELATION_HEADER, REQUEST_ID_HEADER


@pytest.fixture
def app():
    app = App().ready()
    yield app
    app.service.stop(0)


def ids(result):
    return result.headers["x-correlation-id"], result.headers["x-request-id"]


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({"X-Correlation-Id": "c"}, "c"),
        ({"X-Request-Id": "r"}, "r"),
        ({"x-request-id": "req_ABC-123 ~"}, "req_ABC-123 ~"),
        ({"X-Correlation-Id": "c", "X-Request-Id": "r"}, "c"),
        ({"X-Correlation-Id": "c", "X-Request-Id": "\x7f" * 500}, "c"),
    ],
)
def test_a_request_id_is_taken_where_no_correlation_id_is(app, given, used):
    for result in (
        app.execute(headers=given),
        app.execute("{}", headers=given),
        app.client.simulate_get("/nowhere", headers=given),
        app.client.simulate_get("/execute", headers=given),
        app.client.simulate_get("/metrics", headers=given),
        app.client.simulate_head("/health", headers=given),
        app.client.simulate_post("/shutdown", headers={**given, "Origin": "null"}),
        app.client.simulate_options("/execute", headers=given),
    ):
        assert ids(result) == (used, used), result.status
    assert {e["correlation_id"] for e in app.log if e["event"] in ("execute_start", "execute_end", "refused")} == {used}


@pytest.mark.parametrize("value", ["", "a" * 129, "\x7f", "h\xe9"])
def test_a_bad_request_id_is_refused_under_a_new_one(app, value):
    result = app.execute(headers={"X-Request-Id": value})
    assert error_of(result)["field"] == "X-Request-Id"
    made, same = ids(result)
    assert made == same and len(made) == 32
    (refused,) = [e for e in app.log if e["event"] == "refused"]
    assert refused["field"] == "X-Request-Id" and refused["correlation_id"] == made


def test_what_is_made_is_one_id_under_both_names(app):
    made = {ids(app.client.simulate_get("/health")) for _ in range(5)}
    assert len(made) == 5 and all(one == other and len(one) == 32 for one, other in made)


@pytest.mark.parametrize("header", [CORRELATION_HEADER, REQUEST_ID_HEADER])
def test_an_answer_without_the_application_looks_for_both(header):
    assert raw_answers.id_of(b"GET / HTTP/1.1\r\n" + header.lower().encode() + b":  mine \r\nX: y\r\n") == "mine"
    both = b"GET / HTTP/1.1\r\nX-Request-Id: r\r\nX-Correlation-Id: c\r\n"
    assert raw_answers.id_of(both) == "c"
    assert len(raw_answers.id_of(b"GET / HTTP/1.1\r\n" + header.encode() + b": \xff\r\n")) == 32
    answer = raw_answers.encode(raw_answers.too_slow(1), "mine").split(b"\r\n\r\n")[0].decode().split("\r\n")
    assert {f"{CORRELATION_HEADER}: mine", f"{REQUEST_ID_HEADER}: mine"} <= set(answer)


JOBS = {"say hi": "finished", "fail x": "error", "slow x": "error"}


@pytest.mark.parametrize("prompt", JOBS)
def test_every_line_of_a_job_has_its_ids_and_its_end_is_whole(app, prompt):
    """Finished, failed, and cancelled by another request."""
    if prompt == "slow x":
        threading.Timer(0.1, lambda: app.client.simulate_post("/cancel", body='{"job_id":"j"}')).start()
    events = events_of(app.execute(prompt=prompt, headers={"X-Request-Id": "r-1"}))
    assert events[-1][0] == ("end" if prompt == "say hi" else "error")
    lines = [e for e in app.log if e.get("job_id") == "j" and e["event"] != "cancel"]
    assert [e["event"] for e in lines] == ["execute_start", "execute_end"]
    assert {e["correlation_id"] for e in lines} == {"r-1"}
    start, end = lines
    assert {"tokens_in", "prompt_chars", "prompt_sha256", "seed", "max_tokens", "temperature"} <= set(start)
    assert {"outcome", "tokens_in", "tokens_out", "cached_tokens", "text_chars", "text_sha256", "seconds"} <= set(end)
    assert end["outcome"] == JOBS[prompt]
    if prompt == "say hi":
        assert {"finish_reason", "queue_ms", "prefill_ms", "decode_ms", "tokens_per_s"} <= set(end)
    else:
        assert end["code"] == events[-1][1]["code"] and end["message"]


def test_a_real_server_tells_both_on_streams_refusals_and_what_is_no_http():
    worker = fake_worker("--max-seqs", "1", "--max-queue", "0")
    try:
        stream = worker.execute("slow x", headers={"X-Request-Id": "r-1"}, max_tokens=2000)
        assert stream.headers["X-Correlation-Id"] == stream.headers["X-Request-Id"] == "r-1"
        assert stream.next()[0] == "started"
        full = {"job_id": "k", "prompt": "say hi"}
        status, headers, _ = worker.request("POST", "/execute", full, {"X-Request-Id": "r-2"})
        assert status == 429 and headers["X-Correlation-Id"] == headers["X-Request-Id"] == "r-2"
        with socket.create_connection(("127.0.0.1", worker.port)) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: r-3\r\nContent-Length: -1\r\n\r\n")
            head = sock.recv(2000).decode()
        assert "\r\nX-Correlation-Id: r-3\r\n" in head and "\r\nX-Request-Id: r-3\r\n" in head
        stream.abort()
        assert worker.event("execute_end", job_id="j")["correlation_id"] == "r-1"
        assert worker.event("refused", correlation_id="r-2")["code"] == "QUEUE_FULL"
        assert worker.event("refused", correlation_id="r-3")["status"] == 400
    finally:
        worker.kill()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_key_is_taken_under_any_letters_of_its_scheme(scheme):
    app = App(api_key="secret").ready()
    assert events_of(app.execute(headers={"Authorization": f"{scheme} secret"}))[-1][0] == "end"
    for wrong in (
        f"{scheme} Secret",
        f"{scheme} secre",
        f"{scheme} secrets",
        f"{scheme}secret",
        f"Basic {scheme} secret",
    ):
        result = app.execute(headers={"Authorization": wrong})
        error_of(result, 401, "UNAUTHORIZED")
        assert result.headers["www-authenticate"] == "Bearer"
    for other in ({"X-Api-Key": "secret"}, {"Proxy-Authorization": "Bearer secret"}):
        error_of(app.execute(headers=other), 401, "UNAUTHORIZED")
    body = json.dumps({"job_id": "j", "prompt": "say hi"})
    error_of(app.client.simulate_post("/execute", body=body, params={"api_key": "secret"}), 401, "UNAUTHORIZED")
    app.service.stop(0)
