"""The application without a server: what it refuses, how, and what it never says.

That is wsgi.app with its resources (native: cancel, execute, health, requests, shutdown), middleware, http_errors,
sse, job_record.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta

import pytest

from service.fake_llm import FakeLLM
from service.in_process import App, error_of, events_of
from worker_orcd.errors import InternalError
from worker_orcd.wsgi.app import first_request


@pytest.fixture
def app():
    app = App().ready()
    yield app
    app.service.stop(0)


# -- S1, S5: every field against its rule

NOT_NUMBERS = ['"1"', "true", "[]", "{}", "NaN", "Infinity", "1e999", "-1e999", "0x1", "9" * 5000]
NUMBERS = {
    "max_tokens": [*NOT_NUMBERS, "0", "-1", "2049", "1.5", str(2**63), str(2**64), "-" + "9" * 400],
    "temperature": [*NOT_NUMBERS, "-0.1", "2.1", "1e308", "-1e-300"],
    "top_p": [*NOT_NUMBERS, "-0.1", "1.1"],
    "top_k": [*NOT_NUMBERS, "-1", "513", "1.5", str(2**64)],
    "min_p": [*NOT_NUMBERS, "-0.1", "1.1"],
    "repetition_penalty": [*NOT_NUMBERS, "0", "0.0", "-1", "2.1"],
    "seed": [*NOT_NUMBERS, "-1", str(2**64), "1.5", "-1.0", "1e17", "1e300"],
    "stop": [
        '"x"',
        "1",
        "[1]",
        "[null]",
        '[""]',
        '["a","b","c","d","e"]',
        '["' + "x" * 33 + '"]',
        '[["a"]]',
        '["a\\u0000"]',
    ],
    "job_id": ["null", "1", '""', '"' + "x" * 257 + '"', '"a\\nb"', '"a\\u0000"', "[]"],
    "prompt": ["null", "1", '""', '"' + "x" * 32769 + '"', '"a\\u0000b"', "[]"],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(f, v) for f, values in NUMBERS.items() for v in values],
    ids=lambda v: v[:20] if isinstance(v, str) else None,
)
def test_s1_s5_a_field_that_breaks_its_rule_is_named(app, field, value):
    fields = {"job_id": '"j"', "prompt": '"say hi"', field: value}
    body = "{" + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}"
    error = error_of(app.execute(body))
    if not any(bad in value for bad in ("NaN", "Infinity", "0x1")):  # those are no JSON at all
        assert error["field"] == field and field in error["message"]
    assert not app.service.places


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", 2048),
        ("temperature", 0),
        ("temperature", 2.0),
        ("top_p", 0.0),
        ("top_p", 1),
        ("top_k", 0),
        ("top_k", 512),
        ("min_p", 1.0),
        ("repetition_penalty", 0.001),
        ("repetition_penalty", 2),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("stop", []),
        ("stop", ["a", "b", "c", "x" * 32]),
        ("job_id", "x" * 256),
        ("job_id", "héllo 😀"),
        ("prompt", "say " + "x" * 32764),
    ],
)
def test_values_at_the_edge_are_taken(app, field, value):
    events = events_of(app.execute(**{field: value}))
    assert [name for name, _ in events][-1] == "end" and events[0][0] == "started"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"{",
        b"{}",
        b'{"job_id":"j"}',
        b'{"prompt":"x"}',
        b'{"job_id":"j","prompt":"x"}x',
        b'{"job_id":"j","prompt":"x",}',
        b"\xef\xbb\xbf{}",
        '{"job_id":"j","prompt":"x"}'.encode("utf-16"),
        b'{"job_id":"j","prompt":"\xff"}',
        b'{"job_id":"j","prompt":"\\ud800"}',
        b'{"job_id":"j","prompt":"\\udc00\\ud800"}',
        b'{"job_id":"j","prompt":"a\nb"}',
        b'{"job_id":"j","prompt":"x","\\ud800":1}',
        b"\x00" * 100,
        b'{"job_id":"j","prompt":"x","prompt":"y"}',
        b'{"job_id":"j","prompt":"x","job_id":"j"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"job_id":"j","prompt":"x","stop":' + b"[" * 100_000,
        b'{"job_id":"j","prompt":"x","stop":[' + b"[" * 70 + b"]" * 71 + b"}",
        b"<x/>",
        b"job_id=j&prompt=x",
    ],
)
def test_s3_a_body_that_is_no_flat_object_is_refused(app, body):
    began = time.monotonic()
    error_of(app.execute(body))
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("name", ["logprobs", "Prompt", "", "stream", "n\\n", "x" * 500, "\\u0000"])
def test_an_unknown_field_is_refused_by_name(app, name):
    error = error_of(app.execute('{"job_id":"j","prompt":"x","' + name + '":1}'))
    assert error["message"].startswith("unknown field") and error["message"].isprintable()
    assert name[:20] in error["message"].replace("\\x00", "\\u0000")


def test_a_missing_field_is_named(app):
    assert error_of(app.execute('{"prompt":"x"}'))["field"] == "job_id"
    assert error_of(app.execute('{"job_id":"x"}'))["field"] == "prompt"


def test_s4_a_body_over_one_mebibyte_is_413_before_it_is_parsed(app):
    limit = 1 << 20
    assert error_of(app.execute(b"[" * (limit + 1)), 413)
    error_of(app.execute(b"[" * limit), 400)
    error_of(app.execute(b"{}", headers={"Content-Length": str(2 << 30)}), 413)


# -- answers


def test_events_in_order_and_seed_reported(app):
    events = events_of(app.execute(prompt="say a\nb é😀", seed=5))
    names = [name for name, _ in events]
    assert names[0] == "started" and names[-2:] == ["metrics", "end"] and set(names[1:-2]) == {"token"}
    started, end = events[0][1], events[-1][1]
    assert started["job_id"] == "j" and started["seed"] == 5 and started["model"] == "fake"
    assert started["tokens_in"] == len("say a\nb é😀".encode())
    datetime.fromisoformat(started["started_at"])
    assert "".join(d["t"] for n, d in events if n == "token") == "a\nb é😀"
    assert [d["i"] for n, d in events if n == "token"] == list(range(6))
    assert end["finish_reason"] == "stop" and end["tokens_out"] == 10 and "decode_time_ms" in end
    assert set(events[-2][1]) == {"queue_ms", "prefill_ms", "decode_ms", "tokens_per_s"}


def test_a_seed_that_is_made_up_is_the_same_number_as_a_double(app):
    seeds = {events_of(app.execute(prompt="say a", job_id=f"s{n}"))[0][1]["seed"] for n in range(20)}
    assert len(seeds) == 20 and all(type(s) is int and 0 <= s < 2**53 and float(s) == s for s in seeds)


def test_an_error_of_a_running_job_is_its_terminal_event(app):
    events = events_of(app.execute(prompt="fail"))
    assert [n for n, _ in events] == ["started", "token", "error"]
    assert events[-1][1] == {
        "code": "INVALID_REQUEST",
        "message": "no room in the cache",
        "retriable": False,
        "field": "max_tokens",
    }


def test_a_poisoned_context_turns_health_and_asks_for_exit_70():
    app = App().ready()
    codes = []
    app.service.on_exit = codes.append
    events = events_of(app.execute(prompt="sticky"))
    assert events[-1][0] == "error" and events[-1][1]["code"] == "CUDA_ERROR"
    result = app.client.simulate_get("/health")
    assert result.status_code == 503 and result.json["status"] == "unhealthy"
    error_of(app.execute(), 503, "NOT_READY")
    end = time.monotonic() + 2
    while not codes and time.monotonic() < end:
        time.sleep(0.01)
    assert codes == [70] and app.service.exit_code == 70
    app.service.stop(0)


def test_default_max_tokens_keeps_to_the_server_limit():
    app = App(max_tokens_out=5, max_tokens_in=20).ready()
    events = events_of(app.execute(prompt="slow"))
    assert events[-1][1]["tokens_out"] == 5 and events[-1][1]["finish_reason"] == "length"
    assert error_of(app.execute(max_tokens=6))["field"] == "max_tokens"
    assert error_of(app.execute(prompt="say " + "x" * 17))["field"] == "prompt"
    app.service.stop(0)


def test_an_unexpected_exception_is_internal_and_tells_no_text(app):
    class Broken:
        def encode(self, text, **_):
            raise RuntimeError(f"cannot encode {text}")

    app.service.llm().tokenizer = Broken()
    error = error_of(app.execute(prompt="secret words"), 500, "INTERNAL")
    assert "secret" not in json.dumps(error) and "secret" not in app.out.getvalue()
    assert any(e["event"] == "error" and "test_app.py" in e["at"] for e in app.log)


def test_a_model_without_tokenizer_is_one_clear_error(app):
    app.service.llm().tokenizer = None
    assert "tokenizer" in error_of(app.execute())["message"]


# -- headers


def test_correlation_id_is_taken_made_and_echoed(app):
    result = app.execute(headers={"X-Correlation-Id": "abc 123~"})
    assert result.headers["x-correlation-id"] == "abc 123~"
    assert {e["correlation_id"] for e in app.log if e["event"].startswith("execute_")} == {"abc 123~"}
    made = app.client.simulate_get("/health").headers["x-correlation-id"]
    assert len(made) == 32 and made != app.client.simulate_get("/health").headers["x-correlation-id"]
    assert app.client.simulate_get("/nowhere", headers={"X-Correlation-Id": "n"}).headers["x-correlation-id"] == "n"


@pytest.mark.parametrize("value", ["", "x" * 129, "a\tb", "h\xe9", "x" * 10_000])
def test_s8_a_bad_correlation_id_is_refused_and_not_echoed(app, value):
    result = app.execute(headers={"X-Correlation-Id": value})
    assert error_of(result)["field"] == "X-Correlation-Id"
    assert result.headers["x-correlation-id"] != value


def test_deadline_forms(app):
    soon = datetime.now(UTC) + timedelta(seconds=30)
    for value in (
        soon.isoformat(),
        soon.isoformat().replace("+00:00", "Z"),
        soon.isoformat().lower(),
        str(int(soon.timestamp() * 1000)),
    ):
        assert events_of(app.execute(headers={"X-Deadline": value}))[-1][0] == "end"
    started = [e for e in app.log if e["event"] == "execute_start"]
    assert all(25 < e["deadline_in_sec"] <= 30 for e in started) and len(started) == 4


@pytest.mark.parametrize(
    "value", ["", "soon", "2026-01-01", "2026-01-01T00:00:00", "-5", "1.5", "9" * 400, "٣", "2026-13-01T00:00:00Z"]
)
def test_a_deadline_that_is_no_time_is_refused(app, value):
    assert error_of(app.execute(headers={"X-Deadline": value}))["field"] == "X-Deadline"


@pytest.mark.parametrize("value", ["1", "2020-01-01T00:00:00Z"])
def test_a_deadline_in_the_past_is_a_timeout(app, value):
    assert error_of(app.execute(headers={"X-Deadline": value}), 504, "INFERENCE_TIMEOUT")["retriable"] is True


def test_s8_api_key():
    app = App(api_key="secret-key").ready()
    for headers in (
        None,
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret-key"},
        {"Authorization": "Bearer secret-key "},
        {"Authorization": "Bearer h\xe9"},
    ):
        result = app.execute(headers=headers)
        if headers and headers["Authorization"].strip() == "Bearer secret-key":
            continue  # trailing blanks are no part of a header's value
        error_of(result, 401, "UNAUTHORIZED")
        assert result.headers["www-authenticate"] == "Bearer"
    for path in ("/cancel", "/shutdown"):
        error_of(app.client.simulate_post(path, body=b"{}"), 401, "UNAUTHORIZED")
    assert not app.terminated
    assert events_of(app.execute(headers={"Authorization": "Bearer secret-key"}))[-1][0] == "end"
    assert [app.client.simulate_get(path).status_code for path in ("/health", "/ready")] == [200, 200]
    assert "secret-key" not in app.out.getvalue()
    app.service.stop(0)


# -- life


def test_health_and_refusals_before_the_model_is_there():
    app = App()
    health = app.client.simulate_get("/health")
    assert health.status_code == 503 and health.json["status"] == "loading" and health.json["percent"] == 0
    assert app.client.simulate_get("/ready").status_code == 503
    result = app.execute()
    assert error_of(result, 503, "NOT_READY")["retriable"] is True and result.headers["retry-after"] == "1"
    cancelled = app.client.simulate_post("/cancel", body=b'{"job_id":"x"}')
    assert cancelled.status_code == 202 and cancelled.json == {"job_id": "x", "state": "unknown"}
    assert error_of(app.client.simulate_post("/cancel", body=b'{"job_id":""}'))["field"] == "job_id"


def test_health_of_a_ready_worker(app):
    health = app.client.simulate_get("/health")
    assert health.status_code == 200
    assert {
        "status",
        "worker_id",
        "model",
        "resident",
        "quant_kind",
        "vram_bytes_used",
        "tokenizer_kind",
        "vocab_size",
        "context_length",
        "max_seqs",
        "kv_positions",
        "default_seqs",
        "full_context_seqs",
        "uptime_seconds",
        "sm",
        "cuda_runtime_version",
        "device",
        "sha256",
        "tokenizer_sha256",
        "chat_template_sha256",
        "verified_by",
        "trusted_name",
        "trusted_source",
    } == set(health.json)
    assert health.json["tokenizer_sha256"] == "70" * 32
    assert health.json["status"] == "healthy" and health.json["quant_kind"] == "Q4_K_M"
    assert app.client.simulate_get("/ready").json == {"ready": True, "status": "ready"}


def test_routes_and_methods_that_are_not_there(app):
    error_of(app.client.simulate_get("/nowhere"), 404)
    result = app.client.simulate_get("/execute")
    error_of(result, 405)
    assert "POST" in result.headers["allow"]
    error_of(app.client.simulate_post("/health"), 405)


def test_shutdown_asks_once_per_call(app):
    result = app.client.simulate_post("/shutdown", remote_addr="127.0.0.1")
    assert result.status_code == 202 and app.terminated == [1]


def test_s6_cancel_of_unknown_and_finished_jobs_is_202(app):
    for _ in range(100):
        result = app.client.simulate_post("/cancel", body=b'{"job_id":"nobody"}')
        assert result.status_code == 202 and result.json == {"job_id": "nobody", "state": "unknown"}
    events_of(app.execute(job_id="done"))
    assert app.client.simulate_post("/cancel", body=b'{"job_id":"done"}').json["state"] == "finished"
    for body in (b"{}", b'{"job_id":""}', b'{"job_id":1}', b'{"job_id":"x","y":1}', b"", b"[" * 1000):
        error_of(app.client.simulate_post("/cancel", body=body))


def test_a_refusal_is_logged_without_its_text(app):
    error_of(app.execute('{"job_id":"j","secret words":1}', headers={"X-Correlation-Id": "c-1"}))
    (refused,) = [e for e in app.log if e["event"] == "refused"]
    assert refused["status"] == 400 and refused["code"] == "INVALID_REQUEST" and refused["correlation_id"] == "c-1"
    assert refused["path"] == "/execute" and "secret" not in app.out.getvalue()


@pytest.mark.parametrize("source", ["model", "given", "beside", None])
def test_the_log_says_that_a_tokenizer_beside_the_model_is_used(source):
    def load(config, progress, on_fatal, on_plan):
        llm = FakeLLM(config, on_fatal)
        llm.info.tokenizer_source, llm.info.tokenizer_path = source, "/models/tokenizer.json"
        return llm

    app = App(load).ready()
    app.service.stop(0)
    told = [(e["level"], e["path"]) for e in app.log if e["event"] == "tokenizer_beside"]
    assert told == ([("warning", "/models/tokenizer.json")] if source == "beside" else [])


@pytest.mark.parametrize("slow", [(), ("F16 a (2): so", "Q4_0 b: so too")])
def test_the_log_says_what_is_slow_and_how_the_plan_is_lowered(slow):
    def load(config, progress, on_fatal, on_plan):
        llm = FakeLLM(config, on_fatal)
        llm.info.lowering, llm.info.slow_paths = "plain", slow
        return llm

    app = App(load).ready()
    app.service.stop(0)
    assert [(e["level"], e["message"]) for e in app.log if e["event"] == "slow_path"] == [("info", s) for s in slow]
    assert [e["lowering"] for e in app.log if e["event"] == "model_load_complete"] == ["plain"]


def test_the_log_tells_the_life_of_a_job_and_never_its_text(app):
    events_of(app.execute(prompt="say sesame", stop=["open sesame"]))
    names = [e["event"] for e in app.log]
    order = ["model_load_start", "model_load_progress", "model_load_complete", "ready", "execute_start", "execute_end"]
    assert [n for n in names if n in order] == [order[0], *[order[1]] * 5, *order[2:]]
    assert [e["percent"] for e in app.log if e["event"] == "model_load_progress"] == [0, 25, 50, 75, 100]
    start, end = (next(e for e in app.log if e["event"] == n) for n in ("execute_start", "execute_end"))
    assert start["prompt_chars"] == 10 and len(start["prompt_sha256"]) == 64
    assert end["tokens_out"] == 6 and end["text_chars"] == 6 and len(end["text_sha256"]) == 64
    assert end["finish_reason"] == "stop" and end["outcome"] == "finished"
    assert "sesame" not in app.out.getvalue()


# -- before the first request


@pytest.mark.parametrize("config", [{}, {"api_key": "secret"}])
@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "http://[::1]:80"])
def test_a_first_request_of_our_own_leaves_no_trace(config, url):
    """While the model loads; afterwards Falcon's table of routes is there."""
    app = App(**config)
    falcon_app = app.client.app
    asked = []
    health = app.service.health
    app.service.health = lambda: asked.append(1) or health()
    first_request(falcon_app, url)
    assert asked == [1] and app.log == []
    assert app.client.simulate_get("/health").json["status"] == "loading"


def test_the_worker_warms_itself_up_before_jobs_are_accepted():
    app, states = App(), []
    app.service.warm_up = lambda: states.append(app.service.state)
    app.ready()
    assert states == ["loading"]
    app.service.stop(0)


def test_a_warm_up_that_fails_is_a_failed_load():
    app, codes = App(), []
    app.service.on_exit = codes.append

    def fail():
        raise InternalError("no")

    app.service.warm_up = fail
    app.service.start()
    until = time.monotonic() + 5
    while not codes and time.monotonic() < until:
        time.sleep(0.002)
    assert codes == [1] and app.log[-1]["message"] == "no" and app.service.state == "loading"
