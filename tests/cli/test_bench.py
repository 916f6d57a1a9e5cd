"""`worker-orcd bench` (diagnose.bench): it measures what was asked, on tokens that differ as those of requests do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.command_line import one_error_line
from helpers.gguf_forge import U32
from helpers.golden_forge import take_apart

from worker_orcd.diagnose.bench import Bench, distinct_share
from worker_orcd.engine.protocol import Batch
from worker_orcd.models.ops import Route


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
    assert report["rows"] == "distinct"
    assert [r["distinct"] for r in report["results"][:3]] == [None, None, 1.0]
    assert 0.8 < report["results"][3]["distinct"] <= 1
    code, out, _ = call(*args)
    assert code == 0 and "decode 70 x 3" in out and "tokens/s" in out
    assert "256" in one_error_line(call(*args, "-p", "257"), "INVALID_REQUEST")


def test_kernels_are_those_of_a_gpu(call, golden):
    args = ["bench", "--model", golden, "--device", "cpu", "--kernels"]
    assert "measures launches of a GPU, and the device is the CPU" in one_error_line(call(*args), "INVALID_REQUEST")
    assert "--kernels measures a decode step" in one_error_line(call(*args, "-n", "0"), "INVALID_REQUEST")


def test_a_window_that_masks_nothing_of_what_is_measured(call, goldens_dir, tmp_path):
    """As for `LLM`: a file that asks for a window its architecture has not is right up to that many positions."""
    forge = take_apart(goldens_dir / "llama-Q4_0.gguf").put("llama.attention.sliding_window", U32, 64)
    (tmp_path / "m.gguf").write_bytes(forge.build())
    args = ["bench", "--model", str(tmp_path / "m.gguf"), "--device", "cpu", "-n", "0", "--repeat", "1"]
    assert call(*args, "-p", "64")[0] == 0
    assert "at most 64 positions" in one_error_line(call(*args, "-p", "65"), "MODEL_LOAD_FAILED")


@pytest.mark.parametrize("batch", [2, 8])
def test_the_sequences_of_a_batch_have_tokens_and_experts_of_their_own(goldens_dir, batch):
    n_steps = 70  # past one call of the engine
    with Bench(str(goldens_dir / "gpt-oss-MXFP4.gguf"), "cpu", n_steps, batch) as bench:
        _, alone = bench.decode(n_steps)
        seconds, fed = bench.decode(n_steps, batch)
        assert seconds > 0 and fed.shape == (n_steps, batch) and fed.dtype == np.int32
        assert len(set(fed[0].tolist())) == batch and distinct_share(fed) > 0.9
        np.testing.assert_array_equal(fed[:, 0], alone[:, 0])  # the first goes on as it does alone
        np.testing.assert_array_equal(fed, bench.decode(n_steps, batch)[1])
        routes = [op for op in bench.plan.ops if isinstance(op, Route)]
        assert routes
        for step in (0, 1, n_steps - 1):
            at = np.full(batch, step, np.int32)
            rows = Batch(fed[step], at, np.arange(batch, dtype=np.int32), batch, np.arange(batch, dtype=np.int32))
            for op in routes:
                ids = bench.engine.forward(rows, op.name)[:, : op.n_used]
                chosen = {frozenset(row) for row in ids.tolist()}
                assert all(0 <= i < op.n_expert for row in chosen for i in row)
                assert len(chosen) > 1, f"{op.name}, step {step}: every sequence has the experts {chosen}"


def test_more_sequences_than_tokens_still_begin_as_differently_as_they_can(golden):
    with Bench(str(golden), "cpu", 2, 600) as bench:
        first = bench.decode(1, 600)[1][0]
        assert len(set(first.tolist())) == bench.plan.n_vocab == 512


def test_distinct_share():
    assert distinct_share(np.array([[1, 1, 1, 1], [1, 2, 3, 4]])) == (0.25 + 1) / 2
