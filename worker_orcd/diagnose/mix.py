"""Running streams beside prompts: how evenly streams go on while others' prompts are read, and how fast those are.

Streams decode answers of up to 2,048 tokens from short prompts, and each that ends begins anew; their first answers are
of different lengths, so that they do not end together. They are measured alone, and then with one long prompt always
pending: each gives one token, and the next comes when it has. Nothing is done per token while they run: the engine
thread notes its calls (`EngineCall`).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from worker_orcd.diagnose.crowd import gaps, in_ms, percentile, random_prompts
from worker_orcd.diagnose.overhead import Device
from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InternalError, InvalidRequest
from worker_orcd.runtime.llm import LLM
from worker_orcd.runtime.request import Request
from worker_orcd.serving.engine_work import EngineCall
from worker_orcd.serving.job import Job

#: tokens of a stream's prompt, and of its answer at most and at least
_PROMPT, _ANSWER, _LEAST = 16, 2048, 32
#: requests of one submission
_TOGETHER = 256


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        n_prompt: tokens of each prompt that arrives.
        n_streams: that decode all the time.
        seconds: of each of the two measurements.
    """

    n_prompt: int
    n_streams: int
    seconds: float


@dataclass(frozen=True)
class MixTimes:
    """Of one measurement.

    Attributes:
        gap_p50_ms, gap_p99_ms: between two tokens of a stream; the steps of a decode run count as equally long.
        gap_ratio: of the two.
        decode_tokens_per_s: of all streams together.
        prompt_tokens_per_s: computed of prompts, the short ones of streams that begin anew among them.
        first_token_ms: median of the time from an arriving prompt's submission to its token; None where none has one.
    """

    gap_p50_ms: float
    gap_p99_ms: float
    gap_ratio: float
    decode_tokens_per_s: float
    prompt_tokens_per_s: float
    first_token_ms: float | None


@dataclass(frozen=True)
class Mix:
    """The result: `alone` without arrivals, `mixed` with them."""

    n_prompt: int
    n_streams: int
    seconds: float
    alone: MixTimes
    mixed: MixTimes

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def measure(model: str, on: Device, asked: Asked, progress: Callable[[str], None] = lambda text: None) -> Mix:
    """Measure both.

    Args:
        progress: called with the name of each part before it runs.

    Raises:
        InvalidRequest: the context does not hold such a prompt, or the KV cache not so many streams.
        WorkerError: what loading raises, or a stream or prompt that failed.
    """
    progress("mix, load")
    try:
        llm = LLM(
            model,
            **asdict(on),
            max_seqs=asked.n_streams + 1,
            max_queue=max(asked.n_streams, _TOGETHER),
            progress=False,
            warm_up=True,
            prefix_cache=False,
        )
    except InvalidRequest as error:
        if error.fields.get("field") != "max_seqs":
            raise
        raise InvalidRequest(
            f"--mix takes one sequence more than --streams {asked.n_streams}: {error.message}", field="streams"
        ) from error
    with llm:
        mixing = _Mixing(llm, asked, _answer_tokens(llm, asked))
        mixing.begin()
        progress(f"{asked.n_streams} streams alone")
        alone = mixing.measure(arrivals=False)
        progress(f"{asked.n_streams} streams and prompts of {asked.n_prompt}")
        mixed = mixing.measure(arrivals=True)
        mixing.end()
    return Mix(asked.n_prompt, asked.n_streams, asked.seconds, alone, mixed)


