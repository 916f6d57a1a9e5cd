"""EngineLoop: the threads between jobs and an engine, and what is asked of them from any other thread.

The engine thread is the only one that calls the engine (`EngineWork`), the output thread turns tokens into pieces and
watches deadlines (`Output`), and a third may watch whether the engine still answers (`Watchdog`). Whoever has news for
the engine thread (a new job, an end) writes it down under the lock and interrupts the decode run, which then returns at
its next token. Where nobody waits for what the engine computes any more, the step under way is aborted.

A job ends for its client at once; its slot and blocks are free at the next boundary between two engine calls. What a
sequence gets does not depend on when that is: tokens computed past its end are dropped.

The lock is for threads that no signal handler interrupts. What the main thread asks for is done by the `Deputy`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from worker_orcd._ring import TokenRing
from worker_orcd._text import TextDecoder
from worker_orcd.engine.protocol import Engine
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.engine.token_edits import token_edits
from worker_orcd.errors import (
    DuplicateJob,
    EngineHangs,
    InsufficientMemory,
    InternalError,
    ModelLoadError,
    NotReady,
    QueueFull,
    WorkerError,
    no_thread,
)
from worker_orcd.machine import free_memory
from worker_orcd.observe.stats import EngineStats
from worker_orcd.serving.deputy import Deputy
from worker_orcd.serving.detokenizer import Decoder, Detokenizer
from worker_orcd.serving.engine_work import EngineCall, EngineWork
from worker_orcd.serving.entry import Entry, as_worker_error
from worker_orcd.serving.job import Job
from worker_orcd.serving.logits_job import LogitsJob
from worker_orcd.serving.loop_stats import stats_of
from worker_orcd.serving.output import Output
from worker_orcd.serving.pace import Pace
from worker_orcd.serving.scheduler import Scheduler
from worker_orcd.serving.score_job import ScoreJob
from worker_orcd.serving.waiters import Waiters
from worker_orcd.serving.watchdog import Watchdog
from worker_orcd.serving.work import SequenceState

#: how long `close` waits for each thread; a call that hangs in the device keeps its thread, and the engine
JOIN_SECONDS = 2.0
_REMEMBERED = 4096


class EngineLoop:
    """Runs jobs on an engine until closed.

    Args:
        engine: any `Engine`; from now on only the engine thread calls it.
        scheduler: made for this engine.
        ring: carries the tokens. control: a `Control`, or an object like it.
        new_decoder: makes a stream decoder for one job; None for a model without a tokenizer.
        max_queue: jobs that may wait for a slot.
        on_fatal: called with the error, in a thread of the loop, when the loop has died: all jobs have ended by
            then and no new one is accepted.
        deputy: works for the main thread; None: there is no main thread that signals could interrupt.
        pace: what a warm-up has measured; None: nothing.
        watchdog_sec: the loop dies where no step ends for so long while there is work; 0: it waits for ever.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        ring: TokenRing,
        control: Any,
        *,
        new_decoder: Callable[[], Decoder] | None = None,
        max_queue: int = 64,
        on_fatal: Callable[[WorkerError], None] | None = None,
        deputy: Deputy | None = None,
        pace: Pace | None = None,
        watchdog_sec: float = 0.0,
    ) -> None:
        self._deputy = deputy or Deputy()
        self._engine = engine
        self._scheduler = scheduler
        self._ring = ring
        self._control = control
        self._new_decoder = new_decoder
        self._max_queue = max_queue
        self._on_fatal = on_fatal
        # the lock guards everything below it; the scheduler too is touched under it where its queue changes
        self._lock = threading.Condition()
        self._entries: dict[int, Entry] = {}  # by seq_id
        self._jobs: dict[str, Job] = {}  # by job_id
        self._recent: OrderedDict[str, None] = OrderedDict()  # ids of jobs that ended
        self._inbox: list[SequenceState] = []
        self._drops: list[int] = []
        self._called = False  # the engine thread was interrupted for the inbox and has not taken it in yet
        self._seq_ids = itertools.count(1)
        self._idle = Waiters()  # for the end of all jobs
        #: told of every job that has ended, by the thread that ended it, which it must not hold up
        self.on_job_end: Callable[[Job], None] | None = None
        self._accepting = True
        self._quit = False
        self._error: WorkerError | None = None
        pace = pace or Pace(engine.config.max_batch_tokens)
        self._work = EngineWork(engine, scheduler, ring, control, self._entries, pace)
        self._output = Output(ring, self._lock, self._entries)
        self._threads = [
            threading.Thread(target=self._run, args=(body,), name=name, daemon=True)
            for name, body in (("orcd-engine", self._run_engine), ("orcd-output", self._output.run))
        ]
        self._watchdog = Watchdog(watchdog_sec, lambda: control.n_steps, self._busy, self._hangs)
        if watchdog_sec > 0:
            self._threads.append(threading.Thread(target=self._watchdog.run, name="orcd-watchdog", daemon=True))
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self.close()
            raise no_thread("for the loop of the engine", error) from error

    # -- from any thread

    @property
    def error(self) -> WorkerError | None:
        """The error the loop died of, or None."""
        return self._error

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; `check` and `room_for` may be asked from any thread."""
        return self._scheduler

    def submit(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        seed: int,
        *,
        max_tokens: int,
        job_id: str | None = None,
        deadline: float | None = None,
        bounded: bool = True,
        bad_words: Sequence[Sequence[int]] = (),
        score: int | None = None,
    ) -> Job:
        """Queue a generation, or the scoring of a prompt.

        Args:
            prompt: int32 [n_prompt], not empty, ids of the vocabulary.
            params: checked already; `max_tokens` and `seed` are those in use.
            job_id: None makes one up.
            deadline: `time.monotonic()` at which the job ends with `InferenceTimeout`.
            bounded: whether the limit of the queue holds.
            bad_words: the tokens of each.
            score: generate nothing; the job is a `ScoreJob` with so many of the most likely tokens in each place.

        Raises:
            InvalidRequest, VramOom: it can never run.
            QueueFull, DuplicateJob, NotReady: not now.

        The main thread has it done by the deputy: in one errand with all that belongs together.
        """
        self._scheduler.check(len(prompt), 0 if score is not None else max_tokens)
        decoder = self._new_decoder() if self._new_decoder and score is None else None
        job_id = job_id or uuid.uuid4().hex
        with self._lock:
            self._check_accepting()
            if job_id in self._jobs:
                raise DuplicateJob(job_id)
            seq_id = next(self._seq_ids)
            text: Detokenizer | None = None
            if score is not None:
                job: Job = ScoreJob(job_id, seq_id, params, seed, prompt, score, deadline, self._ended, self._deputy)
                seq = SequenceState(seq_id, prompt, 0, stops=False)
            else:
                job = Job(job_id, seq_id, params, seed, len(prompt), deadline, self._ended, self._deputy)
                seq = SequenceState(
                    seq_id,
                    prompt,
                    max_tokens,
                    params if params.seed == seed else replace(params, seed=seed),
                    not params.ignore_eos,
                    params.logprobs is not None,
                    params.stop_token_ids,
                )
                stop_ids = frozenset(self._scheduler.stop_ids_of(seq))
                seq.edits = token_edits(params, bad_words, stop_ids)
                if decoder is None or isinstance(decoder, TextDecoder):
                    job.sink.decode_with(decoder, params.stop, stop_ids, params.min_tokens)
                else:
                    text = Detokenizer(job, decoder, stop_ids)
            if bounded:
                self._check_queue(seq)
            self._jobs[job_id] = job
            self._enqueue(Entry(seq, job, text))
            wake = deadline is not None and self._output.watch(deadline, seq_id)
        if wake:
            self._output.wake()
        return job

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is submitted inside begins together: the engine thread takes it in once, afterwards. Not for long, for
        nothing else can begin or end meanwhile."""
        with self._lock:
            yield

    def check_room(self, jobs: Sequence[tuple[str | None, np.ndarray, int]]) -> None:
        """Inside `together`: whether these jobs may be submitted, all of them, before the first one is.

        Args:
            jobs: of each its id, its prompt (int32 [n_prompt]) and the tokens that it generates.

        Raises:
            DuplicateJob: one of them runs. QueueFull: there is no room for all. NotReady: for none.
        """
        with self._lock:
            self._check_accepting()
            for job_id, _, _ in jobs:
                if job_id is not None and job_id in self._jobs:
                    raise DuplicateJob(job_id)
            arriving = [SequenceState(0, prompt, max_tokens) for _, prompt, max_tokens in jobs]
            before = self._scheduler.outlook(self._inbox)[1] if self._inbox else 0
            after = self._scheduler.outlook([*self._inbox, *arriving])[1]
            if after > before:
                self._check_queued(after)

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """Teacher-forced logits of int32 [n]: float32 [n, n_vocab]. Waits for its turn among the jobs.

        Raises:
            InvalidRequest, VramOom: too long. InsufficientMemory: the system gives none for the logits.
            NotReady: the loop is closed, or closes meanwhile.
        """
        self._scheduler.check(len(tokens), 0)
        shape = (len(tokens), self._engine.n_vocab)
        try:
            logits = np.empty(shape, np.float32)
        except MemoryError:
            needed, free = 4 * shape[0] * shape[1], free_memory()
            raise InsufficientMemory(
                f"logits of {shape[0]} x {shape[1]} need {needed:,} bytes of memory, and the system does not give them",
                needed,
                free,
            ) from None
        job = LogitsJob(next(self._seq_ids), logits, self._ended)
        try:
            self._deputy.call(lambda: self._begin_logits(job, tokens))
            job.wait()
        except BaseException as error:  # KeyboardInterrupt: the caller goes, and with it the work
            gone = InternalError(f"interrupted by {type(error).__name__}")
            self._deputy.post(lambda: job.end(gone))
            raise
        if job.error is not None:
            raise job.error.with_traceback(None)
        return job.logits

    def on_call(self, told: Callable[[EngineCall], object] | None) -> None:
        """Have `told` called for every call of the engine, by its thread, which it must not hold up; None: nobody."""
        self._work.on_call = told

    def job(self, job_id: str) -> Job | None:
        """The queued or running job of this id."""
        return self._jobs.get(job_id)

    def cancel(self, job_id: str) -> str:
        """Cancel a job: "cancelling", or "finished" or "unknown" where there is nothing to cancel."""
        job = self._jobs.get(job_id)
        if job is None:
            return "finished" if job_id in self._recent else "unknown"
        job.cancel()
        return "cancelling"

    def stats(self) -> EngineStats:
        """The state of the loop; waits for nothing."""
        return stats_of(self._scheduler, self._entries, len(self._inbox))

    def shutdown(self, grace: float) -> None:
        """Accept no new jobs, give the others `grace` seconds, end the rest with `NotReady`; no work follows."""
        self._deputy.call(self._stop_accepting)
        self._idle.wait_for(lambda: not self._entries, max(grace, 0.0))
        self._deputy.call(self._end_the_rest)

    def close(self) -> bool:
        """End all jobs and the threads.

        Returns:
            Whether the engine thread has ended, so that the engine may be closed. Idempotent.
        """
        self.shutdown(0.0)
        self._watchdog.close()
        engine_thread, *others = self._threads
        ended = _join(engine_thread)
        self._ring.close()
        for thread in others:
            _join(thread)
        return ended

    def owns(self, thread: threading.Thread) -> bool:
        """Whether it is one of the threads of the loop."""
        return thread in self._threads

    # -- inside

    def _begin_logits(self, job: LogitsJob, tokens: np.ndarray) -> None:
        with self._lock:
            self._check_accepting()
            self._enqueue(Entry(SequenceState(job.seq_id, tokens, 0, stops=False), job, None))

    def _stop_accepting(self) -> None:
        with self._lock:
            self._accepting = False

    def _end_the_rest(self) -> None:
        # before the jobs: clients wait for their last events, which a step between two of them would hold up
        self._stop_working()
        self._end_all(NotReady("the worker is shutting down"))

    def _stop_working(self) -> None:
        with self._lock:
            self._quit = True
            self._lock.notify_all()
            self._control.abort()

    # -- inside, with the lock held

    def _check_accepting(self) -> None:
        if self._error is not None:
            raise NotReady(f"the worker has failed: {self._error.message}")
        if not self._accepting:
            raise NotReady("the worker is shutting down")

    def _check_queue(self, seq: SequenceState) -> None:
        starts, n_wait = self._scheduler.outlook([*self._inbox, seq])
        if not starts:
            self._check_queued(n_wait)

    def _check_queued(self, n_arriving: int) -> None:
        if self._scheduler.n_waiting + n_arriving > self._max_queue:
            raise QueueFull(f"{self._max_queue} jobs are queued already; try again later", retry_after=1)

    def _enqueue(self, entry: Entry) -> None:
        self._entries[entry.seq.seq_id] = entry
        self._output.add(entry)
        self._inbox.append(entry.seq)
        self._lock.notify_all()
        if not self._called and self._scheduler.outlook(self._inbox)[0]:  # else it cannot start before another one ends
            self._called = True
            self._control.interrupt()

    # -- ends

    def _ended(self, job: Job | LogitsJob) -> None:
        """A job has ended for its client; called once for each, by the thread that ended it."""
        with self._lock:
            entry = self._entries.pop(job.seq_id, None)
            self._output.remove(job.seq_id)
            if job.job_id in self._jobs:
                # in this order: who looks without the lock finds it in one of the two
                self._recent[job.job_id] = None
                self._recent.move_to_end(job.job_id)
                del self._jobs[job.job_id]
                if len(self._recent) > _REMEMBERED:
                    self._recent.popitem(last=False)
            if entry is not None and entry.seq.ended is None:
                self._drops.append(job.seq_id)
                if self._work.unwanted():
                    self._control.abort()
                else:
                    self._control.interrupt()
            self._lock.notify_all()
            idle = not self._entries
        if self.on_job_end is not None and isinstance(job, Job):
            self.on_job_end(job)
        if idle:
            self._idle.notify_all()

    def _end_all(self, error: WorkerError) -> None:
        with self._lock:
            entries = list(self._entries.values())
        for entry in entries:
            entry.job.end(error)

    def _fail(self, error: WorkerError) -> None:
        """The loop is dead: end everything, tell the owner."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        self._stop_working()
        self._end_all(error)
        self._ring.close()
        if self._on_fatal is not None:
            self._on_fatal(error)

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # of a library, that is: no signal comes here
            self._fail(as_worker_error(error, "the loop failed"))

    # -- the watchdog's thread

    def _busy(self) -> bool:
        """Whether the engine thread must come back some time: with a step, or for the news."""
        with self._lock:
            waits = bool(self._drops) or any(entry.seq.ended is None for entry in self._entries.values())
        return (waits or self._work.in_call) and self._error is None

    def _hangs(self, seconds: float) -> None:
        self._fail(EngineHangs(f"the engine has finished no step for {seconds:g} s and has work to do"))

    # -- the engine thread

    def _run_engine(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._quit or self._inbox or self._drops or scheduler.running or scheduler.n_waiting
                )
                if self._quit:
                    return
                self._control.clear()
                self._called = False
                for seq in self._inbox:
                    scheduler.add(seq)
                for seq_id in self._drops:
                    scheduler.drop(seq_id)
                self._inbox.clear()
                self._drops.clear()
                admitted = scheduler.admit()
            try:
                self._work.begin(admitted)
                self._work.run()
            except BaseException as error:
                failure = as_worker_error(error, "the engine failed")
                # a file that changed stays so, and with it everything that is computed from its mapping
                if failure.sticky or isinstance(failure, ModelLoadError):
                    self._fail(failure)
                    return
                self._work.end_running(failure)


def _join(thread: threading.Thread) -> bool:
    if thread is threading.current_thread() or thread.ident is None:
        return True
    thread.join(JOIN_SECONDS)
    return not thread.is_alive()
