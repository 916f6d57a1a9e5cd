"""Activations after each layer of a model, from the engine alone.

An engine is stopped after the op that ends a layer and gives the residual stream. Each op is a run of its own
from the first one on, so the cost grows with the square of the number of layers: only the first tokens of few prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np

from worker_orcd.engine.kv_blocks import blocks_of
from worker_orcd.engine.protocol import Batch, Engine, EngineConfig
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.runtime import devices

#: most tokens of a prompt that are compared
MAX_TOKENS: Final = 256


def layer_ops(the_plan: plan.Plan) -> list[str]:
    """Ops after which the residual stream holds a finished layer: the embedding, then one for each layer."""
    return ["embed"] + [op.name for op in the_plan.ops if op.name.endswith(".ffn_residual")]


@contextmanager
def open_engine(
    model_file: ModelFile, device: str, n_positions: int, n_threads: int = 0
) -> Iterator[tuple[Engine, plan.Plan]]:
    """An engine for one sequence of up to `n_positions` in one step, with its plan; closed at the end of the block.

    Args:
        model_file: stays open and belongs to the caller.
        device: a resolved device.
    """
    the_plan = plan.build(model_file)
    per_sequence = blocks_of(n_positions)
    config = EngineConfig(1, max(n_positions, 1), n_positions, tuple(per_sequence for _ in the_plan.kv_groups))
    engine = devices.open_engine(
        device, model_file, the_plan, config, n_threads=n_threads, chunk_bytes=1 << 20, progress=lambda done: None
    )
    try:
        engine.block_tables[:, 0, :per_sequence] = np.arange(per_sequence, dtype=np.int32)
        yield engine, the_plan
    finally:
        engine.close()


def layer_activations(
    model_file: ModelFile, device: str, prompts: Sequence[Sequence[int]], n_threads: int = 0
) -> dict[str, np.ndarray]:
    """The residual stream after each layer.

    Args:
        prompts: token ids; of each the first `MAX_TOKENS` count.

    Returns:
        op name -> float32 [tokens of all prompts, n_embd], in the order of the layers.
    """
    cut = [np.array(ids[:MAX_TOKENS], np.int32) for ids in prompts]
    found: dict[str, list[np.ndarray]] = {}
    with open_engine(model_file, device, max(map(len, cut)), n_threads) as (engine, the_plan):
        for ids in cut:
            n = len(ids)
            engine.rope_tables[0] = the_plan.rope_table(n)
            batch = Batch(ids, np.arange(n, dtype=np.int32), np.zeros(n, np.int32), 0, np.array([n - 1], np.int32))
            for op in layer_ops(the_plan):
                found.setdefault(op, []).append(engine.forward(batch, op))
    return {op: np.concatenate(parts) for op, parts in found.items()}
