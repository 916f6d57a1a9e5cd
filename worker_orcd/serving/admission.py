"""Admission: which waiting sequence gets a slot next, and what is set aside for it in the KV cache.

A sequence is admitted when a slot is free and every KV group can set aside the blocks that it may need until its last
token. First come, first served, but one that fits may pass those that do not fit yet. A sequence can be passed
`MAX_PASSED` times; then nothing behind it is admitted before it. As everything that runs ends, and gives back what was
set aside for it, every sequence gets its turn.

A block that several sequences use is needed once. So one that does not fit otherwise is looked up in the prefix cache:
what others use already of its prompt needs no room.

Which sequences these are depends on the order of events alone. What a sequence generates does not depend on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from worker_orcd.engine.kv_blocks import blocks_needed
from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.work import SequenceState

#: sequences that may be admitted before one that was queued earlier and waits for blocks
MAX_PASSED = 64
#: sequences that do not fit which one look at the queue goes past; bounds its time
MAX_SKIPPED = 64
#: sequences that do not fit which one look at the queue looks up in the prefix cache; bounds its time
MAX_LOOKED_UP = 8


class Admission:
    """The queue, the free slots, and the blocks that are set aside for nobody.

    Args:
        groups: the plan's KV groups.
        n_blocks: blocks of the pool of each.
        max_seqs: slots.

    Attributes:
        unreserved: blocks of each group that are set aside for nobody.
        waiting: the queue, by seq_id.
    """

    def __init__(self, groups: Sequence[KvGroup], n_blocks: Sequence[int], max_seqs: int) -> None:
        self.unreserved = list(n_blocks)
        self.waiting: OrderedDict[int, SequenceState] = OrderedDict()
        self._groups = groups
        self._free_slots = list(range(max_seqs - 1, -1, -1))
        self._news = False  # something was queued, withdrawn, given back or shared since `admit` has looked
        self._barred = False  # a sequence waits that may be passed no more

    @property
    def n_free_slots(self) -> int:
        """Slots nobody owns."""
        return len(self._free_slots)

    def add(self, seq: SequenceState) -> None:
        """Queue a sequence."""
        self.waiting[seq.seq_id] = seq
        self._news = True

    def withdraw(self, seq_id: int) -> SequenceState | None:
        """Take a sequence out of the queue; None where it is not in it."""
        seq = self.waiting.pop(seq_id, None)
        self._news = self._news or seq is not None
        return seq

    def give_back(self, seq: SequenceState, still_used: Sequence[int] = ()) -> None:
        """Take back the slot of an admitted sequence, and what is set aside for it.

        Args:
            still_used: of each group the blocks among them that others use, and that stay set aside.
        """
        self._free_slots.append(seq.slot)
        for i, n in enumerate(seq.reserved):
            self.unreserved[i] += n - (still_used[i] if still_used else 0)
        seq.slot, seq.reserved = -1, []
        self._news = True

    def return_one(self, group: int) -> None:
        """Take back a block that was set aside for an admitted sequence, which uses one of another instead."""
        self.unreserved[group] += 1
        self._news = True

    def look_again(self) -> None:
        """Note that a waiting sequence may need less than it did."""
        self._news = self._news or bool(self.waiting)

    def admit(
        self,
        begin: Callable[[SequenceState], object] = lambda seq: None,
        shared: Callable[[SequenceState], Sequence[int]] | None = None,
    ) -> list[SequenceState]:
        """Give slots to waiting sequences and set aside what they need. Returns them in order.

        Args:
            begin: called with each before the next is looked at; it takes what `shared` has told.
            shared: of each group, how many of the blocks that a sequence needs are set aside for others already.
        """
        admitted: list[SequenceState] = []
        if not self._news:
            return admitted
        self._news = self._barred = False
        skipped: list[SequenceState] = []
        n_looked_up = 0
        for seq in self.waiting.values():
            if self._barred or not self._free_slots or len(skipped) == MAX_SKIPPED:
                break
            need = self._need(seq)
            fits = _fits(need, self.unreserved)
            most = (seq.n_prompt - 1) // BLOCK_SIZE
            if not fits and shared is not None and n_looked_up < MAX_LOOKED_UP and _fits(need, self.unreserved, most):
                n_looked_up += 1
                fits = _fits([n - less for n, less in zip(need, shared(seq), strict=True)], self.unreserved)
            if not fits:
                skipped.append(seq)
                self._barred = seq.n_passed == MAX_PASSED
                continue
            _take(need, self.unreserved)
            seq.slot, seq.reserved = self._free_slots.pop(), need
            admitted.append(seq)
            begin(seq)
            for passed in skipped:
                passed.n_passed += 1
                self._barred = self._barred or passed.n_passed == MAX_PASSED
        for seq in admitted:
            del self.waiting[seq.seq_id]
        return admitted

    def outlook(self, arriving: Sequence[SequenceState]) -> tuple[bool, int]:
        """What `admit` would do next with sequences that are queued by then, behind all that wait now.

        Any thread may ask while no other queues, withdraws or admits. What another gives back meanwhile may be missed,
        and so is what the prefix cache would spare them: the other admits next, and sees all of it.

        Returns:
            whether the last one would be admitted; how many of them would wait.
        """
        free, n_slots, n_skipped = list(self.unreserved), len(self._free_slots), len(self.waiting)
        n_admitted, last = 0, False
        for seq in arriving:
            last = False
            if self._barred or n_admitted == n_slots or n_skipped >= MAX_SKIPPED:
                break
            need = self._need(seq)
            last = _fits(need, free)
            if last:
                _take(need, free)
                n_admitted += 1
            else:
                n_skipped += 1
        return last, len(arriving) - n_admitted

    def _need(self, seq: SequenceState) -> list[int]:
        if not seq.need:
            seq.need = [blocks_needed(group, seq.n_positions) for group in self._groups]
        return seq.need


def _fits(need: Sequence[int], free: Sequence[int], less: int = 0) -> bool:
    return all(n - less <= have for n, have in zip(need, free, strict=True))


def _take(need: Sequence[int], free: list[int]) -> None:
    for i, n in enumerate(need):
        free[i] -= n
