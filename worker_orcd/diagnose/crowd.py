"""A crowd of requests: what the scheduler makes of an engine when more of them come at once than run together.

All are submitted at once, each a prompt of random tokens of its own, greedy and with end-of-text ignored, so that each
gives as many tokens as was asked for. Nothing is done per token while they run: the engine thread notes its calls
(`EngineCall`), and the times of a request are its job's. Over HTTP the same requests are read by `served.read_streams`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from worker_orcd.diagnose.overhead import Device, serve_arguments
from worker_orcd.diagnose.served import COMPLETIONS, Worker, read_streams
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.llm import LLM
from worker_orcd.serving.engine_work import EngineCall

#: tokens of each request of the run that is not timed
_FIRST_TOKENS = 8


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        n_requests: in all, submitted at once.
        n_prompt, n_tokens: of each of them.
        n_streams: that run together at most.
        repeat: timed runs, after a short untimed one.
        http: over HTTP too.
    """

    n_requests: int
    n_prompt: int
    n_tokens: int
    n_streams: int
    repeat: int
    http: bool = False


@dataclass(frozen=True)
class CrowdTimes:
    """Of one way to the engine. Rates are medians over the runs, from the submission of all to the end of the last; the
    other times are those of all runs.

    Attributes:
        tokens_per_s: of prompts and answers together.
        answer_tokens_per_s: of answers alone.
        first_token_p50_ms, first_token_p99_ms: from the submission, the wait for a turn included.
        gap_p50_ms, gap_p99_ms: between two tokens of one request; None where no request has two. The steps of a decode
            run count as equally long; over HTTP the arrivals of pieces count, and those of one read have none.
    """

    tokens_per_s: float
    answer_tokens_per_s: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    gap_p50_ms: float | None
    gap_p99_ms: float | None


@dataclass(frozen=True)
class Crowd:
    """The result. `n_together` requests of this size fit the KV cache at once; where that is less than `n_streams`, no
    more run together. `http` is None where it was not asked for."""

    n_requests: int
    n_prompt: int
    n_tokens: int
    n_streams: int
    n_together: int
    generate: CrowdTimes
    http: CrowdTimes | None = None

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def measure(model: str, on: Device, asked: Asked, progress: Callable[[str], None] = lambda text: None) -> Crowd:
    """Measure it.

    Args:
        progress: called with the name of each part before it runs.

    Raises:
        InvalidRequest: a request does not fit the context of the model.
        WorkerError: what loading raises, or a request that failed.
    """
    progress(f"crowd of {asked.n_requests}")
    n_vocab, n_together, generated = _generate(model, on, asked)
    served = None
    if asked.http:
        progress("crowd over HTTP")
        served = _served(model, on, asked, n_vocab)
    return Crowd(asked.n_requests, asked.n_prompt, asked.n_tokens, asked.n_streams, n_together, generated, served)


def random_prompts(n: int, n_tokens: int, n_vocab: int, seed: int) -> list[list[int]]:
    """`n` prompts of `n_tokens` ids of the whole vocabulary."""
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = rng.integers(0, n_vocab, (n, n_tokens)).tolist()
    return prompts


