"""Which matrices a GPU multiplies by a slower path than others, and why: what `inspect` and the log of a load tell.

Nothing here is wrong or needs an answer; it says why a model is slower than its bytes let one expect. Read off the
launches of `layout` and `expert_layout`, so that it holds for whatever these choose.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from worker_orcd.cuda import expert_layout, layout
from worker_orcd.cuda.lowering import MatMulGroup, lower
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.models.ops import ExpertMatMul, MatMul
from worker_orcd.models.plan import Plan

#: shared memory of a block of the largest GPUs (compute capability 9.0 and 10.0)
SMEM_LARGE = 227 * 1024
#: multiprocessors; which variants are slow does not depend on them
_N_SM = 132


@dataclass(frozen=True)
class SlowPath:
    """Matrices that one reason slows down.

    Attributes:
        reason: why.
        types: names of their tensor types.
        tensors: their names, layers as ``*``, with how many there are.
    """

    reason: str
    types: tuple[str, ...]
    tensors: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        named = ", ".join(name if n == 1 else f"{name} ({n})" for name, n in self.tensors)
        return f"{', '.join(self.types)} {named}: {self.reason}"


def slow_paths(plan: Plan, max_smem: int = SMEM_LARGE, fuse: bool = True) -> tuple[SlowPath, ...]:
    """The slower paths of a plan's decode steps.

    Args:
        plan: the plan.
        max_smem: dynamic shared memory bytes that a block may have; by default there is enough.
        fuse: how the plan is lowered.

    Raises:
        ModelLoadError: a row is so long that no kernel has the shared memory for it; names the tensor.
    """
    names: dict[str, list[str]] = {}
    for name, reason in _reasons(plan, max_smem, fuse):
        of_reason = names.setdefault(reason, [])
        if name not in of_reason:
            of_reason.append(name)
    return tuple(
        SlowPath(
            reason,
            tuple(sorted({_type(plan, name) for name in of_reason})),
            tuple(Counter(re.sub(r"^blk\.\d+\.", "blk.*.", name) for name in of_reason).items()),
        )
        for reason, of_reason in names.items()
    )


def _reasons(plan: Plan, max_smem: int, fuse: bool) -> Iterator[tuple[str, str]]:
    """(tensor, what slows it down) for every matrix and every reason."""
    for op in plan.ops:
        if not isinstance(op, MatMul | ExpertMatMul):
            continue
        w = plan.weights[op.weight]
        k, kernels = w.shape[0], "decode_*" if isinstance(op, MatMul) else "expert_few_*"
        try:
            best, launch = (_launch(plan, op, smem) for smem in (max(SMEM_LARGE, max_smem), max_smem))
        except ValueError:
            reason = f"tensor {w.name!r}: rows of {k:,} need more shared memory than the {max_smem:,} bytes of this GPU"
            raise ModelLoadError(f"{reason}; the CPU engine takes it (--device cpu)", field=w.name) from None
        if best.kernel.endswith("_long"):
            yield w.name, f"rows of {k:,} columns are too long for a block to take at once (kernels {kernels}_long)"
        if (launch.kernel, launch.block) != (best.kernel, best.block):
            yield (
                w.name,
                f"rows of {k:,} columns get fewer warps, as a block has only {max_smem:,} bytes of shared memory",
            )
        if isinstance(op, MatMul) and not _decodes_early(w.type_id):
            yield w.name, "no kernel of the type decodes weights before the launch in front has ended"
    for group in lower(plan, fuse):
        if isinstance(group, MatMulGroup) and not _share_a_launch(plan, group, max_smem):
            for part in group.parts:
                yield part.weight, "products of one input have several types, which no kernel takes together"


def _share_a_launch(plan: Plan, group: MatMulGroup, max_smem: int) -> bool:
    """Whether the types of a group's products do not cost launches."""
    n_outs: Counter[int] = Counter()
    for part in group.parts:
        n_outs[plan.weights[part.weight].type_id] += part.out.width
    match tuple(n_outs.items()):
        case ((_, _),):
            return True
        case ((first, n_first), (second, n_second)):
            k, sizes = group.parts[0].inp.width, (n_first, n_second)
            return layout.pair_launch((first, second), k, sizes, 1, n_sm=_N_SM, max_smem=max_smem) is not None
    return False


def _launch(plan: Plan, op: MatMul | ExpertMatMul, max_smem: int) -> layout.Launch:
    """Of the product with one row."""
    w = plan.weights[op.weight]
    k, n_out = w.shape[:2]
    if isinstance(op, MatMul):
        return layout.decode_launch(w.type_id, k, n_out, 1, n_sm=_N_SM, max_smem=max_smem)
    return expert_layout.few_launch(w.type_id, k, n_out, 1, op.n_used, op.n_expert, n_sm=_N_SM, max_smem=max_smem)


def _decodes_early(type_id: int) -> bool:
    """Whether the type has kernels that do, for matrices small enough."""
    return layout.decode_launch(type_id, 256, layout.TILE_ROWS, 1, n_sm=_N_SM).kernel.endswith(("e", "e1"))


def _type(plan: Plan, name: str) -> str:
    return quants.TYPES[plan.weights[name].type_id].name
