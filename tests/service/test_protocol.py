"""What clients of other habits meet, without a server: HEAD, null, 64.0, Unicode's line breaks, deadlines in seconds,
names of the model; and what the log says of a refusal (wsgi.app, native.requests, sse)."""

from __future__ import annotations

import io
import json
import time

import pytest

from service.in_process import App, error_of, events_of
from worker_orcd.config import ServeConfig
from worker_orcd.errors import InvalidRequest, QueueFull
from worker_orcd.runtime.request import HTTP_FIELDS, Limits, Request
from worker_orcd.wsgi.app import ROUTES
from worker_orcd.wsgi.middleware import peer
from worker_orcd.wsgi.native.execute import ExecuteBody
from worker_orcd.wsgi.page import Page, Static
from worker_orcd.wsgi.stream_format import PieceTemplate, encode_event, json_line

#: those of the page answer also while the model loads, and are in test_page.py
GET_ROUTES = [
    path.replace("{model:path}", "fake")
    for path, resource in ROUTES
    if hasattr(resource, "on_get") and resource not in (Page, Static)
]


@pytest.fixture
def app():
    app = App().ready()
    yield app
    app.service.stop(0)


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("path", GET_ROUTES)
def test_head_answers_as_get_without_the_body(path, ready):
    app = App().ready() if ready else App()
    given = {"X-Correlation-Id": "c"}
    got, head = (getattr(app.client, f"simulate_{m}")(path, headers=given) for m in ("get", "head"))
    always = path in ("/metrics", "/openapi.json")
    assert head.status_code == got.status_code == (200 if ready or always else 503) and not head.content
    got.headers.pop("content-length")
    length = int(head.headers.pop("content-length"))
    assert head.headers == got.headers and abs(length - len(got.content)) <= 2, "uptime may have grown a digit"
    app.service.stop(0)


def test_head_of_a_route_without_get_is_405(app):
    assert app.client.simulate_head("/execute").status_code == 405


@pytest.mark.parametrize("field", HTTP_FIELDS)
def test_null_for_an_optional_field_is_absent(app, field):
    others = {"seed": 1} if field != "seed" else {}
    assert events_of(app.execute(**{field: None}, **others))[-1][0] == "end"


def test_every_optional_field_may_be_null_at_once(app):
    body = dict.fromkeys(ExecuteBody.__struct_fields__) | {"job_id": "n", "prompt": "say hi"}
    assert events_of(app.execute(json.dumps(body)))[-1][0] == "end"


@pytest.mark.parametrize("field", [name for name, kind in HTTP_FIELDS.items() if kind is int])
@pytest.mark.parametrize("number", ["64.0", "6.4e1", "640E-1", "64"])
def test_a_number_without_fraction_is_an_integer(app, field, number):
    events = events_of(app.execute(f'{{"job_id":"j","prompt":"say x","{field}":{number}}}'))
    assert events[-1][0] == "end"
    if field == "seed":
        assert events[0][1]["seed"] == 64 and type(events[0][1]["seed"]) is int
    if field == "max_tokens":
        start = next(e for e in app.log if e["event"] == "execute_start")
        assert start["max_tokens"] == 64 and type(start["max_tokens"]) is int


@pytest.mark.parametrize("number", ["64.5", "1e-1", "9007199254740994.0", "true", '"64"'])
def test_a_number_with_fraction_or_past_exactness_is_refused_by_name(app, number):
    error = error_of(app.execute(f'{{"job_id":"j","prompt":"say x","seed":{number}}}'))
    assert error["field"] == "seed" and "float" not in error["message"]


def test_line_breaks_of_unicode_are_escaped_in_events(app):
    text = "a\u2028b\u2029c\u0085d\ne\x0bf\x0cg\x1ch\x1di\x1ej"
    result = app.execute(prompt="say " + text, job_id="j\u2028é")
    assert "".join(d["t"] for n, d in events_of(result) if n == "token") == text
    assert events_of(result)[0][1]["job_id"] == "j\u2028é"
    assert result.text.splitlines() == result.text.removesuffix("\n").split("\n"), "a client would cut an event"
    data = encode_event("token", {"t": "\u0085é\u2028"}).decode().split("data: ")[1].strip()
    assert data == '{"t":"\\u0085é\\u2028"}'


def test_an_empty_body_says_so(app):
    for body in (b"", b" \r\n\t"):
        for path, fields in (("/execute", "job_id and prompt"), ("/cancel", "job_id")):
            error = error_of(app.client.simulate_post(path, body=body))
            assert error["message"] == f"the body is empty; it must be a JSON object with {fields}"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: str(int(time.time()) + 60), "looks like seconds"),
        (lambda: "30", "not a time from now"),
        (lambda: "30000", "not a time from now"),
    ],
)
def test_a_deadline_in_seconds_is_told_so(app, value, said):
    error = error_of(app.execute(headers={"X-Deadline": value()}), 504, "INFERENCE_TIMEOUT")
    assert said in error["message"] and "milliseconds since 1970" in error["message"]
    assert error["field"] == "X-Deadline"


def test_a_deadline_in_milliseconds_that_has_passed_is_not_lectured(app):
    error = error_of(app.execute(headers={"X-Deadline": str(int(time.time() * 1000) - 5)}), 504, "INFERENCE_TIMEOUT")
    assert "seconds" not in error["message"] and "field" not in error