def gaps(calls: Iterable[EngineCall]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds between two tokens of a sequence, by the engine's calls in their order.

    Returns:
        (float64 [n], int64 [n]: how many gaps are so long).
    """
    before, seconds, counts = None, [], []
    for call in calls:
        if call.n_decode and before is not None:
            seconds.append((call.ended - before) / call.n_steps)
            counts.append(call.n_decode * call.n_steps)
        before = call.ended
    return np.array(seconds), np.array(counts, np.int64)


def percentile(seconds: np.ndarray, counts: np.ndarray, share: float) -> float | None:
    """The smallest of `seconds`, each there `counts` times, that at least `share` of them do not exceed; None: no
    seconds."""
    if not len(seconds):
        return None
    order = np.argsort(seconds)
    total = np.cumsum(counts[order])
    return float(seconds[order][np.searchsorted(total, share * total[-1])])


def in_ms(seconds: float | None) -> float | None:
    """Milliseconds."""
    return None if seconds is None else 1e3 * seconds


def _params(n_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, seed=0, max_tokens=n_tokens, ignore_eos=True)


def _times(
    asked: Asked, runs: Sequence[float], firsts: list[float], gap: Callable[[float], float | None]
) -> CrowdTimes:
    seconds, once = statistics.median(runs), np.ones(len(firsts), np.int64)
    first = [percentile(np.array(firsts), once, share) or 0.0 for share in (0.5, 0.99)]
    answers = asked.n_requests * asked.n_tokens / seconds
    return CrowdTimes(
        asked.n_requests * asked.n_prompt / seconds + answers,
        answers,
        1e3 * first[0],
        1e3 * first[1],
        in_ms(gap(0.5)),
        in_ms(gap(0.99)),
    )


def _generate(model: str, on: Device, asked: Asked) -> tuple[int, int, CrowdTimes]:
    """(ids of the vocabulary, requests that fit together, times) of `LLM.generate`."""
    try:
        llm = LLM(
            model,
            **asdict(on),
            context_length=asked.n_prompt + asked.n_tokens,
            max_seqs=asked.n_streams,
            progress=False,
            warm_up=True,
            prefix_cache=False,
        )
    except InvalidRequest as error:
        if error.fields.get("field") != "context_length":
            raise
        raise InvalidRequest(
            f"--crowd of {asked.n_prompt} (--n-prompt) and {asked.n_tokens} tokens (--n-gen): {error.message}",
            field="crowd",
        ) from error
    with llm:
        prompts = random_prompts(asked.n_requests, asked.n_prompt, llm.info.n_vocab, 1)
        llm.generate(prompts[: asked.n_streams], _params(min(asked.n_tokens, _FIRST_TOKENS)))
        runs, firsts, all_gaps = [], [], []
        for _ in range(asked.repeat):
            calls: list[EngineCall] = []
            llm.on_engine_call(calls.append)
            began = time.perf_counter()
            done = llm.generate(prompts, _params(asked.n_tokens))
            runs.append(time.perf_counter() - began)
            llm.on_engine_call(None)
            firsts += [1e-3 * (one.timings.queue_ms + one.timings.prefill_ms) for one in done]
            all_gaps.append(gaps(calls))
        seconds, counts = (np.concatenate(part) for part in zip(*all_gaps, strict=True))
        times = _times(asked, runs, firsts, lambda share: percentile(seconds, counts, share))
        return llm.info.n_vocab, llm.info.full_context_seqs, times


def _served(model: str, on: Device, asked: Asked, n_vocab: int) -> CrowdTimes:
    """The same requests over HTTP."""
    prompts = random_prompts(asked.n_requests, asked.n_prompt, n_vocab, 1)
    size = ["--context-length", str(asked.n_prompt + asked.n_tokens), "--max-queue", str(asked.n_requests)]
    arguments = serve_arguments(model, on, asked.n_streams, asked.n_tokens)
    with Worker([*arguments, *size]) as worker:
        read_streams(worker.port, [_body(p, min(asked.n_tokens, _FIRST_TOKENS)) for p in prompts[:8]], COMPLETIONS)
        runs, firsts, arrivals = [], [], []
        for _ in range(asked.repeat):
            streams = read_streams(worker.port, [_body(p, asked.n_tokens) for p in prompts], COMPLETIONS)
            runs.append(max(s.ended for s in streams) - min(s.began for s in streams))
            firsts += [s.first_token for s in streams if s.arrivals]
            arrivals += [np.diff(s.arrivals) for s in streams]
    seconds = np.concatenate(arrivals)
    return _times(asked, runs, firsts, lambda share: percentile(seconds, np.ones(len(seconds), np.int64), share))


def _body(prompt: list[int], n_tokens: int) -> dict[str, object]:
    """Of `POST /v1/completions`, which takes token ids."""
    return {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
