"""GET /metrics of the application and of a real server: what is counted, for whom, in any state (native.metrics)."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.client import fake_worker
from service.fake_llm import FakeLLM
from service.in_process import App, error_of, events_of
from worker_orcd.runtime.llm import LLM

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def read(text):
    """{name of a sample with its labels: value}, without the prefix."""
    found = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()))
            found[s.name.removeprefix("worker_orcd_") + (f"{{{labels}}}" if labels else "")] = s.value
    return found


def ask(app, **headers):
    result = app.client.simulate_get("/metrics", headers=headers)
    assert result.status_code == 200, result.text
    return read(result.text)


def told(app, **expected):
    """Wait until the metrics say this: a job has ended for its client a moment before it is counted."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        found = ask(app)
        if all(found.get(name) == value for name, value in expected.items()):
            return found
        time.sleep(0.005)
    raise AssertionError({name: found.get(name) for name in expected})


@pytest.fixture
def app():
    app = App().ready()
    yield app
    app.service.stop(0)


def test_jobs_are_counted_by_how_they_ended(app):
    assert events_of(app.execute(job_id="a", prompt="say hello"))[-1][0] == "end"
    assert events_of(app.execute(job_id="b", prompt="slow x", max_tokens=3))[-1][1]["finish_reason"] == "length"
    assert events_of(app.execute(job_id="c", prompt="fail x"))[-1][0] == "error"
    found = ask(app)
    assert found["request_success_total{finished_reason=stop}"] == 1
    assert found["request_success_total{finished_reason=length}"] == 1
    assert found["request_success_total{finished_reason=error}"] == 1
    assert found["request_outcomes_total{code=OK}"] == 2
    assert found["request_outcomes_total{code=INVALID_REQUEST}"] == 1
    assert found["generation_tokens_total"] == 5 + 3 + 1 and found["prompt_tokens_total"] == 9 + 6 + 6
    assert found["e2e_request_latency_seconds_count"] == 2 and found["time_to_first_token_seconds_count"] == 3
    assert found["request_params_max_tokens_sum"] == 2048 + 3 + 2048
    assert found["streams_open"] == found["num_requests_running"] == 0


def test_refusals_are_counted_by_code_and_status(app):
    error_of(app.execute("{}"))
    error_of(app.execute("{}", headers={"Host": "evil.example"}), 403, "FORBIDDEN")
    error_of(app.execute("{}", headers={"Content-Type": "text/plain"}), 415, "UNSUPPORTED_MEDIA_TYPE")
    error_of(app.execute(b" " * (1 << 20) + b"{}"), 413)
    error_of(app.client.simulate_get("/nowhere"), 404)
    found = ask(app)
    errors = {k.split("{")[1]: v for k, v in found.items() if k.startswith("http_errors_total") and v}
    assert errors == {
        "code=INVALID_REQUEST,status=400}": 1,
        "code=FORBIDDEN,status=403}": 1,
        "code=UNSUPPORTED_MEDIA_TYPE,status=415}": 1,
        "code=INVALID_REQUEST,status=413}": 1,
        "code=INVALID_REQUEST,status=404}": 1,
    }
    assert not any(v for k, v in found.items() if k.startswith("request_outcomes"))


def test_they_answer_while_the_model_loads_and_tell_of_it_afterwards():
    go_on = threading.Event()

    class Plan:
        def to_dict(self):
            return {"weights_bytes": 11, "kv_bytes": 22, "workspace_bytes": 33, "reserve_bytes": 44}

    def load(config, progress, on_fatal, on_plan):
        on_plan(Plan(), 1000)
        go_on.wait(5)
        return FakeLLM(config, on_fatal)

    app = App(load, served_model_name="my model")
    app.service.start()
    found = told(app, **{"vram_bytes{part=weights}": 11})
    assert found["ready"] == found["load_seconds"] == 0 and found["num_requests_running"] == 0
    assert found["vram_bytes{part=kv_cache}"] == 22 and found["vram_bytes{part=reserve}"] == 44
    error_of(app.execute(), 503, "NOT_READY")
    go_on.set()
    app.ready()
    found = told(app, ready=1)
    assert found["load_seconds"] > 0 and found["model_bytes"] == 123 and found["kv_blocks"] == 100
    assert found["http_errors_total{code=NOT_READY,status=503}"] == 1
    (name,) = [name for name in found if name.startswith("model_info")]
    assert "model_name=my model" in name and "quant_kind=Q4_K_M" in name
    app.service.stop(0)
    assert ask(app)["ready"] == 0, "also of a worker that stops"


