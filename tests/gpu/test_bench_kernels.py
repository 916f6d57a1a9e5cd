"""`bench --kernels` on a GPU: parts of a step run by themselves harm nothing, and their times are times."""

from __future__ import annotations

import numpy as np
import pytest

from worker_orcd.cuda import lowering
from worker_orcd.diagnose import bench_kernels
from worker_orcd.diagnose.bench import Bench

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("how", lowering.LOWERINGS)
@pytest.mark.parametrize("name", ["llama-Q4_K_M", "gpt2-Q8_0", "gpt-oss-MXFP4"])
def test_an_engine_draws_the_same_tokens_after_its_parts_were_measured(name, how, goldens_dir, monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_LOWERING", how)
    monkeypatch.setattr(bench_kernels, "REPLAYS", 3)
    monkeypatch.setattr(bench_kernels, "EVICT_BYTES", 1 << 20)
    with Bench(str(goldens_dir / f"{name}.gguf"), "cuda:0", 48, 12) as bench:
        before = [bench.decode(8, n)[1] for n in (1, 3, 12)]
        report = bench_kernels.measure(bench, (3, 12), 24, 1000.0)
        after = [bench.decode(8, n)[1] for n in (1, 3, 12)]
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)
    for step in report.steps:
        assert step.us > 0 and all(kind.us > 0 for kind in step.kinds)
        assert sum(kind.launches for kind in step.kinds) == step.launches
    print(bench_kernels.as_text(report))