def test_the_name_of_the_model_can_be_set():
    app = App(served_model_name="my/model: 1")
    assert app.client.simulate_get("/health").json["model"] == "my/model: 1"
    app.ready()
    assert app.client.simulate_get("/health").json["model"] == "my/model: 1"
    assert events_of(app.execute())[0][1]["model"] == "my/model: 1"
    app.service.stop(0)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 257])
def test_a_name_that_cannot_be_shown_is_refused(name):
    with pytest.raises(InvalidRequest) as caught:
        ServeConfig(model="m.gguf", served_model_name=name).check()
    assert caught.value.fields["field"] == "served_model_name"


@pytest.mark.parametrize("key", ["", " ", "a ", " a", "a\n", "é"])
def test_a_key_that_no_client_could_send_is_refused(key):
    with pytest.raises(InvalidRequest) as caught:
        ServeConfig(model="m.gguf", api_key=key).check()
    assert caught.value.fields["field"] == "api_key"


def test_who_asks_again_at_the_last_event_is_not_told_that_it_is_full(monkeypatch):
    """The next stream is wanted before the server knows that the last event has gone out; or it never goes out."""
    app = App(max_seqs=1, max_queue=0)
    first = app.service.places.take()
    with pytest.raises(QueueFull):
        app.service.places.take()
    app.service.places.ends(first)
    second = app.service.places.take()
    app.service.places.leave(second)
    monkeypatch.setattr("worker_orcd.wsgi.places.LAST_EVENT_SEC", -1.0)
    with pytest.raises(QueueFull):
        app.service.places.take()
    app.service.places.leave(first)
    app.service.places.leave(first)
    assert app.service.places.take() is not None


def test_a_job_that_runs_is_a_duplicate_however_full_it_is():
    app = App(max_seqs=1, max_queue=0)
    app.ready()
    place = app.service.places.take()
    job = app.service.llm().submit_request(Request("quiet", job_id="runs"), Limits())
    error_of(app.execute(job_id="runs"), 409, "DUPLICATE_JOB")
    error_of(app.execute(job_id="another"), 429, "QUEUE_FULL")
    job.cancel()
    error_of(app.execute(job_id="runs"), 429, "QUEUE_FULL")
    app.service.places.leave(place)
    app.service.stop(0)


def test_a_stream_says_when_its_last_event_comes(app):
    ended = []
    app.service.places.ends = ended.append
    for prompt in ("say hi", "fail"):
        events_of(app.execute(prompt=prompt, job_id=prompt))
    assert len(ended) == 2 and not app.service.places


# -- what the log says of a refusal


def refusal(app):
    return [e for e in app.log if e["event"] == "refused"][-1]


@pytest.mark.parametrize(
    ("path", "body", "field", "job_id"),
    [
        ("/execute", '{"job_id":"j7","prompt":"secret","max_tokens":0}', "max_tokens", "j7"),
        ("/execute", '{"max_tokens":"x","prompt":"secret","job_id":"j7"}', "max_tokens", "j7"),
        ("/execute", '{"job_id":"j7","prompt":"x","secret":1}', "(unknown)", "j7"),
        ("/execute", '{"job_id":"j7"}', "prompt", "j7"),
        ("/execute", '{"job_id":"a\\nb","prompt":"x"}', "job_id", None),
        ("/execute", '{"job_id":5,"prompt":"x"}', "job_id", None),
        ("/execute", '{"job_id":"j7","prompt":"sec', None, None),
        ("/execute", "[" * 5000, None, None),
        ("/cancel", '{"job_id":"j7","secret":1}', "(unknown)", "j7"),
    ],
)
def test_a_refusal_names_field_job_and_peer(app, path, body, field, job_id):
    error_of(app.client.simulate_post(path, body=body, remote_addr="192.0.2.7"))
    line = refusal(app)
    assert line.get("field") == field and line.get("job_id") == job_id and line["path"] == path
    assert line["peer"].startswith("192.0.2.7") and "secret" not in app.out.getvalue()


def test_a_refusal_names_a_header_and_a_running_job(app):
    error_of(app.execute(headers={"X-Deadline": "soon"}))
    assert refusal(app)["field"] == "X-Deadline"
    error_of(app.execute(headers={"X-Correlation-Id": "\t"}))
    assert refusal(app)["field"] == "X-Correlation-Id"
    app.service.llm().limit = 0
    error_of(app.execute(job_id="late"), 429, "QUEUE_FULL")
    assert refusal(app)["job_id"] == "late"


def test_a_peer_is_written_as_an_address():
    assert peer("192.0.2.7", "80") == "192.0.2.7:80" and peer("::1", 80) == "[::1]:80"
    assert peer("192.0.2.7", None) == "192.0.2.7" and peer("", None) is peer(None, None) is None


def test_a_body_that_cannot_be_read_is_the_clients_fault(app):
    class Stalled(io.BytesIO):
        def read(self, size=-1):
            raise RuntimeError("of the server's own kind, with secret text")

    extras = {"wsgi.input": Stalled(), "HTTP_TRANSFER_ENCODING": "chunked"}
    error = error_of(app.client.simulate_post("/execute", extras=extras))
    assert "could not be read" in error["message"] and "secret" not in app.out.getvalue() + error["message"]


@pytest.mark.parametrize("text", ["plain", 'quote " and \\ and \u2028', "é漢😀\x00\x1f\x7f", "</script>"])
def test_a_template_fills_in_what_an_event_would_say(text):
    template = PieceTemplate(b'event: token\ndata: {"t":"', b'","i":', b"}\n\n")
    assert template.encode(text, 7) == encode_event("token", {"t": text, "i": 7})
    assert PieceTemplate(b'["', b'"]').encode(text, 7) == json_line([text])