def test_with_a_key_the_key_is_needed():
    app = App(api_key="secret")
    error_of(app.client.simulate_get("/metrics", remote_addr="127.0.0.1"), 401, "UNAUTHORIZED")
    assert ask(app, Authorization="Bearer secret")["http_errors_total{code=UNAUTHORIZED,status=401}"] == 1


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        (
            "application/openmetrics-text; version=1.0.0; q=0.8,text/plain;q=0.3",
            "application/openmetrics-text; version=1.0.0",
        ),
        ("\u00ff;;q=x,,", "text/plain; version=0.0.4; charset=utf-8"),
    ],
)
def test_the_client_chooses_the_form(app, accept, content_type):
    result = app.client.simulate_get("/metrics", headers={} if accept is None else {"Accept": accept})
    assert result.status_code == 200 and result.headers["content-type"].startswith(content_type)
    assert result.text.endswith("# EOF\n") is content_type.startswith("application/openmetrics")


def test_nothing_of_a_request_is_told(app):
    events_of(app.execute(job_id="my-secret-job", prompt="say sesame"))
    app.execute(headers={"X-Correlation-Id": "my-secret-id", "Host": "secret.example"})
    text = app.client.simulate_get("/metrics").text
    assert "secret" not in text and "sesame" not in text


def test_a_real_server_counts_streams_and_what_is_no_http():
    worker = fake_worker()
    try:
        streams = [worker.execute("slow x", f"j{n}", max_tokens=2000) for n in range(8)]
        for stream in streams:
            assert [stream.next()[0] for _ in range(3)] == ["started", "token", "token"]

        def metrics():
            status, headers, text = worker.request("GET", "/metrics")
            assert status == 200 and headers["X-Correlation-Id"] and headers["Content-Length"] == str(len(text))
            return read(text.decode())

        found = metrics()
        assert found["streams_open"] == found["num_requests_running"] == 8 and found["generation_tokens_total"] >= 8
        assert metrics()["generation_tokens_total"] >= found["generation_tokens_total"], "those that run are counted"
        for n, stream in enumerate(streams):
            stream.abort() if n % 2 else worker.json("POST", "/cancel", {"job_id": f"j{n}"})
        with socket.create_connection(("127.0.0.1", worker.port)) as sock:
            sock.sendall(b"no http\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 400")
        end = time.monotonic() + 5
        while (found := metrics())["request_outcomes_total{code=CANCELLED}"] < 8 and time.monotonic() < end:
            time.sleep(0.02)
        assert found["request_success_total{finished_reason=abort}"] == 8 and found["num_requests_running"] == 0
        assert found["http_errors_total{code=INVALID_REQUEST,status=400}"] == 1
        assert json.loads(worker.request("GET", "/ready")[2])["ready"] and found["ready"] == 1
    finally:
        worker.kill()


def test_a_real_model_is_told_as_its_streams_are(goldens_dir):
    def load(config, progress, on_fatal, on_plan):
        return LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=progress, on_fatal=on_fatal, max_seqs=2)

    app = App(load).ready()
    ends, starts = [], []
    for n, prompt in enumerate(("hello", "hello there", "x")):
        events = events_of(app.execute(job_id=f"j{n}", prompt=prompt, max_tokens=4 + n, seed=n))
        starts.append(events[0][1])
        ends.append(events[-1][1])
    found = ask(app)
    assert found["generation_tokens_total"] == sum(end["tokens_out"] for end in ends)
    assert found["prompt_tokens_total"] == sum(start["tokens_in"] for start in starts)
    assert found["request_outcomes_total{code=OK}"] == found["request_decode_time_seconds_count"] == 3
    assert 0 < found["request_prefill_time_seconds_sum"] < found["e2e_request_latency_seconds_sum"]
    assert found["kv_blocks"] > 0 and found["kv_cache_bytes"] > 0 and found["kv_cache_usage_perc"] == 0
    assert found["model_bytes"] == (goldens_dir / "llama-Q4_0.gguf").stat().st_size
    assert any(name.startswith("model_info") and "arch=llama" in name and "device=cpu" in name for name in found)
    app.service.stop(0)
