"""The metrics without a server: what the end of a job adds, counters that never fall, docs/metrics.md as a whole.

What is read of an engine and of a job is in stats.
"""

from __future__ import annotations

import math
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from worker_orcd.observe.metrics import CODES, PREFIX, REFUSALS, Metrics
from worker_orcd.observe.stats import EngineStats

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@dataclass
class Ended:
    """A job that has ended."""

    outcome: str | None = "stop"
    submitted_at: float = 100.0
    admitted_at: float | None = 100.5
    first_token_at: float | None = 102.5
    ended_at: float | None = 106.5
    tokens_in: int = 30
    tokens_out: int = 9
    cached_tokens: int = 20
    max_tokens: int = 64


@pytest.fixture
def metrics():
    return Metrics("1.2.3", n_streams=lambda: 7, ready=lambda: True)


def samples(metrics):
    """{name without the prefix and with its labels: value} of everything."""
    text, content_type = metrics.exposition(None)
    assert content_type.startswith("text/plain; version=0.0.4")
    found = {}
    for family in parse(text.decode()):
        for s in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()))
            name = s.name.removeprefix(PREFIX) + (f"{{{labels}}}" if labels else "")
            assert name not in found
            found[name] = s.value
    return found


def changed(before, after):
    return {k: v - before.get(k, 0) for k, v in after.items() if v != before.get(k, 0) and "_bucket" not in k}


SECONDS = {
    "e2e_request_latency_seconds": 6.5,
    "request_queue_time_seconds": 0.5,
    "request_inference_time_seconds": 6.0,
    "request_prefill_time_seconds": 2.0,
    "request_decode_time_seconds": 4.0,
    "time_to_first_token_seconds": 2.5,
    "request_time_per_output_token_seconds": 0.5,
}
ALWAYS = {"request_prompt_tokens": 30, "request_generation_tokens": 9, "request_params_max_tokens": 64}


def observed(values):
    return {f"{k}_sum": v for k, v in values.items()} | {f"{k}_count": 1 for k in values}


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_job_that_finished_is_observed_once_in_every_part_of_its_life(metrics, reason):
    before = samples(metrics)
    metrics.job_ended(Ended(reason))
    assert changed(before, samples(metrics)) == {
        **observed(SECONDS),
        **observed(ALWAYS),
        f"request_success_total{{finished_reason={reason}}}": 1,
        "request_outcomes_total{code=OK}": 1,
        "prompt_tokens_total": 30,
        "prompt_tokens_cached_total": 20,
        "generation_tokens_total": 9,
    }


@pytest.mark.parametrize(
    ("code", "reason"), [("CANCELLED", "abort"), ("INFERENCE_TIMEOUT", "error"), ("NEW_CODE", "error"), (None, "error")]
)
def test_a_job_that_was_ended_is_observed_as_far_as_it_came(metrics, code, reason):
    before = samples(metrics)
    ended = {
        f"request_success_total{{finished_reason={reason}}}": 1,
        f"request_outcomes_total{{code={code or 'INTERNAL'}}}": 1,
    }
    metrics.job_ended(Ended(code, ended_at=None))
    parts = ("request_queue_time_seconds", "request_prefill_time_seconds", "time_to_first_token_seconds")
    running = changed(before, samples(metrics))
    assert running == {
        **observed({k: SECONDS[k] for k in parts}),
        **observed(ALWAYS),
        **ended,
        "prompt_tokens_total": 30,
        "prompt_tokens_cached_total": 20,
        "generation_tokens_total": 9,
    }
    before = samples(metrics)
    metrics.job_ended(Ended(code, admitted_at=None, first_token_at=None, ended_at=None, tokens_out=0))
    waiting = changed(before, samples(metrics))
    none = {"request_generation_tokens_count": 1, "request_generation_tokens_sum": 0}
    assert waiting == {k: v for k, v in (observed(ALWAYS) | none | ended).items() if v}


def test_one_token_has_no_time_between_tokens(metrics):
    metrics.job_ended(Ended(tokens_out=1, ended_at=102.5))
    found = samples(metrics)
    assert found["request_time_per_output_token_seconds_count"] == 0
    assert found["request_decode_time_seconds_count"] == 1 and found["request_decode_time_seconds_sum"] == 0


def test_an_end_by_a_stop_string_is_now(metrics):
    """The engine has not drawn its last token: the output thread found the stop string."""
    now = time.monotonic()
    metrics.job_ended(Ended(submitted_at=now - 3, admitted_at=now - 3, first_token_at=now - 2, ended_at=None))
    found = samples(metrics)
    assert 3 <= found["e2e_request_latency_seconds_sum"] < 13 and 2 <= found["request_decode_time_seconds_sum"] < 12


def test_the_engine_is_read_when_somebody_asks(metrics):
    stats = EngineStats(3, 4, 100, 25, 0.5, 10, 1000, 900, 60, 40, 17)
    metrics.watch(lambda: stats)
    metrics.job_ended(Ended())
    found = samples(metrics)
    assert {name: found[name] for name in found if name.startswith(("num_", "kv_", "prefix_"))} == {
        "num_requests_running": 3,
        "num_requests_waiting": 4,
        "kv_cache_usage_perc": 0.5,
        "kv_blocks": 100,
        "kv_blocks_used": 25,
        "kv_blocks_cached": 10,
        "kv_cache_bytes": 0,
        "prefix_cache_queries_total": 1000,
        "prefix_cache_hits_total": 900,
    }
    assert found["prompt_tokens_total"] == 90 and found["prompt_tokens_cached_total"] == 60
    assert found["generation_tokens_total"] == 26


