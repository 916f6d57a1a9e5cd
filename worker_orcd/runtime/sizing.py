"""How large step, context and KV cache get on a device: what was asked for or refused, else what fits.

On a GPU all of it is planned inside what the process may take of the memory (`vram.Allowance`). Where memory is short
and the caller named no number, steps get fewer tokens, and then fewer sequences, before a model is refused. Arithmetic
over the plan; what a device has and takes is asked of `devices`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from worker_orcd.config import DEFAULT_MAX_TOKENS, GPU_MEMORY_UTILIZATION
from worker_orcd.cuda.vram import Allowance
from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import BLOCK_SIZE, EngineConfig
from worker_orcd.errors import InsufficientMemory, InsufficientVram, InvalidRequest
from worker_orcd.models.plan import Plan
from worker_orcd.runtime import devices

#: sequences where the caller names no number, and those tried where memory is short
MAX_SEQS, LESS_SEQS = 64, (32, 16, 8)
#: tokens of a step on a GPU that are tried where memory is short
LESS_BATCH_TOKENS = (1024, 512, 256)
#: positions for which a smaller step makes room where the caller names no context
CONTEXT_WORTH_ROOM = 8192
#: share of the free memory that the KV cache takes at most on the CPU where nobody says how much
CPU_KV_SHARE = 0.25
#: positions of each sequence for which the CPU takes a KV cache unasked: a prompt, and as many tokens as a request gets
#: that names no number; and the bytes that it takes where they need less
CPU_POSITIONS, CPU_KV_BYTES = 2 * DEFAULT_MAX_TOKENS, 1 << 30


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
    utilization: float = GPU_MEMORY_UTILIZATION,
    at_most: int | None = None,
) -> EngineConfig:
    """All sizes of an engine. Those that are None are chosen.

    Args:
        device: a resolved name.
        path: of the model, for messages.
        kv_cache_bytes: what the KV cache may take; it never takes more than `max_seqs` sequences can use.
        vram_limit: bytes of the GPU that everything together may take; None: no limit of this kind.
        utilization: share of the GPU's memory that the process may take.
        at_most: `taken_bytes` that the result may have; None: no limit.

    Raises:
        InvalidRequest: more positions than the model was made for; a limit for a GPU on the CPU.
        InsufficientVram: weights and workspace alone do not fit, the KV cache holds no block, or not one sequence of
            the context asked for; both numbers.
        InsufficientMemory: the CPU's KV cache that was asked for is past `at_most`.
        CudaError: the driver does not tell what is free.
    """
    limit = min(plan.context_length, plan.max_positions or plan.context_length)
    if context_length is not None and context_length > limit:
        raise InvalidRequest(
            f"context_length {context_length} is past the {limit} positions the model was made for",
            field="context_length",
        )
    context = context_length or limit
    if device == "cpu":
        if vram_limit is not None:
            raise limit_on_cpu()
        seqs = max_seqs or min(MAX_SEQS, max_batch_tokens or MAX_SEQS)
        tokens = max_batch_tokens or devices.default_batch_tokens(device, seqs)
        if kv_cache_bytes is None:
            budget = _cpu_kv_bytes(plan, context, context_length is not None, seqs)
            budget = budget if at_most is None else min(budget, at_most)
        elif at_most is None:
            budget = kv_cache_bytes
        else:
            raise InsufficientMemory("the KV cache has the size that was asked for", kv_cache_bytes, at_most)
        return _filled(device, plan, context_length, context, budget, seqs, tokens)

    def wanted(seqs: int, tokens: int) -> int:
        if kv_cache_bytes is None:
            return sequence_bytes(plan, context_length or min(context, CONTEXT_WORTH_ROOM))
        blocks = kv_blocks.blocks_within(plan, kv_cache_bytes, seqs, tokens, context)
        return sum(n * b for n, b in zip(blocks, kv_blocks.block_bytes(plan), strict=True))

    most = min((n for n in (vram_limit, at_most) if n is not None), default=None)
    allowance = Allowance(*devices.device_memory(device), utilization, most)
    room = gpu_room(device, plan, path, context, wanted, max_seqs, max_batch_tokens, allowance)
    budget = kv_cache_bytes if kv_cache_bytes is not None else room.kv_bytes
    config = _filled(device, plan, context_length, context, budget, room.max_seqs, room.max_batch_tokens)
    devices.vram_plan(plan, config).check(allowance, device, path)
    return config


def taken_bytes(device: str, plan: Plan, config: EngineConfig) -> int:
    """Bytes that depend on what is chosen: of a GPU all that must be free, weights too; on the CPU the KV cache."""
    if device != "cpu":
        return devices.vram_plan(plan, config).required
    return sum(n * size for n, size in zip(config.n_blocks, kv_blocks.block_bytes(plan), strict=True))


def next_smaller(device: str, plan: Plan, config: EngineConfig) -> int:
    """The `at_most` to try next where sizes that should fit did not: a quarter less of all but the weights."""
    taken = taken_bytes(device, plan, config)
    fixed = 0 if device == "cpu" else devices.vram_plan(plan, config).weights
    return taken - max((taken - fixed) // 4, 1)


def gpu_room(
    device: str,
    plan: Plan,
    path: str,
    context: int,
    wanted: Callable[[int, int], int],
    max_seqs: int | None,
    max_batch_tokens: int | None,
    allowance: Allowance,
) -> Room:
    """The largest step that leaves room for the KV cache that is wanted; where none does, the smallest.

    Args:
        context: positions a sequence may reach.
        wanted: (max_seqs, max_batch_tokens) -> bytes of the KV cache.
        max_seqs, max_batch_tokens: None: to be chosen.
        allowance: what may be taken.

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
        room = Room(n_seqs, n_tokens, no_kv.largest_kv(allowance.nbytes))
        if room.kv_bytes >= max(wanted(n_seqs, n_tokens), 1):
            return room
    no_kv.check(allowance, device, path)
    return room


def sequence_bytes(plan: Plan, n_positions: int) -> int:
    """Bytes of the KV cache that one sequence of `n_positions` needs; sliding layers keep their window only."""
    return sum(
        kv_blocks.blocks_needed(g, n_positions) * b
        for g, b in zip(plan.kv_groups, kv_blocks.block_bytes(plan), strict=True)
    )


def _cpu_kv_bytes(plan: Plan, context: int, asked: bool, max_seqs: int) -> int:
    """What the KV cache takes on the CPU where nobody says: room for `max_seqs` sequences of usual length within a
    share of the free memory, and for one of the whole context where that was asked for."""
    free = devices.host_memory()
    usual = max(CPU_KV_BYTES, max_seqs * sequence_bytes(plan, min(context, CPU_POSITIONS)))
    budget = min(int(free * CPU_KV_SHARE), usual)
    return max(budget, min(sequence_bytes(plan, context), free)) if asked else budget


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
