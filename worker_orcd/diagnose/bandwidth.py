"""What a decode step must read from memory, and how fast the memory of a device can be read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import Engine
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import ops, plan

#: bytes of host memory that the bandwidth test walks through, well past the caches
_HOST_BYTES = 512 << 20
_HOST_ROUNDS = 5


def bytes_per_step(the_plan: plan.Plan, model_file: ModelFile, batch: int, position: int) -> int:
    """Bytes a decode step of `batch` sequences at `position` must read: weights once, their KV cache each.

    Of an embedding that is no output matrix too only the rows looked up count; of experts those expected to be chosen,
    n_expert * (1 - (1 - n_used/n_expert)^batch).
    """
    n_bytes = {name: model_file.tensors[name].nbytes for name in the_plan.weights}
    shares: dict[str, float] = {}
    for op in the_plan.ops:
        if isinstance(op, ops.ExpertMatMul):
            chosen = 1 - (1 - op.n_used / op.n_expert) ** batch
            shares.update({name: chosen for name in (op.weight, op.bias) if name is not None})
    multiplied = {op.weight for op in the_plan.ops if isinstance(op, ops.MatMul)}
    for op in the_plan.ops:
        if isinstance(op, ops.Embed):
            for table in (op.weight, op.positions):
                if table is not None and table not in multiplied:
                    shares[table] = min(1.0, batch / model_file.tensors[table].shape[1])
    weights = sum(n * shares.get(name, 1.0) for name, n in n_bytes.items())
    kv = sum(len(g.layers) * (min(position, g.window) if g.window else position) for g in the_plan.kv_groups)
    return int(weights + batch * kv_blocks.position_bytes(the_plan) * kv)


def measure_bandwidth(engine: Engine, device: str, n_threads: int) -> float | None:
    """GB/s of the device's memory: of a GPU what its engine says (`copy_bandwidth`), of the host what is found here."""
    if device != "cpu":
        measure = getattr(engine, "copy_bandwidth", None)
        return None if measure is None else float(measure())
    return host_bandwidth(n_threads)


def host_bandwidth(n_threads: int) -> float:
    """GB/s that `n_threads` threads read from memory together: the best of some rounds of copying (bytes read and
    written count) and of summing (bytes read count)."""
    n_words = _HOST_BYTES // 8 // n_threads
    sources = [np.ones(n_words, np.uint64) for _ in range(n_threads)]
    targets = [np.empty_like(s) for s in sources]
    pairs = list(zip(sources, targets, strict=True))
    best = 0.0
    for _ in range(_HOST_ROUNDS):
        copying = _together([partial(np.copyto, t, s) for s, t in pairs])
        summing = _together([s.sum for s in sources])
        n_bytes = 8 * n_words * n_threads
        best = max(best, 2 * n_bytes / copying, n_bytes / summing)
    return best / 1e9


def _together(works: list[Callable[[], object]]) -> float:
    """Seconds until all of `works`, begun at once, are done."""
    gate = threading.Barrier(len(works) + 1)

    def work(body: Callable[[], object]) -> None:
        gate.wait()
        body()

    threads = [threading.Thread(target=work, args=(w,)) for w in works]
    for t in threads:
        t.start()
    gate.wait()
    began = time.perf_counter()
    for t in threads:
        t.join()
    return time.perf_counter() - began
