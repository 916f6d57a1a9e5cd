"""`worker-orcd bench` (diagnose.bench): it measures what was asked."""

from __future__ import annotations

import json

from helpers.command_line import one_error_line


def test_bench_measures_what_was_asked(call, golden):
    args = ["bench", "--model", golden, "--device", "cpu", "-p", "16,32", "-n", "70", "--batch", "1,3", "--repeat", "2"]
    code, out, err = call(*args, "--json")
    assert code == 0 and err == ""
    report = json.loads(out)
    assert [(r["test"], r["n_tokens"], r["batch"]) for r in report["results"]] == [
        ("prefill", 16, 1),
        ("prefill", 32, 1),
        ("decode", 70, 1),
        ("decode", 70, 3),
    ]
    assert all(
        r["slowest"] <= r["tokens_per_s"] * 1.0001 and r["tokens_per_s"] <= r["fastest"] * 1.0001
        for r in report["results"]
    )
    assert report["bandwidth_gb_per_s"] > 1 and report["results"][2]["percent_of_bandwidth"] > 0
    code, out, _ = call(*args)
    assert code == 0 and "decode 70 x 3" in out and "tokens/s" in out
    assert "256" in one_error_line(call(*args, "-p", "257"), "INVALID_REQUEST")
