"""The scheduler: which tokens the engine computes next, and which sequence owns which slot and KV blocks.

A sequence gets a slot only when every KV group can hold it to its last token (`admission`), so nothing that runs is
ever preempted or lost. Running sequences go first in every step and prompts fill the rest in chunks, so that no prompt
stops the streams of others. What a prompt begins with and another had already is not computed again (`seq_blocks`);
while another is at it, the prompt waits. A sequence that grows past one of the plan's limits is recomputed from
position 0 under the next rotary frequency table.

This is bookkeeping only, and a test drives it with made-up tokens. One thread uses it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain

import numpy as np

from worker_orcd.engine.kv_blocks import blocks_needed, blocks_of, first_kept, longest_sequence
from worker_orcd.engine.protocol import BLOCK_SIZE, Batch, EngineConfig
from worker_orcd.errors import InvalidRequest, VramOom
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.admission import Admission
from worker_orcd.serving.pace import DECODE_STEPS, Pace
from worker_orcd.serving.seq_blocks import Begun, CacheStats, SequenceBlocks
from worker_orcd.serving.work import DecodeWork, LogitsWork, SequenceState, StepWork, positions_kept

#: tokens of one teacher-forced step: each of them brings n_vocab float32 logits to the host
LOGITS_TOKENS = 64


class Scheduler:
    """Admits, batches, frees.

    Args:
        config: the engine's sizes.
        groups: the plan's KV groups; `config.n_blocks` are their pools.
        block_tables: the engine's int32 [n_groups, max_seqs, max_blocks_per_seq], written here and nowhere else.
        stop_ids: the model's end-of-text tokens.
        max_decode_steps: most steps of one `DecodeWork`.
        rope_tables: the engine's int32 [max_seqs], written here and nowhere else.
        rope_limits: the plan's, ascending: lengths past which a sequence turns by the next frequency table, from its
            first position on.
        prefix_cache: whether prompts share what they have in common.
        copy_block: the engine's; None: prompts share whole blocks only.
    """

    def __init__(
        self,
        config: EngineConfig,
        groups: Sequence[KvGroup],
        block_tables: np.ndarray,
        stop_ids: Iterable[int] = (),
        max_decode_steps: int = 1024,
        *,
        rope_tables: np.ndarray | None = None,
        rope_limits: Sequence[int] = (),
        prefix_cache: bool = True,
        copy_block: Callable[[int, int, int], object] | None = None,
    ) -> None:
        self.config = config
        self.groups = tuple(groups)
        self.stop_ids = frozenset(stop_ids)
        self._stop_tuple = tuple(sorted(self.stop_ids))
        self._stop_array = np.array(self._stop_tuple, np.int32)
        #: says how many prompt tokens a step may have; None: as many as fit
        self.pace: Pace | None = None
        windowed = any(g.window for g in self.groups)
        self._max_decode_steps = min(max_decode_steps, BLOCK_SIZE) if windowed else max_decode_steps
        self._rope_tables = np.zeros(config.max_seqs, np.int32) if rope_tables is None else rope_tables
        self._rope_tables[...] = 0
        self._rope_limits = tuple(rope_limits)
        self._admission = Admission(self.groups, config.n_blocks, config.max_seqs)
        self._blocks = SequenceBlocks(
            self.groups,
            config.n_blocks,
            block_tables,
            self._admission,
            rope_limits=self._rope_limits,
            prefix_cache=prefix_cache,
            copy_block=copy_block,
        )
        self.pools = self._blocks.pools
        self._shared = self._blocks.shared if prefix_cache else None
        self._running: dict[int, SequenceState] = {}  # by seq_id, in order of admission
        self._forward_next = False
        self._handed_out: list[SequenceState] = []  # the sequences of work that is not done yet

    # -- what may enter

    def check(self, n_prompt: int, max_tokens: int) -> None:
        """Refuse a sequence that could never run.

        Raises:
            InvalidRequest: prompt and max_tokens go past the context.
            VramOom: they fit the context, but not the whole KV cache.
        """
        n, context = n_prompt + max_tokens, self.config.context_length
        kept = positions_kept(n_prompt, max_tokens)
        if n > context:
            name = "prompt" if n_prompt + min(max_tokens, 1) > context else "max_tokens"
            raise InvalidRequest(
                f"prompt of {n_prompt} tokens and max_tokens {max_tokens} need {n} positions; the "
                f"context has {context}",
                field=name,
            )
        for group, pool in zip(self.groups, self.pools, strict=True):
            need = blocks_needed(group, kept)
            if need > pool.n_blocks:
                raise VramOom(
                    f"prompt of {n_prompt} tokens and max_tokens {max_tokens} need {need} KV blocks of "
                    f"{BLOCK_SIZE} positions; the KV cache has {pool.n_blocks}",
                    blocks_required=need,
                    blocks_available=pool.n_blocks,
                )

    def room_for(self, n_prompt: int) -> int:
        """The most tokens that a prompt of `n_prompt` tokens can ever be continued by; may be below 1."""
        longest = longest_sequence(self.groups, self.config.n_blocks)
        context = self.config.context_length
        return (context if longest is None else min(context, longest + 1)) - n_prompt

    def stop_ids_of(self, seq: SequenceState) -> tuple[int, ...]:
        """The token ids that end a sequence."""
        return self._stop_tuple + seq.stop_token_ids if seq.stops else seq.stop_token_ids

    # -- life of a sequence

    @property
    def n_waiting(self) -> int:
        """Sequences not yet admitted."""
        return len(self._admission.waiting)

    @property
    def n_free_slots(self) -> int:
        """Slots nobody owns."""
        return self._admission.n_free_slots

    @property
    def running(self) -> list[SequenceState]:
        """Admitted sequences, in order of admission."""
        return list(self._running.values())

    def add(self, seq: SequenceState) -> None:
        """Queue a sequence that `check` accepts."""
        self._admission.add(seq)

    def admit(self) -> list[SequenceState]:
        """Give slots to those waiting sequences whose turn it is, and reserve the blocks they need."""
        return self._admission.admit(self._begin, self._shared)

    def outlook(self, arriving: Sequence[SequenceState]) -> tuple[bool, int]:
        """See `Admission.outlook`: whether the last of `arriving` would start at once, and how many would wait."""
        return self._admission.outlook(arriving)

    def drop(self, seq_id: int) -> bool:
        """End a sequence in whatever state it is and free what it owns. False where it is not (or no longer) here."""
        seq = self._admission.withdraw(seq_id)
        if seq is not None:
            seq.ended = "dropped"
            return True
        seq = self._running.get(seq_id)
        if seq is None:
            return False
        self._free(seq, "dropped")
        return True

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: of what the engine has written, nobody knows any more what it is."""
        self._blocks.clear_cache(self._running.values())

    def cache_stats(self) -> CacheStats:
        """What the prefix cache has done and holds. Any thread may ask."""
        return self._blocks.stats()

    # -- what runs next

    def next_work(self) -> StepWork | LogitsWork | DecodeWork | None:
        """The next thing for the engine to do, its block tables written; None when nothing runs.

        Work whose end was never told was given up: it is as if it had not been handed out.
        """
        for seq in self._handed_out:
            if seq.ended is None:
                self._blocks.free_unwritten(seq)
        work = self._next_work()
        if work is None:
            self._handed_out = []
        elif isinstance(work, StepWork):
            self._handed_out = [seq for seq, _ in work.chunks]
        else:
            self._handed_out = [work.seq] if isinstance(work, LogitsWork) else work.seqs
        return work

    def _next_work(self) -> StepWork | LogitsWork | DecodeWork | None:
        forced: list[SequenceState] = []
        sampled: list[SequenceState] = []
        for seq in self._running.values():
            if seq.n_past == self._recompute_at(seq):
                self._recompute(seq)
            (sampled if seq.sampling is not None else forced).append(seq)
        decoding = [s for s in sampled if not s.prefilling]
        prefilling = [s for s in sampled if s.prefilling]
        forward = bool(forced) and (self._forward_next or not sampled)
        step_by_step = any(s.want_logits for s in decoding)
        n_prompt = self._prompt_tokens(len(decoding), forward) if forward or prefilling else 0
        if (forward or prefilling) and not n_prompt:
            return self._step(decoding, [], 0) if step_by_step else self._decode(decoding, DECODE_STEPS)
        self._forward_next = not forward
        if forward:
            return self._forward(forced[0], n_prompt)
        if prefilling or forced or step_by_step:
            return self._step(decoding, prefilling, n_prompt)
        return self._decode(decoding) if decoding else None

    def _prompt_tokens(self, n_decode: int, forced: bool) -> int:
        """The most prompt tokens of the next step; 0: the sequences that decode are to have one alone."""
        most = self.config.max_batch_tokens
        n = most if self.pace is None else self.pace.prompt_tokens(n_decode, forced)
        return min(n, LOGITS_TOKENS, most) if forced else min(n, most - n_decode)

    def done_step(self, work: StepWork, sampled: Sequence[int]) -> list[SequenceState]:
        """Take the result of a step. Returns the sequences that ended, their blocks freed."""
        self._handed_out = []
        for seq, n in work.chunks:
            seq.n_past += n
        for seq, token in zip(work.outputs, sampled, strict=True):
            seq.n_out += 1
            seq.last_token = int(token)
            seq.drawn.append(seq.last_token)
        return self._end_finished(work.seqs)

    def done_logits(self, work: LogitsWork) -> list[SequenceState]:
        """Take the end of a teacher-forced chunk. Returns the sequence if that was its last one."""
        self._handed_out = []
        work.seq.n_past += len(work.batch.tokens)
        return self._end_finished([work.seq])

    def done_decode(self, work: DecodeWork, sampled: np.ndarray) -> list[SequenceState]:
        """Take the result of a decode run, int32 [steps_done, n]. Returns the sequences that ended.

        An engine may have run a step or two past a sequence's end; what it drew there does not count.
        """
        self._handed_out = []
        if not len(sampled):
            return []
        ends = np.isin(sampled, self._stop_array) & np.array([seq.stops for seq in work.seqs])
        ends |= sampled < 0
        for j, seq in enumerate(work.seqs):
            if seq.stop_token_ids:
                ends[:, j] |= np.isin(sampled[:, j], seq.stop_token_ids)
        n_done = np.where(ends.any(axis=0), ends.argmax(axis=0) + 1, len(sampled))
        for seq, n, tokens in zip(work.seqs, n_done.tolist(), sampled.T.tolist(), strict=True):
            seq.n_past += n
            seq.n_out += n
            seq.last_token = tokens[n - 1]
            seq.drawn += tokens[:n]
        return self._end_finished(work.seqs)

    # -- inside

    def _begin(self, seq: SequenceState) -> None:
        self._choose_rope_table(seq, seq.n_prompt)
        self._blocks.begin(seq)
        self._running[seq.seq_id] = seq

    def _end_finished(self, seqs: Iterable[SequenceState]) -> list[SequenceState]:
        """End those that have their last token; of the others free the blocks they need no more. What was computed is
        there for other sequences from now on."""
        ended = []
        for seq in seqs:
            self._leave(seq)
            if _failed(seq):
                reason = "failed"
            elif seq.n_out and seq.last_token in self.stop_ids_of(seq):
                reason = "stop"
            elif not seq.prefilling and seq.n_out == seq.max_tokens:
                reason = "length"
            else:
                self._blocks.free_passed(seq)
                continue
            self._free(seq, reason)
            ended.append(seq)
        return ended

    def _leave(self, seq: SequenceState) -> None:
        if _failed(seq):
            self._blocks.distrust(seq)
        elif self._blocks.leave(seq):
            self._admission.look_again()

    def _free(self, seq: SequenceState, reason: str) -> None:
        del self._running[seq.seq_id]
        self._admission.give_back(seq, self._blocks.end(seq))
        seq.ended = reason

    def _choose_rope_table(self, seq: SequenceState, n_positions: int) -> None:
        seq.rope_table = self._rope_tables[seq.slot] = bisect_left(self._rope_limits, n_positions)

    def _recompute_at(self, seq: SequenceState) -> int | None:
        """The position before which a sequence that still generates is recomputed; None: it never is."""
        if seq.sampling is None or seq.rope_table == len(self._rope_limits):
            return None
        return self._rope_limits[seq.rope_table]

    def _recompute(self, seq: SequenceState) -> None:
        """Begin again from position 0 under the frequency table of the sequence with its next token: what it has so
        far becomes its prompt, in the blocks that are reserved for it."""
        self._choose_rope_table(seq, seq.n_past + 1)
        self._blocks.begin_again(seq)
        seq.prompt, seq.drawn, seq.n_past = np.append(seq.prompt, np.array(seq.drawn, np.int32)), [], 0

    def _tokens_allowed(self, seq: SequenceState, n: int, spare: list[int]) -> int:
        """How many of `n` prompt tokens the windowed pools allow, `spare` blocks of each being reserved for nobody.

        What is reserved covers the tokens up to the end of a block; a larger chunk borrows spare blocks for one step.
        """
        for i, group in enumerate(self.groups):
            if group.window:
                first = first_kept(group, seq.n_past)
                within = (first + seq.reserved[i] + spare[i]) * BLOCK_SIZE - seq.n_past
                n = min(n, within)
        for i, group in enumerate(self.groups):
            if group.window:
                used = blocks_of(seq.n_past + n) - first_kept(group, seq.n_past)
                spare[i] -= max(used - seq.reserved[i], 0)
        return n

    def _step(self, decoding: list[SequenceState], prefilling: list[SequenceState], left: int) -> StepWork:
        chunks = [(seq, 1) for seq in decoding]
        spare = list(self._admission.unreserved)
        begun: Begun = {}
        for seq in prefilling:
            if left <= 0:
                break
            self._blocks.take_prefix(seq)
            if self._blocks.waits(seq, begun):
                continue
            self._blocks.take_part(seq)
            n = self._tokens_allowed(seq, min(left, seq.n_prompt - seq.n_past), spare)
            chunks.append((seq, n))
            left -= n
        for seq, n in chunks:
            self._blocks.allocate(seq, n)
        return StepWork.of(chunks, len(decoding))

    def _forward(self, seq: SequenceState, n: int) -> LogitsWork:
        n = self._tokens_allowed(seq, min(n, seq.n_prompt - seq.n_past), list(self._admission.unreserved))
        self._blocks.allocate(seq, n)
        end = seq.n_past + n
        batch = Batch(
            seq.prompt[seq.n_past : end],
            np.arange(seq.n_past, end, dtype=np.int32),
            np.full(n, seq.slot, np.int32),
            0,
            np.arange(n, dtype=np.int32),
        )
        return LogitsWork(batch, seq)

    def _decode(self, seqs: list[SequenceState], most: int | None = None) -> DecodeWork:
        n_steps = min(
            self._max_decode_steps,
            most or self._max_decode_steps,
            *(s.max_tokens - s.n_out for s in seqs),
            *(at - s.n_past for s in seqs if (at := self._recompute_at(s)) is not None),
        )
        for seq in seqs:
            self._blocks.allocate(seq, n_steps)
        stops = [self.stop_ids_of(s) for s in seqs]
        return DecodeWork(
            seqs=seqs,
            slots=np.array([s.slot for s in seqs], np.int32),
            seq_ids=np.array([s.seq_id for s in seqs], np.int64),
            tokens=np.array([s.last_token for s in seqs], np.int32),
            positions=np.array([s.n_past for s in seqs], np.int32),
            n_steps=n_steps,
            stop_ids=np.array([*chain.from_iterable(stops)], np.int32),
            stop_offsets=np.array([0, *accumulate(map(len, stops))], np.int32),
        )


def _failed(seq: SequenceState) -> bool:
    """Whether the engine drew no token of the sequence in its last step."""
    return seq.n_out > 0 and seq.last_token < 0
