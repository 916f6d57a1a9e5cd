"""Lowering: a plan rewritten into fewer, larger ops for the CUDA engine. What is computed stays the same.

Five rewrites, each local to neighbouring ops:
- products of one weight type that read the same input become one `MatMulGroup` (q, k and v; gate and up);
- expert products of one weight type that read the same input become one `ExpertGroup` (gate and up);
- a product whose result is only added to the residual stream adds it itself (`residual`);
- rotation of q and k and the cache write become one `RopeKv`;
- that and the attention after it become one `RopeKvAttention`.
With `fuse=False` every op stays alone, so that any op's output can be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from worker_orcd.models.ops import Add, Attention, ExpertMatMul, KvWrite, MatMul, Op, Rope, View
from worker_orcd.models.plan import Plan


@dataclass(frozen=True)
class MatMulGroup(Op):
    """out_i[r] (+)= W_i inp[r] (+ bias_i) for each part; with `residual` the result is added to `out`."""

    parts: tuple[MatMul, ...]
    inp: View
    residual: bool = False


@dataclass(frozen=True)
class ExpertGroup(Op):
    """The products of `parts`: of one input with the same experts, matrices of one type and shape."""

    parts: tuple[ExpertMatMul, ...]


@dataclass(frozen=True)
class RopeKv(Op):
    """Rotate q and k in place (where `rope_q` is there), then store k and v in the cache."""

    rope_q: Rope | None
    rope_k: Rope | None
    kv: KvWrite


@dataclass(frozen=True)
class RopeKvAttention(Op):
    """`rope`, then `attention` of the same q and layer; q and k need not stand rotated in their views after it."""

    rope: RopeKv
    attention: Attention


def lower(plan: Plan, fuse: bool = True, max_group: int = 4) -> tuple[Op, ...]:
    """The ops the CUDA engine runs, in order.

    Args:
        plan: the plan.
        fuse: False keeps one op per plan op (products become groups of one).
        max_group: most products in one group.
    """
    if not fuse:
        return tuple(_alone(op) for op in plan.ops)
    out: list[Op] = []
    ops, i = plan.ops, 0
    while i < len(ops):
        op = ops[i]
        if isinstance(op, MatMul):
            group = [op]
            i += 1
            while len(group) < max_group and i < len(ops) and _joins(after := ops[i], plan, op):
                group.append(after)
                i += 1
            added = ops[i] if len(group) == 1 and i < len(ops) else None
            if isinstance(added, Add) and added.inp == op.out and not _read_again(ops, i + 1, op.out):
                into = MatMul(op.name, op.weight, op.bias, op.inp, added.out)
                out.append(MatMulGroup(op.name, (into,), op.inp, residual=True))
                i += 1
            else:
                out.append(MatMulGroup(op.name, tuple(group), op.inp))
        elif isinstance(op, ExpertMatMul):
            pair = (op, other) if i + 1 < len(ops) and _pairs(other := ops[i + 1], plan, op) else (op,)
            out.append(ExpertGroup(op.name, pair))
            i += len(pair)
        elif (found := _rotations(ops[i : i + 3])) is not None:
            out.append(found)
            i += 3
        elif isinstance(op, KvWrite):
            out.append(RopeKv(op.name, None, None, op))
            i += 1
        elif isinstance(op, Attention) and out and _feeds(before := out[-1], op):
            out[-1] = RopeKvAttention(op.name, before, op)
            i += 1
        else:
            out.append(op)
            i += 1
    return tuple(out)


def _alone(op: Op) -> Op:
    """The op as it is, in the form that engines run."""
    if isinstance(op, MatMul):
        return MatMulGroup(op.name, (op,), op.inp)
    return ExpertGroup(op.name, (op,)) if isinstance(op, ExpertMatMul) else op


def _rotations(ops: tuple[Op, ...]) -> RopeKv | None:
    """Rotation of q, of k and the cache write as one, where `ops` are these."""
    match ops:
        case (Rope() as q, Rope() as k, KvWrite() as kv):
            return RopeKv(kv.name, q, k, kv)
    return None


def _feeds(before: Op, op: Attention) -> TypeGuard[RopeKv]:
    """Whether `before` rotates and writes to the cache what attention takes."""
    if not isinstance(before, RopeKv):
        return False
    q, kv = before.rope_q, before.kv
    same_q = q is None or (q.x, q.n_head) == (op.q, op.n_head)
    return same_q and (kv.layer, kv.n_head_kv, kv.head_dim) == (op.layer, op.n_head_kv, op.head_dim)


def _pairs(op: Op, plan: Plan, first: ExpertMatMul) -> TypeGuard[ExpertMatMul]:
    """Whether `op` can share a launch with `first`: same experts, input and shape, same weight type."""
    if not isinstance(op, ExpertMatMul) or (op.ids, op.inp, op.per_slot) != (first.ids, first.inp, first.per_slot):
        return False
    a, b = plan.weights[first.weight], plan.weights[op.weight]
    return (a.type_id, a.shape) == (b.type_id, b.shape)


def _joins(op: Op, plan: Plan, first: MatMul) -> TypeGuard[MatMul]:
    """Whether `op` can share a launch with `first`: same input, same weight type."""
    if not isinstance(op, MatMul) or op.inp != first.inp:
        return False
    return plan.weights[op.weight].type_id == plan.weights[first.weight].type_id


def _read_again(ops: tuple[Op, ...], start: int, view: View) -> bool:
    """Whether an op from `start` on reads columns of `view` before some op has written them anew."""
    for op in ops[start:]:
        fields = vars(op)
        written = fields["out"] if "out" in fields and not isinstance(op, Add) else None
        for name, value in fields.items():
            if isinstance(value, View) and name != "out" and value.buf == view.buf and _overlap(value, view):
                return True
        if isinstance(op, Add) and op.out.buf == view.buf and _overlap(op.out, view):
            return True
        if (
            written is not None
            and written.buf == view.buf
            and written.offset <= view.offset
            and (written.offset + written.width >= view.offset + view.width)
        ):
            return False
    return False


def _overlap(a: View, b: View) -> bool:
    return a.offset < b.offset + b.width and b.offset < a.offset + a.width
