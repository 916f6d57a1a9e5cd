"""What the CUDA engine keeps in device memory: every region with its size, before anything is allocated.

Three arenas: weights (repacked matrices, float32 vectors), the KV cache, and the workspace of a step. Pure arithmetic
over the plan and the engine's sizes; knows no driver. All sizes in bytes, every region 256-byte aligned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from worker_orcd.cuda import expert_layout, layout
from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.models.ops import Attention, ExpertMatMul, MatMul, Op, Rope, Route, Weight
from worker_orcd.models.plan import Plan

ALIGN = 256
#: most rows of one matvec launch, and of the output rows of one pass
MAX_OUT = 64
#: device memory beside the arenas: kernels, graphs, and what the driver takes for them
RESERVE_BYTES = 32 << 20
#: bytes of a slot's sampling parameters on the device
SAMPLE_SLOT_BYTES = 32
#: device memory through which raw tensor bytes pass on their way into the repacked layout
STAGING_BYTES = 64 << 20


@dataclass
class Arena:
    """Named regions laid out one after the other."""

    name: str
    offsets: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, name: str, nbytes: int) -> None:
        """Append a region of `nbytes`."""
        if name in self.offsets:
            raise ValueError(f"{self.name}: region {name!r} twice")
        self.offsets[name] = self.nbytes
        self.nbytes += -(-max(nbytes, 1) // ALIGN) * ALIGN


def weight_bytes(w: Weight) -> int:
    """Device bytes of a weight: repacked, or float32 for vectors."""
    if w.kind in ("vector", "expert_vectors"):
        n = 4
        for size in w.shape:
            n *= size
        return n
    experts = w.shape[2] if w.kind == "experts" else 1
    return experts * layout.packed_bytes(w.type_id, w.shape[1], w.shape[0])


def weights_arena(plan: Plan) -> Arena:
    """All weights of the plan, and the rotary frequency tables as ``inv_freq:<op>`` (equal tables once)."""
    arena = Arena("weights")
    for w in plan.weights.values():
        arena.add(w.name, weight_bytes(w))
    for key, inv_freq in inv_freq_tables(plan).items():
        arena.add(f"inv_freq:{key}", 4 * len(inv_freq))
    return arena


def inv_freq_tables(plan: Plan) -> dict[int, tuple[float, ...]]:
    """The distinct rotary frequency tables, by number: the frequencies, then those of long sequences if there are."""
    return dict(enumerate(dict.fromkeys(op.inv_freq + op.inv_freq_long for op in plan.ops if isinstance(op, Rope))))


def kv_block_bytes(plan: Plan) -> int:
    """float16 K and V of one block of one layer."""
    return kv_blocks.layer_block_bytes(plan)


def kv_arena(plan: Plan, config: EngineConfig) -> Arena:
    """One region per layer, ``layer:<i>``."""
    arena = Arena("kv")
    for layer in range(plan.n_layer):
        arena.add(f"layer:{layer}", config.n_blocks[plan.kv_group_of[layer]] * kv_block_bytes(plan))
    return arena


def workspace_arena(plan: Plan, config: EngineConfig, max_splits: dict[int, int], heads: int,
                    sample_bytes: dict[str, int]) -> Arena:  # fmt: skip
    """Activations, row tables and scratch of one step.

    Args:
        plan, config: the model and the engine's sizes.
        max_splits: decode attention splits by window.
        heads: blocks in y of a decode attention launch.
        sample_bytes: scratch of sampling per output row, by name.
    """
    arena = Arena("workspace")
    rows = -(-config.max_batch_tokens // 128) * 128
    for b in plan.buffers.values():
        arena.add(f"buffer:{b.name}", (rows if b.rows == "tokens" else MAX_OUT) * b.width * 4)
    arena.add("tokens", rows * 4)
    arena.add("positions", rows * 4)
    arena.add("slots", rows * 4)
    arena.add("output_indices", rows * 4)
    arena.add("rope_tables", config.max_seqs * 4)
    arena.add("tiles", (rows + config.max_seqs) * 16)
    groups = len(plan.kv_groups)
    arena.add("block_tables", groups * config.max_seqs * config.max_blocks_per_seq * 4)
    attention = [op for op in plan.ops if isinstance(op, Attention)]
    partial = max(op.n_head * max_splits[op.window] * (op.head_dim + 4) for op in attention)
    arena.add("attention_partial", config.max_seqs * partial * 4)
    arena.add("attention_counters", config.max_seqs * heads * 4)
    inputs = [_converted(plan, op) for op in plan.ops if isinstance(op, MatMul | ExpertMatMul)]
    arena.add("x_split", MAX_OUT * max(n * split for n, split, _ in inputs))
    arena.add("x_half", rows * max(n * half for n, _, half in inputs))
    arena.add("x_half_scale", rows * max(n for n, _, _ in inputs) * 4)
    routes = [(op.n_expert, op.n_used) for op in plan.ops if isinstance(op, Route)]
    if routes:
        n_expert, n_used = (max(sizes) for sizes in zip(*routes, strict=True))
        arena.add("route_partial", expert_layout.route_partial_bytes(rows, n_expert))
        arena.add("decode_list", expert_layout.list_bytes(MAX_OUT * n_used, n_expert))
        arena.add("prefill_list", expert_layout.list_bytes(rows * n_used, n_expert))
    for name, nbytes in sample_bytes.items():
        arena.add(name, MAX_OUT * nbytes)
    arena.add("samples", config.max_seqs * SAMPLE_SLOT_BYTES)
    arena.add("seen", config.max_seqs * -(-plan.n_vocab // 32) * 4)
    arena.add("out_slots", MAX_OUT * 4)
    arena.add("out_positions", MAX_OUT * 4)
    arena.add("done", 4)
    arena.add("step", 8)
    arena.add("failed", 4)
    return arena


def _converted(plan: Plan, op: Op) -> tuple[int, int, int]:
    """Inputs that a row has in a product, and bytes of each as converted for decode and for prompts."""
    w = plan.weights[op.weight]
    n = op.n_used if isinstance(op, ExpertMatMul) and op.per_slot else 1
    return n, layout.x_split_bytes(w.type_id, w.shape[0]), layout.x_f16_bytes(w.type_id, w.shape[0])


def staging_bytes(workspace: Arena) -> int:
    """Pinned host memory through which the row tables of a step pass: each table once, the output rows in pieces."""
    names = ("tokens", "positions", "slots", "output_indices", "tiles", "block_tables", "rope_tables", "out_slots",
             "out_positions")  # fmt: skip
    ends = sorted([*workspace.offsets.values(), workspace.nbytes])
    return sum(ends[ends.index(workspace.offsets[n]) + 1] - workspace.offsets[n] for n in names) + ALIGN
