"""`worker-orcd bench` (diagnose.bench): it measures what was asked, and counts the bytes that a step reads."""

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


def test_bytes_per_step_counts_what_is_read(goldens_dir):
    from worker_orcd.diagnose import bench
    from worker_orcd.engine import kv_blocks
    from worker_orcd.gguf.model_file import ModelFile
    from worker_orcd.models import plan

    with ModelFile(goldens_dir / "qwen2-Q8_0.gguf") as mf:
        p = plan.build(mf)
        tied = "output.weight" not in mf.tensors
        all_weights = sum(mf.tensors[n].nbytes for n in p.weights)
        embedding = mf.tensors["token_embd.weight"]
        expected = all_weights - (0 if tied else embedding.nbytes - embedding.nbytes // embedding.shape[1])
        assert bench.bytes_per_step(p, mf, 1, 0) == expected
        kv = bench.bytes_per_step(p, mf, 2, 10) - bench.bytes_per_step(p, mf, 2, 0)
        assert kv == 20 * p.n_layer * kv_blocks.position_bytes(p)
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as mf:  # 4 of 8 experts
        p = plan.build(mf)
        experts = sum(mf.tensors[n].nbytes for n, w in p.weights.items() if w.kind.startswith("expert"))
        one, many = (bench.bytes_per_step(p, mf, b, 0) for b in (1, 100))
        assert experts * 0.49 < many - one < experts * 0.51 + 100 * 1000
