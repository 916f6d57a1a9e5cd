"""What a crowd gets, measured on a tiny model: every number is there, and every request gives all of its tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.command_line import one_error_line

from worker_orcd.diagnose import bench, crowd
from worker_orcd.serving.engine_work import EngineCall


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch):
    """What the memory can do is measured for a second, and is not the matter here."""
    monkeypatch.setattr(bench, "measure_bandwidth", lambda *_: 10.0)


@pytest.fixture
def args(goldens_dir):
    model = str(goldens_dir / "llama-Q4_0.gguf")
    return ["bench", "--model", model, "--device", "cpu", "--threads", "1", "--batch", "1", "--repeat", "1"]


def test_bench_tells_what_a_crowd_gets(call, args, monkeypatch):
    seen = []
    generate, read = crowd.LLM.generate, crowd.read_streams

    def generating(llm, prompts, params):
        done = generate(llm, prompts, params)
        seen.append((prompts, [len(one.token_ids) for one in done]))
        return done

    def reading(port, bodies, route):
        times = read(port, bodies, route)
        seen.append(([body["prompt"] for body in bodies], [len(one.arrivals) for one in times]))
        return times

    monkeypatch.setattr(crowd.LLM, "generate", generating)
    monkeypatch.setattr(crowd, "read_streams", reading)
    monkeypatch.setattr("worker_orcd.diagnose.overhead.measure", lambda *_: None)
    asked = ["-p", "20", "-n", "12", "--crowd", "30", "--streams", "6", "--http"]
    code, out, err = call(*args, *asked, "--json")
    assert code == 0 and err == ""
    found = json.loads(out)["crowd"]
    assert [found[name] for name in ("n_requests", "n_prompt", "n_tokens", "n_streams", "n_together")] == [
        30, 20, 12, 6, 6,
    ]  # fmt: skip
    for times in (found["generate"], found["http"]):
        assert times["tokens_per_s"] == pytest.approx(times["answer_tokens_per_s"] * 32 / 12)
        assert 0 < times["first_token_p50_ms"] <= times["first_token_p99_ms"]
        assert 0 <= times["gap_p50_ms"] <= times["gap_p99_ms"]
    (prompts, n_tokens), (same, n_pieces) = seen[1], seen[3]
    assert n_tokens == [12] * 30 and len({tuple(p) for p in prompts}) == 30 and {len(p) for p in prompts} == {20}
    assert same == prompts and all(1 <= n <= 12 for n in n_pieces), "pieces are whole characters"

    report = crowd.Crowd(**{**found, "generate": crowd.CrowdTimes(**found["generate"]), "http": None})
    monkeypatch.setattr(crowd, "measure", lambda *_: report)
    code, out, _ = call(*args, *asked[:-1])
    assert code == 0 and "30 requests at once of 20 tokens and 12 more, 6 together" in out
    assert f"{report.generate.answer_tokens_per_s:.1f}" in out


def test_without_the_option_the_report_has_none(call, args):
    code, out, _ = call(*args, "-p", "4", "-n", "0", "--json")
    assert code == 0 and json.loads(out)["crowd"] is None and json.loads(out)["mix"] is None


def test_what_cannot_be_measured_is_refused(call, args):
    for lengths in (["-p", "", "-n", "4"], ["-p", "4", "-n", "0"]):
        assert "--n-prompt) and of answers (--n-gen)" in one_error_line(
            call(*args, *lengths, "--crowd", "2"), "INVALID_REQUEST"
        )
    said = one_error_line(call(*args, "-p", "200", "-n", "100", "--crowd", "2"), "INVALID_REQUEST")
    assert "--crowd of 200 (--n-prompt) and 100 tokens (--n-gen)" in said and "256" in said


def test_gaps_are_those_between_the_ends_of_calls():
    calls = [
        EngineCall(0, 40, 1, 0.0, 1.0),  # nobody has a token before
        EngineCall(2, 20, 1, 1.0, 3.0),
        EngineCall(3, 0, 10, 3.5, 8.0),
        EngineCall(0, 64, 1, 9.0, 10.0),
    ]
    seconds, counts = crowd.gaps(calls)
    np.testing.assert_allclose(seconds, [2.0, 0.5])
    assert counts.tolist() == [2, 30]
    assert [crowd.percentile(seconds, counts, share) for share in (0.0, 0.5, 0.9, 0.95, 1.0)] == [0.5, 0.5, 0.5, 2, 2]
    assert crowd.percentile(*crowd.gaps(calls[:1]), 0.5) is None
