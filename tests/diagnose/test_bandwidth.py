"""The bytes that a decode step reads, counted by hand: weights, rows of the embedding, the KV cache, chosen experts."""

from __future__ import annotations

from worker_orcd.diagnose.bandwidth import bytes_per_step
from worker_orcd.engine import kv_blocks
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan


def test_bytes_per_step_counts_what_is_read(goldens_dir):
    with ModelFile(goldens_dir / "qwen2-Q8_0.gguf") as mf:
        p = plan.build(mf)
        tied = "output.weight" not in mf.tensors
        all_weights = sum(mf.tensors[n].nbytes for n in p.weights)
        embedding = mf.tensors["token_embd.weight"]
        expected = all_weights - (0 if tied else embedding.nbytes - embedding.nbytes // embedding.shape[1])
        assert bytes_per_step(p, mf, 1, 0) == expected
        kv = bytes_per_step(p, mf, 2, 10) - bytes_per_step(p, mf, 2, 0)
        assert kv == 20 * p.n_layer * kv_blocks.position_bytes(p)
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as mf:  # 4 of 8 experts
        p = plan.build(mf)
        experts = sum(mf.tensors[n].nbytes for n, w in p.weights.items() if w.kind.startswith("expert"))
        one, many = (bytes_per_step(p, mf, b, 0) for b in (1, 100))
        assert experts * 0.49 < many - one < experts * 0.51 + 100 * 1000
