"""Lowering: a plan rewritten into fewer, larger ops for the CUDA engine. What is computed stays the same.

Rewrites, each local to neighbouring ops:
- products that read the same input become one `MatMulGroup` (q, k and v; gate and up), and take in
  - the norm that makes their input, where nothing else reads it,
  - the gated activation of their two results, where nothing else reads these,
  - or, for a single one, the addition of its result to the residual stream;
- the norm before a router and its experts becomes part of the router, `NormRoute`, where nothing else reads it;
- expert products of one weight type that read the same input become one `ExpertGroup` (gate and up), with the gated
  activation of their results, or (down) with the sum over experts that is added to the residual stream;
- rotation of q and k and the cache write become one `RopeKv`;
- that and the attention after it become one `RopeKvAttention`.
With `fuse=False` every op stays alone, so that any op's output can be looked at; `WORKER_ORCD_LOWERING=plain` runs an
engine so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeGuard

from worker_orcd.cuda import layout
from worker_orcd.errors import InvalidRequest
from worker_orcd.models.ops import (
    Add,
    Attention,
    ExpertMatMul,
    ExpertSum,
    Glu,
    KvWrite,
    MatMul,
    Norm,
    Op,
    Rope,
    Route,
    View,
)
from worker_orcd.models.plan import Plan

#: the environment variable that picks a lowering, and its values, the default first
VARIABLE, LOWERINGS = "WORKER_ORCD_LOWERING", ("fused", "plain")
#: that which picks the kernels for many rows, where a GPU has both kinds
MANY_ROWS_VARIABLE, MANY_ROWS = "WORKER_ORCD_MANY_ROWS", ("wgmma", "mma")


@dataclass(frozen=True)
class MatMulGroup(Op):
    """out_i[r] (+)= W_i h[r] (+ bias_i) for each part, h[r] = inp[r] or norm(inp[r]).

    With `residual` the result is added to `out`. With `glu` what is stored is its output: of the two parts' results or,
    where there is one part, of the two halves of its result.
    """

    parts: tuple[MatMul, ...]
    inp: View
    norm: Norm | None = None
    residual: bool = False
    glu: Glu | None = None


@dataclass(frozen=True)
class NormRoute(Op):
    """`route` of norm(inp[r]), and the conversion of norm(inp[r]) for the `ExpertGroup`s that read the same."""

    route: Route
    norm: Norm
    inp: View


@dataclass(frozen=True)
class ExpertSumAdd(Op):
    """out += the output of `sum`."""

    sum: ExpertSum
    out: View


@dataclass(frozen=True)
class ExpertGroup(Op):
    """The products of `parts`: of one input with the same experts, matrices of one type and shape.

    With `glu` what is stored is its output, of the two parts' results. With `sum` that of one part's results is added
    to a residual stream. `is_converted`: the rows are those that a `NormRoute` before has converted.
    """

    parts: tuple[ExpertMatMul, ...]
    glu: Glu | None = None
    sum: ExpertSumAdd | None = None
    is_converted: bool = False


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
    normed: View | None = None  # of the last `NormRoute`
    while i < len(ops):
        op = ops[i]
        if isinstance(op, Norm | Route):  # what products of experts read after it is its own
            normed = None
        if (products := _products(plan, i, max_group)) is not None:
            out.append(products[0])
            i = products[1]
        elif isinstance(op, Norm) and (route := _route_after(ops, i, op)) is not None:
            out.append(NormRoute(route.name, route, op, op.inp))
            normed = op.out
            i += 2
        elif isinstance(op, ExpertMatMul):
            group, i = _experts(plan, i, normed)
            out.append(group)
        elif isinstance(op, ExpertSum) and i + 1 < len(ops) and _adds(add := ops[i + 1], ops, i + 2, op):
            out.append(ExpertSumAdd(op.name, op, add.out))
            i += 2
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


def asked_for(variable: str = VARIABLE, values: tuple[str, ...] = LOWERINGS) -> str:
    """The one of `values` that the environment asks for, by default the first: of lowerings "fused", or "plain" for one
    op at a time.

    Raises:
        InvalidRequest: it asks for something else; names the variable and its values.
    """
    value = os.environ.get(variable) or values[0]
    if value not in values:
        raise InvalidRequest(f"{variable} is {' or '.join(values)}, not {value!r}", field=variable)
    return value


def spans(plan: Plan, ops: tuple[Op, ...]) -> list[tuple[Op, ...]]:
    """The ops of the plan that each of `ops`, a lowering of it, stands for."""
    ends = accumulate((_n_ops(op) for op in ops), initial=0)
    return [plan.ops[first:last] for first, last in pairwise(ends)]


def _n_ops(op: Op) -> int:
    """Ops of the plan in a lowered one."""
    match op:
        case MatMulGroup():
            return len(op.parts) + (op.norm is not None) + op.residual + (op.glu is not None)
        case ExpertGroup():
            return len(op.parts) + (op.glu is not None) + 2 * (op.sum is not None)
        case RopeKv():
            return 1 + (op.rope_q is not None) + (op.rope_k is not None)
        case RopeKvAttention():
            return _n_ops(op.rope) + 1
    return 2 if isinstance(op, ExpertSumAdd | NormRoute) else 1


def _alone(op: Op) -> Op:
    """The op as it is, in the form that engines run."""
    if isinstance(op, MatMul):
        return MatMulGroup(op.name, (op,), op.inp)
    return ExpertGroup(op.name, (op,)) if isinstance(op, ExpertMatMul) else op


def _route_after(ops: tuple[Op, ...], i: int, norm: Norm) -> Route | None:
    """The router after the norm `i`, where nothing but it and products of experts reads the norm."""
    route = ops[i + 1] if i + 1 < len(ops) else None
    if norm.kind != "rms" or norm.group or not isinstance(route, Route) or route.inp != norm.out:
        return None
    after = i + 2
    while after < len(ops) and isinstance(op := ops[after], ExpertMatMul) and not op.per_slot and op.inp == norm.out:
        if _shares(op.out, norm.out) or _shares(op.out, norm.inp):
            return None
        after += 1
    return None if _read_again(ops, after, norm.out) or _shares(norm.out, norm.inp) else route


def _experts(plan: Plan, i: int, normed: View | None) -> tuple[ExpertGroup, int]:
    """The group that begins with op `i`, a product of experts, and the index of the op after it."""
    ops = plan.ops
    op = ops[i]
    assert isinstance(op, ExpertMatMul)
    parts = (op, other) if i + 1 < len(ops) and _pairs(other := ops[i + 1], plan, op) else (op,)
    i += len(parts)
    is_converted = not op.per_slot and op.inp == normed
    after = ops[i] if i < len(ops) else None
    if isinstance(after, Glu) and [part.out for part in parts] == [after.gate, after.up] and _unread(ops, i + 1, after):
        return ExpertGroup(op.name, parts, after, is_converted=is_converted), i + 1
    if (
        len(parts) == 1
        and isinstance(after, ExpertSum)
        and after.inp == op.out
        and i + 1 < len(ops)
        and _adds(add := ops[i + 1], ops, i + 2, after)
        and not _read_again(ops, i + 2, op.out)
        and not _shares(add.out, op.inp)
    ):
        total = ExpertSumAdd(after.name, after, add.out)
        return ExpertGroup(op.name, parts, sum=total, is_converted=is_converted), i + 2
    return ExpertGroup(op.name, parts, is_converted=is_converted), i


def _products(plan: Plan, i: int, max_group: int) -> tuple[MatMulGroup, int] | None:
    """The group that begins with op `i`, a product or the norm before one, and the index of the op after it."""
    ops, norm = plan.ops, None
    first = ops[i]
    if isinstance(first, Norm) and not first.group and i + 1 < len(ops):
        norm, i = first, i + 1
        first = ops[i]
    if not isinstance(first, MatMul) or (norm is not None and first.inp != norm.out):
        return None
    parts = [first]
    i += 1
    while len(parts) < max_group and i < len(ops) and isinstance(op := ops[i], MatMul) and op.inp == first.inp:
        parts.append(op)
        i += 1
    inp = first.inp if norm is None else norm.inp
    if norm is not None and (_read_again(ops, i, norm.out) or any(_shares(v, inp) for v in (norm.out, *_outs(parts)))):
        return None
    after = ops[i] if i < len(ops) else None
    if isinstance(after, Glu | Add) and _shares(after.out, inp):  # some blocks would store before others have read
        after = None
    if isinstance(after, Glu) and _gates(plan, parts, after) and _unread(ops, i + 1, after):
        return MatMulGroup(first.name, tuple(parts), inp, norm, glu=after), i + 1
    if isinstance(after, Add) and len(parts) == 1 and after.inp == first.out and not _read_again(ops, i + 1, first.out):
        into = MatMul(first.name, first.weight, first.bias, first.inp, after.out)
        return MatMulGroup(first.name, (into,), inp, norm, residual=True), i + 1
    return MatMulGroup(first.name, tuple(parts), inp, norm), i


def _unread(ops: tuple[Op, ...], start: int, glu: Glu) -> bool:
    """Whether no op from `start` on reads what goes into `glu`."""
    return not any(_read_again(ops, start, view) for view in (glu.gate, glu.up) if view != glu.out)


def _adds(op: Op, ops: tuple[Op, ...], start: int, before: ExpertSum) -> TypeGuard[Add]:
    """Whether `op` adds what `before` makes to something, and no op from `start` on reads it."""
    return isinstance(op, Add) and op.inp == before.out and not _read_again(ops, start, before.out)


def _gates(plan: Plan, parts: list[MatMul], glu: Glu) -> bool:
    """Whether `glu` is of the results of `parts`: of two of one weight type, or of the halves of one."""
    views = [part.out for part in parts]
    type_id, *others = {plan.weights[part.weight].type_id for part in parts}
    if others or (len(parts) == 1 and not layout.can_split(type_id, glu.gate.width)):
        return False
    whole = View(glu.gate.buf, glu.gate.offset, glu.gate.width + glu.up.width)
    halves = glu.up == View(whole.buf, whole.offset + glu.gate.width, glu.gate.width)
    return views == [glu.gate, glu.up] or (views == [whole] and halves)


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


def _outs(parts: list[MatMul]) -> list[View]:
    return [part.out for part in parts]


def _shares(a: View, b: View) -> bool:
    """Whether two views have a column in common."""
    return a.buf == b.buf and _overlap(a, b)


def _overlap(a: View, b: View) -> bool:
    return a.offset < b.offset + b.width and b.offset < a.offset + a.width