def _answer_tokens(llm: LLM, asked: Asked) -> int:
    """Tokens of an answer for which all streams run together, and a prompt beside them."""
    context, held = llm.info.context_length, llm.info.kv_positions
    if asked.n_prompt + 1 > context:
        raise InvalidRequest(
            f"--mix {asked.n_prompt}: such a prompt and its token need {asked.n_prompt + 1} positions; the context has "
            f"{context}",
            field="mix",
        )
    n = min(_ANSWER, context - _PROMPT)
    if held is not None:  # in whole blocks
        left = held // BLOCK_SIZE - -(-asked.n_prompt // BLOCK_SIZE)
        n = min(n, left // asked.n_streams * BLOCK_SIZE - _PROMPT)
    if n < min(_LEAST, context - _PROMPT):
        raise InvalidRequest(
            f"--streams {asked.n_streams}: the KV cache of {held} positions does not hold so many beside a prompt of "
            f"{asked.n_prompt} tokens",
            field="streams",
        )
    return n


class _Mixing:
    """The streams, and the prompts that come."""

    def __init__(self, llm: LLM, asked: Asked, n_tokens: int) -> None:
        self._llm, self._asked, self._n_tokens = llm, asked, n_tokens
        self._ended: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._streams: dict[str, Job] = {}
        self._prompt: Job | None = None
        self._firsts: list[float] = []
        self._n = 0
        llm.on_job_end(self._ended.put)

    def begin(self) -> None:
        """Start the streams, and wait until all decode."""
        n = self._asked.n_streams
        first = [self._request(_PROMPT, max(self._n_tokens * (i + 1) // n, 1)) for i in range(n)]
        for at in range(0, n, _TOGETHER):
            jobs = self._llm.submit_requests(first[at : at + _TOGETHER])
            self._streams.update((job.job_id, job) for job in jobs)
        while any(job.first_token_at is None for job in self._streams.values()):
            self._serve(0.02)

    def measure(self, arrivals: bool) -> MixTimes:
        """The times of the next seconds, after a first part that does not count."""
        seconds = self._asked.seconds
        self._arrive(arrivals)
        self._serve(min(seconds / 4, 1.0))
        calls: list[EngineCall] = []
        self._firsts.clear()
        self._interrupt()
        self._llm.on_engine_call(calls.append)
        self._serve(seconds)
        self._arrive(False)
        self._interrupt()
        self._llm.on_engine_call(None)
        times, counts = gaps(calls)
        p50, p99 = percentile(times, counts, 0.5), percentile(times, counts, 0.99)
        if p50 is None or p99 is None:
            raise InternalError(f"no two steps in {seconds:g} s; give --seconds more")
        took = calls[-1].ended - calls[0].began
        return MixTimes(
            1e3 * p50,
            1e3 * p99,
            p99 / p50,
            sum(call.n_decode * call.n_steps for call in calls) / took,
            sum(call.n_prompt for call in calls) / took,
            in_ms(float(np.median(self._firsts)) if self._firsts else None),
        )

    def end(self) -> None:
        """Nothing begins any more."""
        for job in self._streams.values():
            job.cancel()
        self._streams.clear()

    def _request(self, n_prompt: int, n_tokens: int) -> Request:
        self._n += 1
        (prompt,) = random_prompts(1, n_prompt, self._llm.info.n_vocab, self._n)
        return Request(prompt, None, SamplingParams(temperature=0.0, seed=0, max_tokens=n_tokens, ignore_eos=True))

    def _arrive(self, arrivals: bool) -> None:
        if arrivals:
            self._prompt = self._llm.submit_request(self._request(self._asked.n_prompt, 1))
        elif (job := self._prompt) is not None:
            self._prompt = None  # nobody follows it
            job.cancel()

    def _interrupt(self) -> None:
        """Let a decode run that began before end here."""
        self._llm.submit_request(self._request(1, 1)).completion()

    def _serve(self, seconds: float) -> None:
        """Start anew what ends, for so long.

        Raises:
            WorkerError: what ended one of them.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                job = self._ended.get(timeout=left)
            except queue.Empty:
                return
            if job is self._prompt:
                self._arrive(True)
                done = job.completion().timings
                self._firsts.append(1e-3 * (done.queue_ms + done.prefill_ms))
            elif self._streams.pop(job.job_id, None) is not None:
                new = self._llm.submit_request(self._request(_PROMPT, self._n_tokens))
                self._streams[new.job_id] = new
                job.completion()
