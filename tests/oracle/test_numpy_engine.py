"""The oracle itself against the reference logits of another program: it must be nearer than any engine's limit.

So are the plans of models.llama, qwen, phi3, gpt2 and gpt_oss, which it interprets.
"""

from __future__ import annotations

import pathlib

import limits
import numpy as np
import pytest

from oracle.numpy_engine import NumpyEngine
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan


@pytest.mark.goldens
@pytest.mark.parametrize("name", [
    "llama-F16", "llama-Q4_K_M", "qwen2-Q4_K_M", "phi3-Q4_K_M", "phi3-swa-Q8_0", "gpt2-Q4_K_M", "gpt-oss-Q4_K_M",
    "gpt-oss-MXFP4",
])  # fmt: skip
def test_oracle_reproduces_the_reference(name: str, goldens_dir: pathlib.Path):
    with np.load(goldens_dir / f"{name}.npz") as z:
        tokens, reference = z["tokens"][0], z["logits"][0]
    n = len(tokens)
    with ModelFile(str(goldens_dir / f"{name}.gguf")) as mf:
        logits = NumpyEngine(mf, plan.build(mf)).run(tokens, np.arange(n), np.zeros(n, int), np.arange(n))
    error = ((logits - reference) ** 2).mean() / (reference**2).mean()
    limit = limits.by_prefix(limits.ORACLE_NMSE, name)
    print(f"{name}: NMSE {error:.3g}, limit {limit:.0e}")
    assert error <= limit
