"""Streams beside prompts, measured on a tiny model: every number is there, and all streams run all the time."""

from __future__ import annotations

import json

import pytest
from helpers.command_line import one_error_line

from worker_orcd.diagnose import bench, mix


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch):
    """What the memory can do is measured for a second, and is not the matter here."""
    monkeypatch.setattr(bench, "measure_bandwidth", lambda *_: 10.0)


@pytest.fixture
def args(goldens_dir):
    model = str(goldens_dir / "llama-Q4_0.gguf")
    return ["bench", "--model", model, "--device", "cpu", "--threads", "1", "-p", "4", "-n", "0", "--repeat", "1"]


def steps_of_three(calls) -> int:
    """Those in which all three streams decode."""
    return sum(c.n_steps for c in calls if c.n_decode >= 3)


def test_bench_tells_what_prompts_do_to_streams(call, args, monkeypatch):
    called = []
    gaps = mix.gaps
    monkeypatch.setattr(mix, "gaps", lambda calls: gaps(called.append(calls) or calls))
    asked = ["--mix", "100", "--streams", "3", "--seconds", "0.5"]
    for _ in range(10):  # a busy machine may wake late who begins the streams anew
        called.clear()
        code, out, err = call(*args, *asked, "--json")
        assert code == 0 and err == ""
        if all(steps_of_three(calls) > 0.8 * sum(c.n_steps for c in calls) for calls in called):
            break
    found = json.loads(out)["mix"]
    assert (found["n_prompt"], found["n_streams"], found["seconds"]) == (100, 3, 0.5)
    for times in (found["alone"], found["mixed"]):
        assert 0 < times["gap_p50_ms"] <= times["gap_p99_ms"]
        assert times["gap_ratio"] == pytest.approx(times["gap_p99_ms"] / times["gap_p50_ms"])
        assert times["decode_tokens_per_s"] > 0
    assert found["alone"]["first_token_ms"] is None and found["mixed"]["first_token_ms"] > 0
    assert found["mixed"]["prompt_tokens_per_s"] > found["alone"]["prompt_tokens_per_s"]
    alone, mixed = called
    for calls in called:
        steps = [c.n_steps for c in calls]
        assert steps_of_three(calls) > 0.8 * sum(steps), "the streams hardly ever pause"
    assert sum(c.n_prompt > 0 for c in mixed) > sum(c.n_prompt > 0 for c in alone)

    report = mix.Mix(**{**found, "alone": mix.MixTimes(**found["alone"]), "mixed": mix.MixTimes(**found["mixed"])})
    monkeypatch.setattr(mix, "measure", lambda *_: report)
    code, out, _ = call(*args, *asked)
    assert code == 0 and "3 streams, 0.5 s without and with prompts of 100 tokens" in out
    assert "p99 of the mixed over p50 of the streams alone" in out


def test_what_does_not_fit_is_refused(call, args, monkeypatch):
    said = one_error_line(call(*args, "--mix", "2000", "--streams", "2"), "INVALID_REQUEST")
    assert "--mix 2000" in said and "2001 positions" in said and "256" in said
    load = mix.LLM

    def small(*given, **options):
        return load(*given, **{**options, "kv_cache_bytes": 1 << 19})

    monkeypatch.setattr(mix, "LLM", small)
    said = one_error_line(call(*args, "--mix", "100", "--streams", "200"), "INVALID_REQUEST")
    assert "--streams 200" in said and "KV cache" in said


def test_a_stream_that_fails_is_an_error(call, args, monkeypatch):
    from worker_orcd.errors import InternalError

    submit = mix.LLM.submit_request

    def failing(llm, request):
        job = submit(llm, request)
        if len(request.prompt) == 100:
            llm._loop._end_all(InternalError("the engine failed"))
        return job

    monkeypatch.setattr(mix.LLM, "submit_request", failing)
    assert "the engine failed" in one_error_line(
        call(*args, "--mix", "100", "--streams", "2", "--seconds", "0.5"), "INTERNAL"
    )