def test_a_counter_never_falls_while_jobs_end(metrics):
    """Between its leaving those that run and its joining those that ended, a job's tokens are nowhere."""
    stats = EngineStats(generated_tokens=100, prompt_tokens=50)
    metrics.watch(lambda: stats)
    assert samples(metrics)["generation_tokens_total"] == 100
    stats = EngineStats()
    assert samples(metrics)["generation_tokens_total"] == 100
    metrics.job_ended(Ended(tokens_out=100, tokens_in=50))
    found = samples(metrics)
    assert found["generation_tokens_total"] == 100 and found["prompt_tokens_total"] == 50
    metrics.job_ended(Ended(tokens_out=5))
    assert samples(metrics)["generation_tokens_total"] == 105


def test_jobs_that_end_in_many_threads_are_all_counted(metrics):
    def end():
        for _ in range(200):
            metrics.job_ended(Ended())
            metrics.refused("QUEUE_FULL", 429)

    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    last = 0.0
    while any(thread.is_alive() for thread in threads):
        value = samples(metrics)["generation_tokens_total"]
        assert value >= last
        last = value
    found = samples(metrics)
    assert found["generation_tokens_total"] == 1600 * 9 and found["request_outcomes_total{code=OK}"] == 1600
    assert found["e2e_request_latency_seconds_count"] == 1600
    assert found["http_errors_total{code=QUEUE_FULL,status=429}"] == 1600


def test_what_is_known_of_the_model(metrics):
    before = samples(metrics)
    assert before["load_seconds"] == before["vram_bytes{part=weights}"] == 0 and before["ready"] == 1
    assert before["streams_open"] == 7 and before["build_info{version=1.2.3}"] == 1
    plan = {"weights_bytes": 1, "kv_bytes": 2, "workspace_bytes": 3, "reserve_bytes": 4, "bytes_required": 10}
    metrics.vram_planned({**plan, "kv_bytes": 9})
    metrics.vram_planned(plan)
    metrics.model_loaded('a "name"\\\n', 2.5, {"arch": "llama", "model_bytes": 77, "kv_bytes": 5, "sm": None})
    found = samples(metrics)
    assert [found[f"vram_bytes{{part={p}}}"] for p in ("weights", "kv_cache", "workspace", "reserve")] == [1, 2, 3, 4]
    assert (found["load_seconds"], found["model_bytes"], found["kv_cache_bytes"]) == (2.5, 77, 5)
    (name,) = [name for name in found if name.startswith("model_info")]
    assert 'model_name=a "name"\\\n' in name and "arch=llama" in name and name.endswith("sm=}")


def test_the_bounds_hold_vllms_own_and_tell_a_fast_model_from_a_slow_one(metrics):
    bounds = {
        f.name.removeprefix(PREFIX): [float(s.labels["le"]) for s in f.samples if s.name.endswith("_bucket")]
        for f in metrics.registry.collect()
        if f.type == "histogram"
    }
    for name, values in bounds.items():
        assert values == sorted(set(values)) and values[-1] == math.inf, name
    assert {0.001, 0.005, 0.01, 0.1, 1.0, 10.0, 2560.0} <= set(bounds["time_to_first_token_seconds"])
    assert {0.001, 0.01, 0.025, 0.1, 1.0, 80.0} <= set(bounds["request_time_per_output_token_seconds"])
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert {0.005, 0.3, 0.5, 1.0, 60.0, 7680.0} <= set(bounds[f"{name}_seconds"])
    assert {1, 2, 5, 10, 1000, 100_000} <= set(bounds["request_prompt_tokens"])


def rows():
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    return {name.strip("`"): (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels in map(cells, lines)}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")][:3]


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_docs_list_every_metric_and_the_parsers_read_it(metrics, accept):
    metrics.model_loaded("m", 1.0, {})
    text, content_type = metrics.exposition(accept)
    assert content_type.startswith("text/plain" if accept is None else OPENMETRICS)
    listed = rows()
    assert len(listed) > 30
    shown = {}
    for family in (parse if accept is None else parse_openmetrics)(text.decode()):
        kind, suffix = family.type, ""
        if accept is None and family.name.endswith("_info"):
            kind = "info"  # which the older form does not know
        elif kind in ("counter", "info"):
            suffix = "_total" if kind == "counter" else "_info"
        assert family.documentation.endswith(".") and family.samples
        labels = {label for s in family.samples for label in s.labels} - {"le"}
        shown[family.name + suffix] = (kind, labels)
    assert shown == {name: (kind, set(labels)) for name, (kind, labels) in listed.items()}
    assert not [name for name in shown if not name.startswith(PREFIX)] and b"_created" not in text


def test_codes_are_there_before_anything_happens(metrics):
    found = samples(metrics)
    assert all(found[f"request_outcomes_total{{code={code}}}"] == 0 for code in CODES)
    assert all(found[f"http_errors_total{{code={code},status={status}}}"] == 0 for code, status in REFUSALS)


def test_two_workers_in_one_process_count_apart_and_not_in_the_librarys_registry(metrics):
    other = Metrics("1", n_streams=lambda: 0, ready=lambda: False)
    metrics.job_ended(Ended())
    assert samples(other)["request_outcomes_total{code=OK}"] == 0 and samples(other)["ready"] == 0
    assert not [family for family in REGISTRY.collect() if family.name.startswith(PREFIX)]


@pytest.mark.parametrize("accept", [None, "text/plain;version=1.0.0;q=0.5", "text/plain; version=0.0.4"])
def test_the_text_is_what_the_library_makes_of_the_registry(metrics, accept):
    for tokens in (1, 40, 3000):
        metrics.job_ended(Ended(tokens_out=tokens))
    metrics.job_ended(Ended(outcome="CANCELLED", first_token_at=None, ended_at=None))
    encode, content_type = choose_encoder(accept or "")
    assert metrics.exposition(accept) == (encode(metrics.registry), content_type)
