"""What the CUDA engine keeps in device memory: every region with its size, before anything is allocated.

Three arenas: weights (repacked matrices, float32 vectors), the KV cache, and the workspace of a step. Pure arithmetic
over the plan and the engine's sizes. All sizes in bytes, regions 256-byte aligned but for weights. Once an arena is
allocated, `at(address)` gives the same regions with their addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

from worker_orcd.cuda import expert_layout, layout
from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.engine.token_edits import MAX_WORDS
from worker_orcd.models.ops import Attention, ExpertMatMul, MatMul, Rope, Route, Weight
from worker_orcd.models.plan import Plan

ALIGN = 256
#: of matrices, whose packed tiles are multiples of a memory sector; of vectors, which are read 16 bytes at a time
MATRIX_ALIGN, VECTOR_ALIGN = 32, 16
#: output rows of a pass, at least: what a step may have, which is one for each sequence, may be more
OUTPUT_ROWS = 64
#: device memory beside the arenas: kernels, graphs, and what the driver takes for them
RESERVE_BYTES = 32 << 20
#: bytes of a slot's sampling parameters on the device
SLOT_SAMPLING_BYTES = 48
#: int32 words of what was sampled in a slot, `SAMPLING_HISTORY_WORDS`
HISTORY_WORDS = 33
#: device memory through which raw tensor bytes pass on their way into the repacked layout
STAGING_BYTES = 64 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """`nbytes` bytes from `offset` on in an arena that starts at device address `base`, 0: it is not allocated yet."""

    offset: int
    nbytes: int
    base: int = 0

    @property
    def address(self) -> int:
        """Where it is on the device."""
        if not self.base:
            raise ValueError("the region's arena is not allocated")
        return self.base + self.offset


@dataclass(frozen=True)
class Weights:
    """The arena of the weights.

    Attributes:
        nbytes: of the whole arena.
        tensors: by name, repacked matrices and float32 vectors.
        inv_freq: float32, the rotary frequency tables of `inv_freq_tables`.
    """

    nbytes: int
    tensors: dict[str, Region]
    inv_freq: tuple[Region, ...]

    def at(self, base: int) -> Weights:
        """The arena at device address `base`."""
        return _moved(self, base)


@dataclass(frozen=True)
class KvCache:
    """The arena of the KV cache, a region for each layer; see csrc/params/kv_cache.h."""

    nbytes: int
    layers: tuple[Region, ...]

    def at(self, base: int) -> KvCache:
        """The arena at device address `base`."""
        return _moved(self, base)


@dataclass(frozen=True)
class Routing:
    """Scratch of layers of experts: router logits, 1 / root of the norms before, which pairs each expert has
    (`expert_layout.list_parts`), and what blocks count: those of a router, and the results of each row tile."""

    partial: Region
    roots: Region
    arrived: Region
    mixed: Region
    decode_list: Region
    prefill_list: Region


@dataclass(frozen=True)
class Sampling:
    """Scratch and state of sampling; the names are those of csrc/params/sample_params.h.

    `slots` and `positions` are int32 [output_rows], those of the output rows where a step is no decode step.
    """

    best: Region
    arrived: Region
    group_keys: Region
    group_weights: Region
    bin_weights: Region
    bin_counts: Region
    samples: Region
    edits: Region
    history: Region
    seen: Region
    counts: Region
    slots: Region
    positions: Region
    done: Region
    step: Region


@dataclass(frozen=True)
class Workspace:
    """The arena of a step. Rows are `max_batch_tokens`, rounded up to 128.

    Attributes:
        nbytes: of the whole arena.
        buffers: float32 [rows or output_rows, width], the plan's activations, by name.
        tokens, positions, slots, output_indices: int32 [rows].
        rope_tables: int32 [max_seqs].
        tiles: `AttentionTile` [rows + max_seqs].
        block_tables: int32 [n_kv_groups, max_seqs, max_blocks_per_seq].
        attention_partial, attention_counters: scratch of decode attention.
        converted: rows as `convert_rows` leaves them for products, each as wide as the widest input.
        routing: None where no layer has experts.
        sampling: of output rows.
    """

    nbytes: int
    buffers: dict[str, Region]
    tokens: Region
    positions: Region
    slots: Region
    output_indices: Region
    rope_tables: Region
    tiles: Region
    block_tables: Region
    attention_partial: Region
    attention_counters: Region
    converted: Region
    routing: Routing | None
    sampling: Sampling

    def at(self, base: int) -> Workspace:
        """The arena at device address `base`."""
        return _moved(self, base)


class Arenas(NamedTuple):
    """The three arenas of an engine."""

    weights: Weights
    kv: KvCache
    workspace: Workspace


class SampleScratch(NamedTuple):
    """Bytes of sampling's scratch for one output row."""

    best: int
    arrived: int
    group_keys: int
    group_weights: int
    bin_weights: int
    bin_counts: int


