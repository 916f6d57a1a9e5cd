"""Job: one generation as its client sees it, from submission to its one terminal event.

Pieces come in order and complete; the job ends exactly once, with `Finished` or with an error. The first end wins, and
nothing follows it. Text and pieces lie in a `JobSink`, which the output thread fills without Python and which holds no
lock across a line of Python: a reader may be the main thread, which a signal handler can throw out anywhere. Python is
told of a piece only where somebody waits for one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from worker_orcd._output import JobSink
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import Cancelled, WorkerError
from worker_orcd.serving.deputy import Deputy
from worker_orcd.serving.waiters import Waiters


@dataclass(frozen=True)
class Timings:
    """Where the time of one job went, in milliseconds: waiting, prompt to first token, first to last token.

    `tokens_per_s` is the decode rate, tokens after the first over `decode_ms`; 0.0 where there is none.
    """

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    tokens_per_s: float


@dataclass(frozen=True)
class TextPiece:
    """The next text of a job. `index` counts pieces from 0.

    `token_ids` are the tokens that this text took; a token that is no whole character, or that may be the start of a
    stop string, waits for its successors. `text` is never empty, except for a model without a tokenizer, where there is
    one piece a token and no text.
    """

    text: str
    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """The terminal event of a job that ran to its end: "stop" (end-of-text or stop token, stop string) or "length".

    `stop_reason` as in `Completion`.
    """

    finish_reason: str
    tokens_out: int
    timings: Timings
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    Attributes:
        text: the text, without the stop string, stop token or end-of-text token that ended it.
        token_ids: the tokens generated. The end-of-text or stop token is not among them; the tokens that make up a stop
            string are.
        finish_reason: "stop" or "length".
        tokens_in: tokens of the prompt.
        seed: the seed used.
        timings: see `Timings`.
        logprobs: for each of `token_ids` a dict {token id: log-probability} of the most likely ones and the token
            itself, or None where they were not asked for.
        stop_reason: which of `stop_token_ids` or of `stop` ended it; None where the model's own end-of-text token or
            the length did.
        cached_tokens: those of `tokens_in` that were found in the prefix cache and not computed.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    tokens_in: int
    seed: int
    timings: Timings
    logprobs: tuple[dict[int, float], ...] | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0


class Job:
    """One submitted generation. Made by `LLM.submit`.

    Attributes:
        job_id: the caller's id, or one made up.
        seq_id: number of its sequence in the engine, never used twice.
        seed: the seed in use.
        tokens_in: tokens of the prompt.
        cached_tokens: those among them that were found in the prefix cache; final with the first token.
        params: checked; `max_tokens` and `seed` are those in use.
        deadline: `time.monotonic()` at which it ends with `InferenceTimeout`, or None.
        sink: its text and pieces.
        outcome: how it ended: "stop", "length" or the code of its error; None before.

    Every method that waits or cancels raises `EngineGone` in a process that was forked from that of the model.
    """

    def __init__(
        self,
        job_id: str,
        seq_id: int,
        params: SamplingParams,
        seed: int,
        tokens_in: int,
        deadline: float | None,
        on_end: Callable[[Job], None],
        deputy: Deputy | None = None,
    ) -> None:
        self.job_id = job_id
        self.seq_id = seq_id
        self.params = params
        self.seed = seed
        self.tokens_in = tokens_in
        self.cached_tokens = 0
        self.deadline = deadline
        self.submitted_at = time.monotonic()
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None  # when the engine had its last token
        self.outcome: str | None = None
        self._on_end = on_end
        self._deputy = deputy
        self._waiters = Waiters()  # for a piece or the end
        self._listener: Callable[[], object] | None = None
        self._feeding = threading.Lock()  # of those who end it; never taken by the main thread
        self.sink = JobSink()
        self._logprobs: list[dict[int, float]] = []
        self._drawn: list[int] = []  # the tokens of these
        self._ending = False
        self._end: Finished | WorkerError | None = None

    # -- the client's side

    @property
    def state(self) -> str:
        """ "queued" | "prefill" | "decode" | "finished"."""
        if self._end is not None:
            return "finished"
        if self.admitted_at is None:
            return "queued"
        return "prefill" if self.first_token_at is None else "decode"

    @property
    def finished(self) -> bool:
        """Whether the terminal event is there (pieces before it may still wait to be read)."""
        return self._end is not None

    @property
    def tokens_out(self) -> int:
        """Tokens generated so far, as `Completion.token_ids` counts them."""
        return self.sink.n_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens that it may generate."""
        return self.params.max_tokens or 0

    def next_event(self, timeout: float | None = None) -> TextPiece | Finished | None:
        """Wait for the next event.

        Args:
            timeout: seconds to wait; None waits for ever, 0 not at all.

        Returns:
            A `TextPiece`, the terminal `Finished` (again at every later call), or None when the time is over.

        Raises:
            WorkerError: the job's terminal error, after the pieces that came before it; again at every later call.
        """
        self._check_process()
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            end = self._end  # looked at first: once it is there, no piece comes any more
            piece = self.sink.take()
            if piece is not None:
                return TextPiece(*piece)
            if isinstance(end, WorkerError):
                raise end.with_traceback(None)
            if end is not None:
                return end
            left = None if until is None else until - time.monotonic()
            if not self._waiters.wait_for(lambda: self.sink.ready() or self._end is not None, left):
                return None

    def cancel(self) -> None:
        """End the job with `Cancelled`; no effect on one that has ended. Returns at once."""
        self._check_process()
        self.leave()

    def leave(self) -> None:
        """`cancel` for who has read enough: in a forked child it does nothing."""
        if self._deputy is None:
            self._cancel()
        elif not (self._ending or self._deputy.forked):
            self._deputy.call(self._cancel)

    def abandon(self) -> None:
        """`leave` for `__del__`: the garbage collector may call it in a thread that holds a lock of the loop."""
        if self._deputy is None or self._deputy.stands_in:
            self.leave()
        elif not (self._ending or self._deputy.forked):
            self._deputy.post(self._cancel)

    def completion(self) -> Completion:
        """Wait for the end and return the whole result, also of pieces read before.

        Raises:
            WorkerError: the job's terminal error.
        """
        self._check_process()
        self._waiters.wait_for(lambda: self._end is not None)
        end = self._end
        if isinstance(end, WorkerError):
            raise end.with_traceback(None)
        assert end is not None, "waiting had no limit"
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = tuple(self._logprobs[: self.sink.n_tokens])
        return Completion(
            self.sink.text,
            self.sink.token_ids,
            end.finish_reason,
            self.tokens_in,
            self.seed,
            end.timings,
            logprobs,
            end.stop_reason,
            self.cached_tokens,
        )

    def logprobs(self, first: int, n: int) -> list[dict[int, float]]:
        """What `Completion.logprobs` will hold of `n` tokens from number `first` on, whose pieces were read; where they
        were asked for."""
        return self._logprobs[first : first + n]

    def drawn(self, index: int) -> int | None:
        """The token number `index`; None where there is none, or where no log-probabilities were asked for. The one
        after those of a finished text ended it, unless a stop string did."""
        return self._drawn[index] if index < len(self._drawn) else None

    def timings(self) -> Timings:
        """The times so far."""
        now = time.monotonic()
        admitted = self.admitted_at or now
        first = self.first_token_at or now
        last = max(self.ended_at or now, first)
        after_first = max(self.sink.n_tokens - 1, 0)
        rate = after_first / (last - first) if after_first and last > first else 0.0
        return Timings(
            1e3 * (admitted - self.submitted_at), 1e3 * max(first - admitted, 0.0), 1e3 * (last - first), rate
        )

    def listen(self, listener: Callable[[], object]) -> None:
        """Have `listener` called at once, and whenever those who wait are told: at the end, and at a piece after
        `next_event` found none. It is called in the thread that feeds or ends the job, and must not wait."""
        self._listener = listener
        listener()

    # -- the loop's side

    def add_piece(self, text: str, token_ids: Iterable[int]) -> None:
        """Append a piece; no effect on a job that has ended."""
        if self.sink.add_piece(text, token_ids):
            self.tell()

    def add_silent_tokens(self, token_ids: Iterable[int]) -> None:
        """Record tokens that gave no text to show: part of the result, no piece."""
        self.sink.add_silent(token_ids)

    def tell(self) -> None:
        """Let those who wait look again."""
        self._waiters.notify_all()
        if self._listener is not None:
            self._listener()

    def add_logprobs(self, token: int, logprobs: dict[int, float]) -> None:
        """Record the log-probabilities of the next token."""
        self._drawn.append(token)
        self._logprobs.append(logprobs)

    def finish(self, finish_reason: str, stop_reason: int | str | None = None) -> bool:
        """End with `Finished`. Returns whether this call ended the job."""
        return self.end(Finished(finish_reason, self.sink.n_tokens, self.timings(), stop_reason))

    def end(self, end: Finished | WorkerError) -> bool:
        """End the job. Returns whether this call ended it: the first one wins."""
        with self._feeding:
            if self._ending:
                return False
            self._ending = True
            self.sink.close()
        self.outcome = end.finish_reason if isinstance(end, Finished) else end.code
        try:
            # before anyone can see the end: who has seen it may use the job's id again
            self._on_end(self)
        finally:
            self._end = end
            self.tell()
        return True

    def _cancel(self) -> None:
        self.end(Cancelled("the job was cancelled", job_id=self.job_id))

    def _check_process(self) -> None:
        if self._deputy is not None:
            self._deputy.check_process()
