"""How large step, context and KV cache get on a device: what was asked for or refused, else what fits.

On a GPU all of it is planned inside the free memory or the budget that the caller sets. Where memory is short and the
caller named no number, steps get fewer tokens, and then fewer sequences, before a model is refused. Arithmetic over the
plan; what a device has and takes is asked of `devices`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import BLOCK_SIZE, EngineConfig
from worker_orcd.errors import InsufficientVram, InvalidRequest
from worker_orcd.models.plan import Plan
from worker_orcd.runtime import devices

#: sequences where the caller names no number, and those tried where memory is short
MAX_SEQS, LESS_SEQS = 64, (32, 16, 8)
#: tokens of a step on a GPU that are tried where memory is short
LESS_BATCH_TOKENS = (1024, 512, 256)
#: positions for which a smaller step makes room where the caller names no context
CONTEXT_WORTH_ROOM = 8192


@dataclass(frozen=True)
class Room:
    """A step size on a GPU and the bytes that are left for the KV cache beside it."""

    max_seqs: int
    max_batch_tokens: int
    kv_bytes: int


def engine_config(
    device: str,
    plan: Plan,
    path: str,
    context_length: int | None,
    kv_cache_bytes: int | None,
    max_seqs: int | None,
    max_batch_tokens: int | None,
    vram_limit: int | None = None,
) -> EngineConfig:
    """All sizes of an engine. Those that are None are chosen.

    Args:
        device: a resolved name.
        path: of the model, for messages.
        kv_cache_bytes: what the KV cache may take; it never takes more than `max_seqs` sequences can use.
        vram_limit: bytes of the GPU that everything together may take; None: what is free.

    Raises:
        InvalidRequest: more positions than the model was made for; a limit for a GPU on the CPU.
        InsufficientVram: weights and workspace alone do not fit, the KV cache holds no block, or not one sequence of
            the context asked for; both numbers.
        CudaError: the driver does not tell what is free.
    """
    limit = min(plan.context_length, plan.max_positions or plan.context_length)
    if context_length is not None and context_length > limit:
        raise InvalidRequest(
            f"context_length {context_length} is past the {limit} positions the model was made for",
            field="context_length",
        )
    context = context_length or limit
    one_sequence = sequence_bytes(plan, context)
    if device == "cpu":
        if vram_limit is not None:
            raise limit_on_cpu()
        seqs = max_seqs or min(MAX_SEQS, max_batch_tokens or MAX_SEQS)
        tokens = max_batch_tokens or devices.default_batch_tokens(device, seqs)
        budget = kv_cache_bytes
        if budget is None:
            default, most = devices.cpu_kv_budget()
            budget = default if context_length is None else max(default, min(one_sequence, most))
        return _filled(device, plan, context_length, context, budget, seqs, tokens)

    def wanted(seqs: int, tokens: int) -> int:
        if kv_cache_bytes is None:
            return sequence_bytes(plan, context_length or min(context, CONTEXT_WORTH_ROOM))
        blocks = kv_blocks.blocks_within(plan, kv_cache_bytes, seqs, tokens, context)
        return sum(n * b for n, b in zip(blocks, kv_blocks.block_bytes(plan), strict=True))

    free = devices.free_vram(device)
    room = gpu_room(device, plan, path, context, wanted, max_seqs, max_batch_tokens, free, vram_limit)
    budget = kv_cache_bytes if kv_cache_bytes is not None else room.kv_bytes
    config = _filled(device, plan, context_length, context, budget, room.max_seqs, room.max_batch_tokens)
    if vram_limit is not None:  # what is free the engine looks at
        devices.vram_plan(plan, config).check(free, device, path, vram_limit)
    return config


def gpu_room(
    device: str,
    plan: Plan,
    path: str,
    context: int,
    wanted: Callable[[int, int], int],
    max_seqs: int | None,
    max_batch_tokens: int | None,
    free: int,
    vram_limit: int | None,
) -> Room:
    """The largest step that leaves room for the KV cache that is wanted; where none does, the smallest.

    Args:
        context: positions a sequence may reach.
        wanted: (max_seqs, max_batch_tokens) -> bytes of the KV cache.
        max_seqs, max_batch_tokens: None: to be chosen.

    Raises:
        InsufficientVram: weights and workspace alone do not fit, whatever is chosen.
    """
    seqs = [max_seqs] if max_seqs else [min(n, max_batch_tokens or n) for n in (MAX_SEQS, *LESS_SEQS)]
    tokens = (
        [max_batch_tokens]
        if max_batch_tokens
        else [devices.default_batch_tokens(device, seqs[0]), *(max(n, seqs[0]) for n in LESS_BATCH_TOKENS)]
    )
    for n_seqs, n_tokens in [*((seqs[0], t) for t in tokens), *((s, tokens[-1]) for s in seqs[1:])]:
        none = EngineConfig(n_seqs, n_tokens, context, (0,) * len(plan.kv_groups))
        no_kv = replace(devices.vram_plan(plan, none), kv=0)  # empty regions are aligned
        room = Room(n_seqs, n_tokens, no_kv.largest_kv(free if vram_limit is None else min(free, vram_limit)))
        if room.kv_bytes >= max(wanted(n_seqs, n_tokens), 1):
            return room
    no_kv.check(free, device, path, vram_limit)
    return room


def sequence_bytes(plan: Plan, n_positions: int) -> int:
    """Bytes of the KV cache that one sequence of `n_positions` needs; sliding layers keep their window only."""
    return sum(
        kv_blocks.blocks_needed(g, n_positions) * b
        for g, b in zip(plan.kv_groups, kv_blocks.block_bytes(plan), strict=True)
    )


def limit_on_cpu() -> InvalidRequest:
    """The error where somebody limits the memory of a GPU and runs on the CPU."""
    return InvalidRequest("a limit of device memory is for a GPU, not for the CPU", field="vram_limit_bytes")


def _filled(
    device: str, plan: Plan, asked: int | None, context: int, budget: int, max_seqs: int, max_batch_tokens: int
) -> EngineConfig:
    """As many blocks as `budget` holds, and the context they allow where nobody asked for one."""
    sizes = kv_blocks.block_bytes(plan)
    n_blocks = kv_blocks.blocks_within(plan, budget, max_seqs, max_batch_tokens, context)
    if min(n_blocks) == 0:
        raise InsufficientVram(
            f"the KV cache may take {budget} bytes; one block of {BLOCK_SIZE} positions needs {sum(sizes)}",
            sum(sizes),
            budget,
            device=device,
        )
    longest = kv_blocks.longest_sequence(plan.kv_groups, n_blocks)
    if longest is not None and longest < context:
        if asked is not None:
            needed = sequence_bytes(plan, context)
            raise InsufficientVram(
                f"a context of {context} positions needs a KV cache of {needed} bytes; it may take {budget}",
                needed,
                budget,
                device=device,
            )
        context = longest
    return EngineConfig(max_seqs, max_batch_tokens, context, n_blocks)
