"""SequenceBlocks: which sequence owns which KV blocks, and what it takes from the prefix cache and leaves there.

A sequence owns the blocks of its table. Those that are full may belong to others too: nobody writes them any more, for
a sequence writes behind what it has. How many blocks a sequence may come to own is set aside before (`admission`), so
an allocation never fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from worker_orcd.engine.kv_blocks import BlockPool, blocks_of, first_kept
from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.admission import Admission
from worker_orcd.serving.prefix_cache import MAX_COMPARED, MIN_PART, PrefixCache, n_common
from worker_orcd.serving.work import SequenceState

#: fewest tokens that a prompt spares by waiting for a step
WORTH_WAITING = 16
#: tokens of the blocks that sequences compute in a step, by where they lie and how they begin
Begun = dict[tuple[int, bytes], list[np.ndarray]]


@dataclass(frozen=True)
class CacheStats:
    """What the prefix cache has done and holds; counts since the start, blocks of all KV groups together.

    Attributes:
        query_tokens: tokens of the prompts that were looked up.
        hit_tokens: those among them that were there and not computed.
        n_cached_blocks: blocks whose content can be found, those that sequences use now among them.
        n_used_blocks: blocks that sequences use now.
        n_blocks: blocks in all.
        n_evicted_blocks: times that a block which nobody used was given to something else.
    """

    query_tokens: int
    hit_tokens: int
    n_cached_blocks: int
    n_used_blocks: int
    n_blocks: int
    n_evicted_blocks: int


class SequenceBlocks:
    """Block pools, block tables and the prefix cache.

    Args:
        groups: the plan's KV groups.
        n_blocks: blocks of the pool of each.
        tables: int32 [n_groups, max_seqs, max_blocks_per_seq], written here and nowhere else.
        admission: keeps account of what is set aside.
        rope_limits: the plan's.
        prefix_cache: whether prompts share what they have in common.
        copy_block: copies a block (group, source, target); None: nothing can.
    """

    def __init__(
        self,
        groups: Sequence[KvGroup],
        n_blocks: Sequence[int],
        tables: np.ndarray,
        admission: Admission,
        *,
        rope_limits: Sequence[int] = (),
        prefix_cache: bool = True,
        copy_block: Callable[[int, int, int], object] | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.pools = [BlockPool(n) for n in n_blocks]
        self.tables = tables
        self.tables[...] = -1
        self._admission = admission
        self._cache = PrefixCache(self.groups, self.pools) if prefix_cache else None
        self._copy_block = copy_block
        # A sequence of a windowed group, or one that is recomputed, gives up shared blocks and may then need as many of
        # its own; these are set aside for it all the time. In the other groups a shared block counts once.
        self._counted_once = [prefix_cache and not (group.window or rope_limits) for group in self.groups]
        self._least = MIN_PART if copy_block is not None else BLOCK_SIZE
        self._query_tokens = self._hit_tokens = 0

    # -- owning

    def begin(self, seq: SequenceState) -> None:
        """Take in a sequence that owns nothing, and give it what is there of its prompt."""
        seq.blocks = [{} for _ in self.groups]
        if self._cache is not None:
            seq.cursor, seq.n_chained = self._cache.hold(self._cache.root(seq.rope_table)), 0
            if seq.sampling is not None:
                self._query_tokens += seq.n_prompt
            self.take_prefix(seq)

    def begin_again(self, seq: SequenceState) -> None:
        """Give up everything of a sequence that is computed anew from position 0; what is set aside for it stays."""
        self._give_up(seq)
        if self._cache is not None:
            seq.cursor, seq.n_chained = self._cache.hold(self._cache.root(seq.rope_table)), 0

    def end(self, seq: SequenceState) -> list[int]:
        """Give up everything of a sequence that is over. Returns of each group how many of what is set aside for it
        stay so, because others use its blocks."""
        shared = self._give_up(seq)
        seq.blocks = []
        return [n if once else 0 for n, once in zip(shared, self._counted_once, strict=True)]

    def allocate(self, seq: SequenceState, n: int) -> None:
        """Own the blocks that the next `n` tokens write."""
        for i, pool in enumerate(self.pools):
            owned, table = seq.blocks[i], self.tables[i, seq.slot]
            for number in range(seq.n_past // BLOCK_SIZE, blocks_of(seq.n_past + n)):
                if number not in owned:
                    owned[number] = table[number] = pool.allocate()

    def free_unwritten(self, seq: SequenceState) -> None:
        """Free the blocks behind those that a sequence has written: undoes `allocate`."""
        for i, pool in enumerate(self.pools):
            owned, end = seq.blocks[i], blocks_of(seq.n_past)
            for number in [b for b in owned if b >= end]:
                pool.free(owned.pop(number))
                self.tables[i, seq.slot, number] = -1

    def free_passed(self, seq: SequenceState) -> None:
        """Free the blocks that no later query reads; then the sequence owns no more than is reserved for it."""
        for i, group in enumerate(self.groups):
            if group.window:
                owned, first = seq.blocks[i], first_kept(group, seq.n_past)
                for number in [b for b in owned if b < first]:
                    self.pools[i].free(owned.pop(number))
                    self.tables[i, seq.slot, number] = -1

    # -- the prefix cache

    def shared(self, seq: SequenceState) -> list[int]:
        """Of each group, how many blocks fewer a waiting sequence needs because others use them already."""
        found = [0] * len(self.groups)
        if self._cache is None or seq.sampling is None or not any(self._counted_once):
            return found
        for node in self._cache.longest(self._cache.root(0), seq.prompt, 0, _most_hits(seq)):
            for i, once in enumerate(self._counted_once):
                found[i] += once and self.pools[i].n_owners(node.blocks[i]) > 0
        return found

    def take_prefix(self, seq: SequenceState) -> None:
        """Let a sequence own the blocks in the cache that continue what it has, and go on behind them."""
        if not self._may_take(seq):
            return
        assert self._cache is not None and seq.cursor is not None, "it may take"
        start = seq.n_chained
        found = self._cache.longest(seq.cursor, seq.prompt, start, _most_hits(seq))
        if not found:
            return
        end = start + len(found)
        self._hit(seq, end * BLOCK_SIZE - seq.n_past)
        self.free_passed(seq)
        for i, group in enumerate(self.groups):
            owned, table, pool = seq.blocks[i], self.tables[i, seq.slot], self.pools[i]
            for number in range(max(start, first_kept(group, seq.n_past)), end):
                block = found[number - start].blocks[i]
                if self._counted_once[i] and pool.n_owners(block):
                    self._admission.return_one(i)
                pool.share(block)
                owned[number] = table[number] = block
        self._cache.hold(found[-1])
        self._cache.release(seq.cursor)
        seq.cursor, seq.n_chained = found[-1], end

    def take_part(self, seq: SequenceState) -> None:
        """Copy the start of a block that begins like the next one of the sequence."""
        if self._copy_block is None or not self._may_take(seq):
            return
        assert self._cache is not None and seq.cursor is not None, "it may take"
        found = self._cache.alike(seq.cursor, _part_wanted(seq))
        if found is None:
            return
        node, n = found
        number = seq.n_chained
        for i, source in enumerate(list(node.blocks)):
            pool = self.pools[i]
            pool.touch(source)
            target = pool.allocate()  # it may be the source itself, where nothing else is free
            seq.blocks[i][number] = self.tables[i, seq.slot, number] = target
            if target != source:
                self._copy_block(i, source, target)
        self._hit(seq, n)
        self.free_passed(seq)  # else the chunk that follows takes more blocks than are set aside

    def waits(self, seq: SequenceState, begun: Begun) -> bool:
        """Whether a sequence had better not go on in this step: another computes now what it can take afterwards.

        Args:
            begun: the blocks that others compute in this step; where it does not wait, its own is added.
        """
        first = seq.n_chained * BLOCK_SIZE
        tokens = seq.prompt[first : first + BLOCK_SIZE]
        if seq.cursor is None or len(tokens) < self._least:
            return False
        others = begun.setdefault((seq.cursor.number, tokens[: self._least].tobytes()), [])
        if others and self._may_take(seq):
            wanted = seq.prompt[first : min(first + BLOCK_SIZE, seq.n_prompt - 1)]
            soon = max(n_common(other, wanted) for other in others[:MAX_COMPARED])
            if soon >= self._least and soon - self._n_there(seq) >= WORTH_WAITING:
                return True
        others.append(tokens)
        return False

    def leave(self, seq: SequenceState) -> bool:
        """Put in the cache the blocks that were filled since the last call, and the end of a prompt that has just been
        computed. Returns whether there was a full one."""
        if self._cache is None or seq.cursor is None:
            return False
        first, end = seq.n_chained, seq.n_past // BLOCK_SIZE
        for _ in range(first, end):
            self._leave_block(seq, self._cache)
        if seq.n_past == seq.n_prompt:
            self._leave_rest(seq, self._cache)
        return first < end

    def distrust(self, seq: SequenceState) -> None:
        """Take out of the cache all that a sequence has used and put in; it leaves nothing there any more."""
        if self._cache is not None and seq.cursor is not None:
            self._cache.forget_path(seq.cursor, seq.blocks)
            self._cache.release(seq.cursor)
            seq.cursor = None

    def clear_cache(self, running: Iterable[SequenceState]) -> None:
        """Forget all prefixes. Sequences that run keep their blocks, and neither take nor leave any more."""
        if self._cache is not None:
            for seq in running:
                seq.cursor = None
            self._cache.clear()

    def stats(self) -> CacheStats:
        """Counts so far. Any thread may ask."""
        n_blocks = sum(pool.n_blocks for pool in self.pools)
        return CacheStats(
            self._query_tokens,
            self._hit_tokens,
            sum(pool.n_kept for pool in self.pools),
            n_blocks - sum(pool.n_free for pool in self.pools),
            n_blocks,
            self._cache.n_evicted if self._cache is not None else 0,
        )

    # -- inside

    def _may_take(self, seq: SequenceState) -> bool:
        """Whether a sequence stands where the cache could help it on. One whose logits are all wanted never does."""
        return seq.cursor is not None and seq.sampling is not None and seq.n_past == seq.n_chained * BLOCK_SIZE

    def _n_there(self, seq: SequenceState) -> int:
        """Tokens that `take_part` would take."""
        if self._cache is None or self._copy_block is None or seq.cursor is None:
            return 0
        found = self._cache.alike(seq.cursor, _part_wanted(seq))
        return found[1] if found is not None else 0

    def _hit(self, seq: SequenceState, n: int) -> None:
        seq.n_past += n
        if not seq.n_out:
            seq.n_cached += n
            self._hit_tokens += n

    def _leave_block(self, seq: SequenceState, cache: PrefixCache) -> None:
        assert seq.cursor is not None, "asked before"
        number = seq.n_chained
        first = number * BLOCK_SIZE
        blocks = [owned.get(number, -1) for owned in seq.blocks]
        node = cache.put(seq.cursor, seq.written(first, first + BLOCK_SIZE), blocks)
        for i, (mine, kept) in enumerate(zip(blocks, node.blocks, strict=True)):
            if 0 <= mine != kept >= 0:  # another has computed the same: one copy will do
                pool = self.pools[i]
                if self._counted_once[i] and pool.n_owners(kept):
                    self._admission.return_one(i)
                pool.share(kept)
                pool.free(mine)
                seq.blocks[i][number] = self.tables[i, seq.slot, number] = kept
        cache.release(seq.cursor)
        seq.cursor, seq.n_chained = node, number + 1

    def _leave_rest(self, seq: SequenceState, cache: PrefixCache) -> None:
        """Put in the cache what a sequence has of a block that is not full; it may go on writing behind that."""
        assert seq.cursor is not None, "asked before"
        rest = seq.written(seq.n_chained * BLOCK_SIZE, seq.n_past)
        if len(rest) >= self._least:
            cache.release(cache.put(seq.cursor, rest, [owned.get(seq.n_chained, -1) for owned in seq.blocks]))

    def _give_up(self, seq: SequenceState) -> list[int]:
        """Free all blocks, the last first: the start of a text stays in the cache for longer than its end. Returns of
        each group how many of them others own too."""
        if self._cache is not None and seq.cursor is not None:
            self._leave_rest(seq, self._cache)
        self.tables[:, seq.slot, :] = -1
        n_shared = []
        for pool, owned in zip(self.pools, seq.blocks, strict=True):
            for block in reversed(owned.values()):
                pool.free(block)
            n_shared.append(sum(map(bool, map(pool.n_owners, owned.values()))))
            owned.clear()
        if self._cache is not None and seq.cursor is not None:
            self._cache.release(seq.cursor)
        seq.cursor = None
        return n_shared


def _most_hits(seq: SequenceState) -> int:
    """Blocks that a sequence can take: at least the last token of its prompt is computed, for its logits."""
    return (seq.n_prompt - 1) // BLOCK_SIZE


def _part_wanted(seq: SequenceState) -> np.ndarray:
    """Tokens that a part of a block may give to a sequence at the start of one: not all of the block, which would be a
    whole one, and not the last of the prompt."""
    return seq.prompt[seq.n_past : min(seq.n_past + BLOCK_SIZE, seq.n_prompt) - 1]
