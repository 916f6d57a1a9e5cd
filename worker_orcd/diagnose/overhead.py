"""What HTTP costs: one stream of a served model beside its engine, and many beside `LLM.generate`.

The model is loaded three times, one after the other: as an engine alone, as an `LLM`, and in a worker process that
serves it. All get the same prompts and seeds, so that they generate the same tokens, and none has a prefix cache: a
prompt that comes again is computed again, as the engine alone does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from worker_orcd.config import GPU_MEMORY_UTILIZATION
from worker_orcd.diagnose.bench import Bench
from worker_orcd.diagnose.served import StreamTimes, Worker, read_streams
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime import devices, sizing
from worker_orcd.runtime.llm import LLM

#: what the one stream goes on from, greedily: even a model of the smallest ends no text that counts
_COUNTING = "Count to one thousand: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
#: what each of many streams goes on from, after a number of its own
_PROMPT = "Write a long story about a small robot that lives on a hill beside the sea and counts the ships."
#: said on both sides, whatever the file recommends
_ALL_TOKENS: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        n_tokens: of each stream at most; a stream may end before.
        n_streams: that are open together.
        repeat: timed runs, after one untimed.
    """

    n_tokens: int
    n_streams: int
    repeat: int


@dataclass(frozen=True)
class Device:
    """Where it runs; as the arguments of `LLM` of these names."""

    device: str
    n_threads: int = 0
    trusted_models: str | None = None
    vram_limit_bytes: int | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION


@dataclass(frozen=True)
class Overhead:
    """Medians over the repeats; the gaps are those of all timed runs. Rates are of all streams together.

    Attributes:
        tokens_in: of the prompt of the one stream.
        first_token_ms, per_token_ms: of one stream over HTTP, as its client sees it: from before the connection to the
            first token, and from a token to the next. None where no stream has a first or a second token.
        engine_first_token_ms, engine_per_token_ms: a step with a prompt of as many tokens, and a decode step, of the
            engine alone.
        generate_tokens_per_s: `LLM.generate` of the prompts of `n_streams` streams.
        http_tokens_per_s: the same streams over HTTP.
        gap_p50_ms, gap_p99_ms: between the arrivals of neighbouring tokens of one of these streams; tokens that arrive
            together have none.
    """

    tokens_in: int
    n_tokens: int
    engine_first_token_ms: float
    first_token_ms: float | None
    engine_per_token_ms: float
    per_token_ms: float | None
    n_streams: int
    generate_tokens_per_s: float
    http_tokens_per_s: float
    gap_p50_ms: float | None
    gap_p99_ms: float | None

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def measure(model: str, on: Device, asked: Asked, progress: Callable[[str], None] = lambda text: None) -> Overhead:
    """Measure all of it.

    Args:
        progress: called with the name of each part before it runs.

    Raises:
        InvalidRequest: the model has no tokenizer, or prompt and tokens do not fit its context.
        WorkerError: what loading raises, or a stream that failed.
    """
    prompts = [f"{n}. {_PROMPT}" for n in range(asked.n_streams)]
    progress("generate")
    tokens_in, generated = _generate(model, on, asked, prompts)
    progress("engine")
    first, per_token = _engine(model, on, asked, tokens_in)
    progress("serve")
    with Worker(_arguments(model, on, asked)) as worker:
        progress("1 stream")
        single = _repeated(worker.port, [_COUNTING], asked, temperature=0.0)
        progress(f"{asked.n_streams} streams")
        many = _repeated(worker.port, prompts, asked, temperature=1.0)
    gaps = sorted(gap for run in many for times in run for gap in times.gaps)
    firsts = [times.first_token for run in single for times in run if times.arrivals]
    steps = [times.per_token for run in single for times in run if times.per_token is not None]
    return Overhead(
        tokens_in=tokens_in,
        n_tokens=asked.n_tokens,
        engine_first_token_ms=1e3 * first,
        first_token_ms=1e3 * statistics.median(firsts) if firsts else None,
        engine_per_token_ms=1e3 * per_token,
        per_token_ms=1e3 * statistics.median(steps) if steps else None,
        n_streams=asked.n_streams,
        generate_tokens_per_s=generated,
        http_tokens_per_s=statistics.median(map(rate, many)),
        gap_p50_ms=1e3 * percentile(gaps, 0.50) if gaps else None,
        gap_p99_ms=1e3 * percentile(gaps, 0.99) if gaps else None,
    )