def _moved(value: T, base: int) -> T:
    """A value of the arenas' types with every region in it at `base`."""
    moved: Any = value
    if isinstance(value, Region):
        moved = replace(value, base=base)
    elif isinstance(value, dict):
        moved = {name: _moved(region, base) for name, region in value.items()}
    elif isinstance(value, tuple):
        moved = tuple(_moved(region, base) for region in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = type(value)(**{f.name: _moved(getattr(value, f.name), base) for f in fields(value)})
    return moved  # type: ignore[no-any-return]


class _End:
    """The end of an arena whose regions are being laid out one after the other."""

    def __init__(self) -> None:
        self.nbytes = 0

    def add(self, nbytes: int, align: int = ALIGN) -> Region:
        """The next region."""
        self.nbytes = _aligned(self.nbytes, align) if self.nbytes else 0
        region = Region(self.nbytes, nbytes)
        self.nbytes += _aligned(nbytes, align)
        return region


def _aligned(nbytes: int, align: int = ALIGN) -> int:
    """What a region takes of its arena."""
    return -(-max(nbytes, 1) // align) * align


def weight_bytes(w: Weight) -> int:
    """Device bytes of a weight: repacked, or float32 for vectors."""
    if w.kind in ("vector", "expert_vectors"):
        return 4 * math.prod(w.shape)
    experts = w.shape[2] if w.kind == "experts" else 1
    return experts * layout.packed_bytes(w.type_id, w.shape[1], w.shape[0])


def weights_arena(plan: Plan) -> Weights:
    """All weights of the plan, then the rotary frequency tables.

    Matrices come before vectors, without gaps: those of one type that follow one another in the plan, and their biases,
    lie as one would (q, k and v).
    """
    end = _End()
    vectors = [w for w in plan.weights.values() if w.kind in ("vector", "expert_vectors")]
    others = [w for w in plan.weights.values() if w.kind not in ("vector", "expert_vectors")]
    tensors = {w.name: end.add(weight_bytes(w), MATRIX_ALIGN) for w in others}
    tensors |= {w.name: end.add(weight_bytes(w), VECTOR_ALIGN) for w in vectors}
    inv_freq = tuple(end.add(4 * len(table)) for table in inv_freq_tables(plan))
    return Weights(end.nbytes, tensors, inv_freq)


def inv_freq_tables(plan: Plan) -> tuple[tuple[float, ...], ...]:
    """The distinct rotary frequency tables: the frequencies, then those of long sequences if there are."""
    return tuple(dict.fromkeys(op.inv_freq + op.inv_freq_long for op in plan.ops if isinstance(op, Rope)))


def kv_block_bytes(plan: Plan) -> int:
    """float16 K and V of one block of one layer."""
    return kv_blocks.layer_block_bytes(plan)


def kv_arena(plan: Plan, config: EngineConfig) -> KvCache:
    """One region for each layer."""
    end, block = _End(), kv_block_bytes(plan)
    layers = tuple(end.add(config.n_blocks[plan.kv_group_of[layer]] * block) for layer in range(plan.n_layer))
    return KvCache(end.nbytes, layers)


def padded_batch_tokens(config: EngineConfig) -> int:
    """Rows that activations and row tables have room for: `max_batch_tokens` in whole tiles of the prefill kernels."""
    return -(-config.max_batch_tokens // 128) * 128


def output_rows(config: EngineConfig) -> int:
    """Most output rows of a pass: of decode steps too, which are captured for some numbers of rows only."""
    return max(OUTPUT_ROWS, -(-config.max_seqs // 32) * 32)


def workspace_arena(
    plan: Plan, config: EngineConfig, max_splits: dict[int, int], heads: int, split_rows: int, sample: SampleScratch
) -> Workspace:
    """Activations, row tables and scratch of one step.

    Args:
        plan, config: the model and the engine's sizes.
        max_splits: decode attention splits by window.
        heads: blocks in y of a decode attention launch.
        split_rows: most rows of a decode attention launch whose splits go through the workspace.
        sample: scratch of sampling.
    """
    end, rows, n_out = _End(), padded_batch_tokens(config), output_rows(config)
    split_rows = min(split_rows, config.max_seqs)
    attention = [op for op in plan.ops if isinstance(op, Attention)]
    partial = max(op.n_head * max_splits[op.window] * (op.head_dim + 4) for op in attention)
    products = [op for op in plan.ops if isinstance(op, MatMul | ExpertMatMul)]
    # the order of the fields here is that of the regions
    workspace = Workspace(
        nbytes=0,
        buffers={b.name: end.add((rows if b.rows == "tokens" else n_out) * b.width * 4) for b in plan.buffers.values()},
        tokens=end.add(rows * 4),
        positions=end.add(rows * 4),
        slots=end.add(rows * 4),
        output_indices=end.add(rows * 4),
        rope_tables=end.add(config.max_seqs * 4),
        tiles=end.add((rows + config.max_seqs) * 16),
        block_tables=end.add(len(plan.kv_groups) * config.max_seqs * config.max_blocks_per_seq * 4),
        attention_partial=end.add(split_rows * partial * 4),
        attention_counters=end.add(split_rows * heads * 4),
        converted=end.add(max(_converted_bytes(plan, op, rows) for op in products)),
        routing=_routing(end, plan, rows),
        sampling=Sampling(
            best=end.add(n_out * sample.best),
            arrived=end.add(n_out * sample.arrived),
            group_keys=end.add(n_out * sample.group_keys),
            group_weights=end.add(n_out * sample.group_weights),
            bin_weights=end.add(n_out * sample.bin_weights),
            bin_counts=end.add(n_out * sample.bin_counts),
            samples=end.add(config.max_seqs * SLOT_SAMPLING_BYTES),
            edits=end.add(config.max_seqs * MAX_WORDS * 4),
            history=end.add(config.max_seqs * HISTORY_WORDS * 4),
            seen=end.add(config.max_seqs * -(-plan.n_vocab // 32) * 4),
            counts=end.add(config.max_seqs * plan.n_vocab * 4),
            slots=end.add(n_out * 4),
            positions=end.add(n_out * 4),
            done=end.add(4),
            step=end.add(8),
        ),
    )
    return replace(workspace, nbytes=end.nbytes)


def _routing(end: _End, plan: Plan, rows: int) -> Routing | None:
    routes = [(op.n_expert, op.n_used) for op in plan.ops if isinstance(op, Route)]
    if not routes:
        return None
    n_expert, n_used = (max(sizes) for sizes in zip(*routes, strict=True))
    return Routing(
        partial=end.add(expert_layout.route_partial_bytes(rows, n_expert)),
        roots=end.add(4 * rows),
        arrived=end.add(4),
        mixed=end.add(4 * max(layout.n_row_tiles(op.n_out) for op in plan.ops if isinstance(op, ExpertMatMul))),
        decode_list=end.add(expert_layout.list_bytes(layout.MATVEC_ROWS * n_used, n_expert)),
        prefill_list=end.add(expert_layout.list_bytes(rows * n_used, n_expert)),
    )


def _converted_bytes(plan: Plan, op: MatMul | ExpertMatMul, rows: int) -> int:
    """Bytes of the converted inputs of a product of `rows` rows."""
    one = layout.x_f16_bytes(plan.weights[op.weight].shape[0])
    if isinstance(op, MatMul):
        return (rows + layout.MATMUL_TILE_ROWS) * one  # decode rows come before the whole tiles of the prefill kernels
    inputs = (rows + layout.MATMUL_TILE_ROWS) * (op.n_used if op.per_slot else 1)
    return max(inputs, expert_layout.n_places(rows * op.n_used, op.n_expert)) * one


def staging_bytes(workspace: Workspace) -> int:
    """Pinned host memory through which the row tables of a step pass: each table once, the output rows in pieces."""
    w = workspace
    tables = (w.tokens, w.positions, w.slots, w.output_indices, w.tiles, w.block_tables, w.rope_tables,
              w.sampling.slots, w.sampling.positions)  # fmt: skip
    # or those of a slot that is set
    return max(sum(_aligned(table.nbytes) for table in tables) + ALIGN, _aligned(SLOT_SAMPLING_BYTES) + 4 * MAX_WORDS)
