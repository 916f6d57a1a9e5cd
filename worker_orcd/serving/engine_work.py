"""EngineWork: what the engine thread does between two looks at the news.

A ragged step while prompts are pending, else a decode run of many steps without the GIL. Tokens and the marks that end
a sequence go through one ring, so their order is kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from worker_orcd.engine.protocol import Engine, StepAborted
from worker_orcd.errors import WorkerError
from worker_orcd.serving.entry import MARKS, Entry, as_worker_error
from worker_orcd.serving.job import Job
from worker_orcd.serving.logits_job import LogitsJob
from worker_orcd.serving.logprobs import top_logprobs
from worker_orcd.serving.scheduler import Scheduler
from worker_orcd.serving.score_job import ScoreJob
from worker_orcd.serving.work import DecodeWork, LogitsWork, SequenceState, StepWork

#: a step with prefill tokens is kept about this long, so that a cancelled prompt stops within 100 ms
STEP_SECONDS = 0.08
MIN_PREFILL_TOKENS = 16
#: prompt tokens of the first step where nobody has measured any
FIRST_PREFILL_TOKENS = 64


def prefill_tokens(n_decode: int, n_prefill: int, seconds: float, limit: int) -> int:
    """Prompt tokens for a step of about `STEP_SECONDS`, after one of `n_decode` and `n_prefill` rows took `seconds`."""
    fit = int((n_decode + n_prefill) * STEP_SECONDS / max(seconds, 1e-6)) - n_decode
    return max(min(MIN_PREFILL_TOKENS, limit), min(fit // 8 * 8, limit))


class EngineWork:
    """Runs what the scheduler chooses. For the engine thread alone.

    Args:
        engine, scheduler, ring, control: as of `EngineLoop`.
        entries: the sequences that have not ended for their clients, by seq_id; others change it.
        first_prefill: prompt tokens of the first step; afterwards the time of each step says how many.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        ring: Any,
        control: Any,
        entries: Mapping[int, Entry],
        first_prefill: int = FIRST_PREFILL_TOKENS,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._ring = ring
        self._control = control
        self._entries = entries
        #: sequences of the engine call under way
        self._in_call: tuple[int, ...] = ()
        scheduler.max_prefill_tokens = min(first_prefill, scheduler.config.max_batch_tokens)

    def begin(self, admitted: list[SequenceState]) -> None:
        """Tell the engine how the sequences that got a slot are sampled."""
        for seq in admitted:
            entry = self._entries.get(seq.seq_id)
            try:
                if seq.sampling is not None:
                    self._engine.set_slot(seq.slot, seq.sampling, seq.edits)
            except Exception as error:
                failure = as_worker_error(error, "the job could not be started")
                if failure.sticky:
                    raise
                self._scheduler.drop(seq.seq_id)
                if entry is not None:
                    entry.job.end(failure)
                continue
            if entry is not None:
                entry.job.admitted_at = time.monotonic()
                if isinstance(entry.job, Job):
                    entry.job.cached_tokens = seq.n_cached

    @property
    def in_call(self) -> bool:
        """Whether a call of the engine is under way."""
        return bool(self._in_call)

    def unwanted(self) -> bool:
        """Whether a call of the engine is under way and all of its sequences have ended for their clients."""
        in_call = self._in_call
        return bool(in_call) and not any(seq_id in self._entries for seq_id in in_call)

    def run(self) -> None:
        """One call of the engine, if there is something to do; its results go to the scheduler and to the jobs.

        An aborted one has none: what is still wanted of it is computed again by the next.
        """
        work = self._scheduler.next_work()
        if work is None:
            return
        self._in_call = tuple(seq.seq_id for seq in work.seqs)
        try:
            # who ends a sequence from now on sees it in the call; one that ended before is told of here
            if not self.unwanted():
                self._call(work)
        except StepAborted:
            pass
        finally:
            self._in_call = ()

    def _call(self, work: StepWork | LogitsWork | DecodeWork) -> None:
        if isinstance(work, DecodeWork):
            sampled = self._engine.decode(
                work.slots,
                work.seq_ids,
                work.tokens,
                work.positions,
                work.n_steps,
                work.stop_ids,
                work.stop_offsets,
                self._ring,
                self._control,
            )
            self._mark_ends(self._scheduler.done_decode(work, sampled))
        elif isinstance(work, StepWork):
            self._step(work)
        else:
            self._forward(work)

    def _step(self, work: StepWork) -> None:
        began = time.monotonic()
        sampled, logits = self._engine.step(work.batch, work.want_logits, self._control)
        now = time.monotonic()
        self._control.step_done()
        if work.n_prefill_tokens:
            self._pace(work.batch.n_decode, work.n_prefill_tokens, now - began)
        tokens = [int(token) for token in sampled]
        for row, (seq, token) in enumerate(zip(work.outputs, tokens, strict=True)):
            entry = self._entries.get(seq.seq_id)
            if entry is not None and isinstance(entry.job, Job):
                if entry.job.first_token_at is None:
                    entry.job.first_token_at = now
                    entry.job.cached_tokens = seq.n_cached
                if seq.want_logits and logits is not None and token >= 0:
                    self._add_logprobs(entry.job, logits[row], token)
        ended = self._scheduler.done_step(work, tokens)
        self._ring.put_many([seq.seq_id for seq in work.outputs], tokens)
        self._mark_ends(ended)

    def _forward(self, work: LogitsWork) -> None:
        began = time.monotonic()
        logits = self._engine.forward(work.batch, control=self._control)
        self._control.step_done()
        first = work.seq.n_past
        ended = self._scheduler.done_logits(work)
        entry = self._entries.get(work.seq.seq_id)
        if entry is not None and isinstance(entry.job, LogitsJob | ScoreJob):
            try:
                entry.job.take(first, logits)
            except Exception as error:
                entry.job.end(as_worker_error(error, "the logits could not be kept"))
            if ended:
                entry.job.complete()
        self._pace(len(logits), len(logits), time.monotonic() - began)

    def _add_logprobs(self, job: Job, logits: np.ndarray, token: int) -> None:
        try:
            job.add_logprobs(token, top_logprobs(logits, token, job.params.logprobs or 0))
        except Exception as error:
            job.end(as_worker_error(error, "the log-probabilities could not be made"))

    def _pace(self, n_decode: int, n_prefill_tokens: int, seconds: float) -> None:
        """Choose the prefill tokens of the next step so that it takes about `STEP_SECONDS`, the tokens of the sequences
        that decode included: there were `n_decode` of them, and there will be about as many."""
        if n_prefill_tokens >= MIN_PREFILL_TOKENS:  # a shorter chunk says little about how fast a long one is
            limit = self._scheduler.config.max_batch_tokens
            self._scheduler.max_prefill_tokens = prefill_tokens(n_decode, n_prefill_tokens, seconds, limit)

    def _mark_ends(self, ended: list[SequenceState]) -> None:
        for seq in ended:
            entry = self._entries.get(seq.seq_id)
            if entry is not None and isinstance(entry.job, Job):
                entry.job.ended_at = time.monotonic()
                self._ring.put(seq.seq_id, MARKS[str(seq.ended)])

    def end_running(self, error: WorkerError) -> None:
        """An engine call failed and its context lives: all sequences in the engine end, queued ones get their turn."""
        self._scheduler.forget_prefixes()
        for seq in self._scheduler.running:
            self._scheduler.drop(seq.seq_id)
            entry = self._entries.get(seq.seq_id)
            if entry is not None:
                entry.job.end(error)
