"""Blocks of the paged KV cache: which are in use, how many a sequence can need, their bytes, what a budget buys.

A block holds `BLOCK_SIZE` positions of all layers of one KV group. A group without a window keeps every position; a
group with a window W keeps only what a later query may still read: the query at position q reads keys from q - W + 1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.errors import InternalError
from worker_orcd.models.plan import KvGroup, Plan


class BlockPool:
    """The blocks of one KV group, 0 .. n_blocks-1, each with a count of its owners.

    A block without owners is free. One that is *kept* (`keep`) waits beside the free ones with its content: it can be
    shared again, and it is used for something else only where no other is free, the one that was freed first before the
    rest.

    Attributes:
        n_blocks: of the pool.
        n_kept: blocks that are kept, with and without owners.
        on_evict: called with a kept block that is used for something else and kept no more.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.n_kept = 0
        self.on_evict: Callable[[int], None] = lambda block: None
        # a stack: the block freed last is used first, so that memory never touched stays untouched
        self._free = list(range(n_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept ones without owners, the one freed first in front
        self._kept = bytearray(n_blocks)
        self._n_owners = [0] * n_blocks

    @property
    def n_free(self) -> int:
        """Blocks nobody owns, kept ones among them: as many can be allocated."""
        return len(self._free) + len(self._idle)

    def n_owners(self, block: int) -> int:
        """Owners of a block; 0: it is free.

        Raises:
            InternalError: the pool has no such block.
        """
        if not 0 <= block < self.n_blocks:
            raise InternalError(f"KV block {block} is not one of the {self.n_blocks} of its pool")
        return self._n_owners[block]

    def is_kept(self, block: int) -> bool:
        """Whether a block is kept, see `keep`."""
        return bool(self._kept[block])

    def allocate(self) -> int:
        """A free block, now owned by the caller alone. What the scheduler has set aside sees to it that there is one.

        Raises:
            InternalError: no block is free.
        """
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._kept[block] = False
            self.n_kept -= 1
            self.on_evict(block)
        else:
            raise InternalError(f"all {self.n_blocks} KV blocks of the pool are in use")
        self._n_owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """Count one more owner of a block that is in use or kept; each frees it once.

        Raises:
            InternalError: the block is free, or there is none of that number.
        """
        if not self.n_owners(block):
            if not self._kept[block]:
                raise InternalError(f"KV block {block} is free and cannot be shared")
            del self._idle[block]
        self._n_owners[block] += 1

    def free(self, block: int) -> None:
        """Give up a block; it is free when its last owner does.

        Raises:
            InternalError: the block is free already, or there is none of that number.
        """
        if not self.n_owners(block):
            raise InternalError(f"KV block {block} is freed twice")
        self._n_owners[block] -= 1
        if self._n_owners[block]:
            return
        if self._kept[block]:
            self._idle[block] = None
        else:
            self._free.append(block)

    def keep(self, block: int) -> None:
        """Let a block in use wait with its content when its last owner frees it.

        Raises:
            InternalError: the block is free or kept already, or there is none of that number.
        """
        if not self.n_owners(block) or self._kept[block]:
            raise InternalError(f"KV block {block} is free or kept already")
        self._kept[block] = True
        self.n_kept += 1

    def forget(self, block: int) -> None:
        """Keep a block no more; without owners it is as free as any.

        Raises:
            InternalError: the block is not kept, or there is none of that number.
        """
        n_owners = self.n_owners(block)
        if not self._kept[block]:
            raise InternalError(f"KV block {block} is not kept")
        if not n_owners:
            del self._idle[block]
            self._free.append(block)
        self._kept[block] = False
        self.n_kept -= 1

    def touch(self, block: int) -> None:
        """Note that the content of a kept block was read."""
        if block in self._idle:
            self._idle.move_to_end(block)


def blocks_of(n_positions: int) -> int:
    """Blocks that hold positions 0 .. n_positions-1."""
    return -(-n_positions // BLOCK_SIZE)


def window_blocks(window: int) -> int:
    """Blocks a sequence of a windowed group can need at once while up to `BLOCK_SIZE` rows of it are in flight.

    n consecutive positions touch at most (n + 62) // 64 + 1 blocks; here n = window - 1 + 64.
    """
    return (window - 1 + BLOCK_SIZE + BLOCK_SIZE - 2) // BLOCK_SIZE + 1


def blocks_needed(group: KvGroup, n_positions: int) -> int:
    """Blocks of `group` set aside for a sequence that will reach `n_positions`."""
    return min(blocks_of(n_positions), window_blocks(group.window)) if group.window else blocks_of(n_positions)


def first_kept(group: KvGroup, n_past: int) -> int:
    """The lowest block that a query at position `n_past` or later may still read."""
    return max(n_past - group.window + 1, 0) // BLOCK_SIZE if group.window else 0


def layer_block_bytes(plan: Plan) -> int:
    """Bytes of one block in one layer: float16 K and V of every KV head."""
    return BLOCK_SIZE * plan.n_head_kv * 2 * plan.head_dim * 2


def block_bytes(plan: Plan) -> tuple[int, ...]:
    """Bytes of one block of each KV group, in all its layers."""
    return tuple(len(g.layers) * layer_block_bytes(plan) for g in plan.kv_groups)


def position_bytes(plan: Plan) -> int:
    """Bytes of one position in one layer."""
    return layer_block_bytes(plan) // BLOCK_SIZE


def blocks_within(
    plan: Plan, budget: int, max_seqs: int, max_batch_tokens: int, context_length: int
) -> tuple[int, ...]:
    """How many blocks of each group `budget` bytes buy, never more than can be used.

    Each group gets what one sequence of the whole context needs, where the budget holds that; of the rest a windowed
    group gets as many as the full groups, up to what `max_seqs` sequences and the prefill tokens of one step fill. All
    counts are 0 where the budget holds no block of each group.
    """
    sizes = block_bytes(plan)
    one = [blocks_needed(g, context_length) for g in plan.kv_groups]
    most = [max_seqs * n for n in one]
    for i, group in enumerate(plan.kv_groups):
        if group.window:
            most[i] = min(most[i] + max_batch_tokens // BLOCK_SIZE, max_seqs * blocks_of(context_length))
    one_fits = sum(n * size for n, size in zip(one, sizes, strict=True)) <= budget
    return _alike(sizes, budget, one if one_fits else [0] * len(one), most)


def _alike(sizes: Sequence[int], budget: int, least: Sequence[int], most: Sequence[int]) -> tuple[int, ...]:
    """The largest number of blocks that `budget` buys, the same for each group but for its `least` and `most`."""

    def counts(n: int) -> tuple[int, ...]:
        return tuple(max(low, min(n, high)) for low, high in zip(least, most, strict=True))

    low, high = 0, max(most)
    while low < high:
        n = (low + high + 1) // 2
        if sum(c * s for c, s in zip(counts(n), sizes, strict=True)) <= budget:
            low = n
        else:
            high = n - 1
    return counts(low)


def sequences_held(groups: Sequence[KvGroup], n_blocks: Sequence[int], n_positions: int) -> int:
    """Sequences of `n_positions` that the pools hold at once."""
    return min(n // blocks_needed(group, n_positions) for group, n in zip(groups, n_blocks, strict=True))


def positions_held(groups: Sequence[KvGroup], n_blocks: Sequence[int]) -> int | None:
    """Positions of all sequences together that the pools hold; None: each group has a window, and none sets a limit."""
    return min((n * BLOCK_SIZE for g, n in zip(groups, n_blocks, strict=True) if not g.window), default=None)


def longest_sequence(groups: Sequence[KvGroup], n_blocks: Sequence[int]) -> int | None:
    """Positions of the longest sequence that fits the pools alone; None: no pool sets a limit."""
    limits = [
        n * BLOCK_SIZE for g, n in zip(groups, n_blocks, strict=True) if not g.window or n < window_blocks(g.window)
    ]
    return min(limits, default=None)
