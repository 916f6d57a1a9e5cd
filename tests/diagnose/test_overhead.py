"""What HTTP costs, measured on a tiny model: every number is there, and streams end as `LLM.generate` does."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
from helpers.command_line import one_error_line

from worker_orcd.diagnose import bench, overhead
from worker_orcd.diagnose.served import StreamTimes


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch):
    """What the memory can do is measured for a second, and is not the matter here."""
    monkeypatch.setattr(bench, "measure_bandwidth", lambda *_: 10.0)


def test_bench_tells_what_http_costs(call, goldens_dir, monkeypatch):
    seen = {}
    generate, read = overhead.LLM.generate, overhead.read_streams

    def generating(llm, prompts, params):
        done = generate(llm, prompts, params)
        seen["generate"] = [len(one.token_ids) for one in done]
        return done

    def reading(port, bodies):
        times = read(port, bodies)
        seen[len(bodies)] = [one.tokens_out for one in times]
        return times

    monkeypatch.setattr(overhead.LLM, "generate", generating)
    monkeypatch.setattr(overhead, "read_streams", reading)
    args = ["bench", "--model", str(goldens_dir / "llama-Q4_0.gguf"), "--device", "cpu", "--threads", "1"]
    args += ["-p", "", "-n", "24", "--batch", "1", "--repeat", "1", "--http", "--streams", "5"]
    code, out, err = call(*args, "--json")
    assert code == 0 and err == ""
    http = json.loads(out)["http"]
    assert http["n_streams"] == 5 and http["n_tokens"] == 24 and http["tokens_in"] > 20
    for name in ("engine_first_token_ms", "first_token_ms", "engine_per_token_ms"):
        assert 0 < http[name] < 10_000
    assert 0 <= http["per_token_ms"] < 10_000, "0 where one read brings all that a tiny model says"
    assert http["generate_tokens_per_s"] > 0 and http["http_tokens_per_s"] > 0
    assert 0 <= http["gap_p50_ms"] <= http["gap_p99_ms"]
    assert seen["generate"] == seen[5] and len(set(seen[5])) >= 1, "the same prompts and seeds, the same tokens"

    report = overhead.Overhead(**http)
    monkeypatch.setattr(overhead, "measure", lambda *_: report)
    code, out, _ = call(*args)
    assert code == 0 and "first token, prompt" in out and "each token" in out and "5 streams" in out
    assert f"p99 {http['gap_p99_ms']:.2f} ms" in out


def test_streams_that_end_before_their_first_token_have_no_times(call, goldens_dir, monkeypatch):
    """A model may end its text at once; what is not there is null, which JSON has, unlike infinity."""
    monkeypatch.setattr(overhead, "Worker", lambda arguments: contextlib.nullcontext(SimpleNamespace(port=1)))
    monkeypatch.setattr(overhead, "read_streams", lambda port, bodies: [StreamTimes(1.0, [], 2.0, 0) for _ in bodies])
    args = ["bench", "--model", str(goldens_dir / "llama-Q4_0.gguf"), "--device", "cpu", "--threads", "1", "-p", ""]
    args += ["-n", "2", "--batch", "1", "--repeat", "1", "--http", "--streams", "2"]
    code, out, _ = call(*args, "--json")
    http = json.loads(out, parse_constant=pytest.fail)["http"]
    assert code == 0 and http["engine_first_token_ms"] > 0 and http["http_tokens_per_s"] == 0
    assert [http[name] for name in ("first_token_ms", "per_token_ms", "gap_p50_ms", "gap_p99_ms")] == [None] * 4
    code, out, _ = call(*args)
    assert code == 0 and "inf" not in out and "first token, prompt" in out


def test_without_the_option_the_report_has_none(call, goldens_dir):
    args = ["bench", "--model", str(goldens_dir / "llama-Q4_0.gguf"), "--device", "cpu", "-p", "4", "-n", "0"]
    code, out, _ = call(*args, "--repeat", "1", "--json")
    assert code == 0 and json.loads(out)["http"] is None


def test_what_cannot_be_measured_is_refused(call, goldens_dir, monkeypatch):
    args = ["bench", "--model", str(goldens_dir / "llama-Q4_0.gguf"), "--device", "cpu", "-p", "4", "--http"]
    assert "--n-gen is 0" in one_error_line(call(*args, "-n", "0"), "INVALID_REQUEST")
    monkeypatch.setattr("worker_orcd.tokenizer.tokenizer.Tokenizer.from_model", lambda *_: None)
    assert "no tokenizer" in one_error_line(call(*args, "-n", "4", "--repeat", "1"), "INVALID_REQUEST")


def test_rates_and_percentiles():
    run = [StreamTimes(1.0, [2.0], 3.0, 10), StreamTimes(1.5, [2.0], 5.0, 30)]
    assert overhead.rate(run) == 10.0
    values = [float(n) for n in range(100)]
    assert [overhead.percentile(values, p) for p in (0.0, 0.5, 0.99, 1.0)] == [0.0, 50.0, 99.0, 99.0]
    assert overhead.percentile([7.0], 0.99) == 7.0


@pytest.mark.parametrize(
    ("n_streams", "device", "expected"), [(200, "cpu", 200), (200, "cuda:0", 64), (3, "cuda:0", 3)]
)
def test_streams_run_together_where_the_device_can(n_streams, device, expected, monkeypatch):
    monkeypatch.setattr(overhead.devices, "resolve", lambda name: name)
    on, asked = overhead.Device(device, 2, "trusted.json", 64 << 20, 0.5), overhead.Asked(8, n_streams, 1)
    given = overhead._arguments("m.gguf", on, asked)
    assert given[given.index("--max-seqs") + 1] == str(expected)
    assert given[given.index("--vram-limit-mb") + 1] == "64" and "trusted.json" in given
    assert "--no-prefix-cache" in given, "a prompt that is timed again is computed again"
