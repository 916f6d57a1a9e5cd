"""EngineWork: what the engine thread does between two looks at the news.

A ragged step while prompts are pending, else a decode run of many steps without the GIL. Tokens and the marks that end
a sequence go through one ring, so their order is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker_orcd.engine.protocol import Engine, StepAborted
from worker_orcd.errors import WorkerError
from worker_orcd.serving.entry import MARKS, Entry, as_worker_error
from worker_orcd.serving.job import Job
from worker_orcd.serving.logits_job import LogitsJob
from worker_orcd.serving.logprobs import top_logprobs
from worker_orcd.serving.pace import Pace
from worker_orcd.serving.scheduler import Scheduler
from worker_orcd.serving.score_job import ScoreJob
from worker_orcd.serving.work import DecodeWork, LogitsWork, SequenceState, StepWork


@dataclass(frozen=True)
class EngineCall:
    """A call of the engine that gave tokens, for who measures.

    Attributes:
        n_decode: sequences that got a token after another in each of its steps.
        n_prompt: prompt tokens that it computed.
        n_steps: steps, 1 but for decode runs.
        began, ended: `time.monotonic()` before it was chosen and after its tokens were handed on.
    """

    n_decode: int
    n_prompt: int
    n_steps: int
    began: float
    ended: float


class EngineWork:
    """Runs what the scheduler chooses. For the engine thread alone.

    Args:
        engine, scheduler, ring, control: as of `EngineLoop`.
        entries: the sequences that have not ended for their clients, by seq_id; others change it.
        pace: what is known of the engine's times; it is told of each step from now on.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        ring: Any,
        control: Any,
        entries: Mapping[int, Entry],
        pace: Pace,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._ring = ring
        self._control = control
        self._entries = entries
        #: sequences of the engine call under way
        self._in_call: tuple[int, ...] = ()
        self._pace = scheduler.pace = pace
        #: told of each `EngineCall`, by the engine thread
        self.on_call: Callable[[EngineCall], object] | None = None

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
        began = time.monotonic()
        work = self._scheduler.next_work()
        if work is None:
            return
        self._in_call = tuple(seq.seq_id for seq in work.seqs)
        try:
            # who ends a sequence from now on sees it in the call; one that ended before is told of here
            if not self.unwanted():
                n_steps = self._call(work)
                self._measured(work, n_steps, began, time.monotonic())
        except StepAborted:
            pass
        finally:
            self._in_call = ()

    def _call(self, work: StepWork | LogitsWork | DecodeWork) -> int:
        """Returns the steps done."""
        if isinstance(work, DecodeWork):
            began = time.monotonic()
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
            if len(sampled):  # one of many takes no part of what comes before and after them
                self._pace.decode_took(len(work.seqs), (time.monotonic() - began) / len(sampled))
            self._mark_ends(self._scheduler.done_decode(work, sampled))
            return len(sampled)
        if isinstance(work, StepWork):
            self._step(work)
        else:
            self._forward(work)
        return 1

    def _step(self, work: StepWork) -> None:
        sampled, logits = self._engine.step(work.batch, work.want_logits, self._control)
        now = time.monotonic()
        self._control.step_done()
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

    def _add_logprobs(self, job: Job, logits: np.ndarray, token: int) -> None:
        try:
            job.add_logprobs(token, top_logprobs(logits, token, job.params.logprobs or 0))
        except Exception as error:
            job.end(as_worker_error(error, "the log-probabilities could not be made"))

    def _measured(self, work: StepWork | LogitsWork | DecodeWork, n_steps: int, began: float, ended: float) -> None:
        """Tell who wants to know what a call took with all that was done before and after it."""
        seconds = ended - began
        if isinstance(work, LogitsWork):
            self._pace.forward_took(len(work.batch.tokens), seconds)
            return
        n_decode, n_prompt = len(work.seqs), 0
        if isinstance(work, StepWork):
            n_decode, n_prompt = work.batch.n_decode, work.n_prefill_tokens
            if n_prompt:
                self._pace.step_took(n_decode + n_prompt, seconds)
            else:
                self._pace.decode_took(n_decode, seconds)
        if self.on_call is not None and n_steps:
            self.on_call(EngineCall(n_decode, n_prompt, n_steps, began, ended))

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