def rate(run: Sequence[StreamTimes]) -> float:
    """Tokens a second of streams that began together, from the first connection to the last end."""
    seconds = max(times.ended for times in run) - min(times.began for times in run)
    return sum(times.tokens_out for times in run) / seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ascending `values` that at least `share` of them do not exceed."""
    return values[min(int(share * len(values)), len(values) - 1)]


def _max_seqs(on: Device, asked: Asked) -> int:
    """All streams run together where the device can; on a GPU the others wait for their turn."""
    return asked.n_streams if devices.resolve(on.device) == "cpu" else min(asked.n_streams, sizing.MAX_SEQS)


def _params(n: int, asked: Asked, temperature: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=n, max_tokens=asked.n_tokens, **_ALL_TOKENS)


def _generate(model: str, on: Device, asked: Asked, prompts: list[str]) -> tuple[int, float]:
    """Tokens of the prompt of the one stream, and tokens a second of all of `prompts` together."""
    with LLM(
        model,
        device=on.device,
        n_threads=on.n_threads,
        trusted_models=on.trusted_models,
        vram_limit_bytes=on.vram_limit_bytes,
        max_seqs=_max_seqs(on, asked),
        progress=False,
        warm_up=True,
        prefix_cache=False,
        gpu_memory_utilization=on.gpu_memory_utilization,
    ) as llm:
        if llm.tokenizer is None:
            raise InvalidRequest("what HTTP costs is measured on a text, and the model has no tokenizer", field="http")
        params = [_params(n, asked, 1.0) for n in range(len(prompts))]
        rates = []
        for _ in range(1 + asked.repeat):
            began = time.perf_counter()
            done = llm.generate(prompts, params)
            rates.append(sum(len(one.token_ids) for one in done) / (time.perf_counter() - began))
        return len(llm.tokenizer.encode(_COUNTING)), statistics.median(rates[1:])


def _engine(model: str, on: Device, asked: Asked, tokens_in: int) -> tuple[float, float]:
    """Seconds of a prompt's step and of a decode step, of the engine alone."""
    with Bench(
        model,
        on.device,
        max(tokens_in, asked.n_tokens),
        n_threads=on.n_threads,
        trusted_models=on.trusted_models,
        vram_limit_bytes=on.vram_limit_bytes,
        gpu_memory_utilization=on.gpu_memory_utilization,
    ) as bench:
        bench.prefill(tokens_in)
        bench.decode(asked.n_tokens)
        first = statistics.median(bench.prefill(tokens_in) for _ in range(asked.repeat))
        steps = statistics.median(bench.decode(asked.n_tokens)[0] for _ in range(asked.repeat))
        return first, steps / asked.n_tokens


def serve_arguments(model: str, on: Device, max_seqs: int, n_tokens: int) -> list[str]:
    """Of `serve`, for requests of at most `n_tokens` tokens, `max_seqs` of which run together."""
    out = ["--model", model, "--device", on.device, "--threads", str(on.n_threads), "--no-prefix-cache"]
    out += ["--max-seqs", str(max_seqs), "--max-tokens-out", str(n_tokens)]
    out += ["--gpu-memory-utilization", str(on.gpu_memory_utilization)]
    if on.trusted_models is not None:
        out += ["--trusted-models", on.trusted_models]
    if on.vram_limit_bytes is not None:
        out += ["--vram-limit-mb", str(on.vram_limit_bytes >> 20)]
    return out


def _arguments(model: str, on: Device, asked: Asked) -> list[str]:
    arguments = serve_arguments(model, on, _max_seqs(on, asked), asked.n_tokens)
    return [*arguments, "--max-queue", str(asked.n_streams)]


def _repeated(port: int, prompts: list[str], asked: Asked, temperature: float) -> list[list[StreamTimes]]:
    """The timed runs of these streams, after one that is not."""
    runs = []
    for repeat in range(1 + asked.repeat):
        bodies = [
            {
                "job_id": f"bench-{len(prompts)}-{repeat}-{n}",
                "prompt": prompt,
                "max_tokens": asked.n_tokens,
                "temperature": temperature,
                "seed": n,
                **_ALL_TOKENS,
            }
            for n, prompt in enumerate(prompts)
        ]
        runs.append(read_streams(port, bodies))
    return runs[1:]
