"""Making CPU engines and batches for tests: blocks are handed out once, spread over the pool so that order shows."""

from __future__ import annotations

import numpy as np

from worker_orcd._cpu import CpuEngine, cpu_features
from worker_orcd.engine.protocol import BLOCK_SIZE, Batch, EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan as P

ISAS = cpu_features()["available"]
#: tensor types that are multiplied as integer codes on every instruction set but the baseline, with so many outputs
CODE_TYPES = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"}
LEAST_CODE_ROWS = 16


def sampling(temperature=0.0, seed=0, **numbers) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, **numbers)


def make_engine(model_file, plan, n_threads=2, max_seqs=4, max_batch_tokens=256, context_length=192) -> CpuEngine:
    n_blocks = -(-context_length // BLOCK_SIZE)
    config = EngineConfig(max_seqs, max_batch_tokens, context_length, (max_seqs * n_blocks,) * len(plan.kv_groups))
    engine = CpuEngine(model_file, plan, config, n_threads)
    for g in range(len(plan.kv_groups)):
        order = np.random.default_rng(g).permutation(max_seqs * n_blocks)
        engine.block_tables[g] = order.reshape(max_seqs, n_blocks)
    return engine


def open_engine(path, **kwargs) -> CpuEngine:
    model_file = ModelFile(str(path))
    return make_engine(model_file, P.build(model_file), **kwargs)


def rows(*parts, out="all") -> Batch:
    """A batch of (slot, first position, tokens) parts; `out`: "all" rows, the "last" of each part, or "none"."""
    tokens = np.concatenate([np.asarray(t, np.int32) for _, _, t in parts])
    positions = np.concatenate([np.arange(p, p + len(t), dtype=np.int32) for _, p, t in parts])
    slots = np.concatenate([np.full(len(t), s, np.int32) for s, _, t in parts])
    ends = np.cumsum([len(t) for _, _, t in parts]) - 1
    output_indices = {"all": np.arange(len(tokens)), "last": ends, "none": ends[:0]}[out].astype(np.int32)
    return Batch(tokens, positions, slots, 0, output_indices)


def prefill(engine, slot, tokens, chunk) -> np.ndarray:
    """Logits of all positions of a prompt given in chunks."""
    starts = range(0, len(tokens), chunk)
    return np.concatenate([engine.forward(rows((slot, i, tokens[i : i + chunk]))) for i in starts])
