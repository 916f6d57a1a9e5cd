"""Metrics: what Prometheus is told, under vLLM's names with `worker_orcd_` in the place of `vllm:`.

Everything is in memory. A job costs a few microseconds when it ends and nothing before; gauges, and the tokens of jobs
that still run, are read when somebody asks. docs/metrics.md lists all of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from worker_orcd.observe.histogram import Histogram
from worker_orcd.observe.stats import FINISHED, EngineStats, JobFacts

PREFIX = "worker_orcd_"
#: codes of ended jobs that are there from the start, so that a rate over them sees their first one
CODES = ("OK", "CANCELLED", "INFERENCE_TIMEOUT", "NOT_READY", "CUDA_ERROR", "INTERNAL")
#: likewise for answers that are errors
REFUSALS = (
    ("INVALID_REQUEST", 400),
    ("UNAUTHORIZED", 401),
    ("FORBIDDEN", 403),
    ("QUEUE_FULL", 429),
    ("NOT_READY", 503),
)
#: parts of the VRAM plan, each with its name there
_PARTS = {
    "weights": "weights_bytes",
    "kv_cache": "kv_bytes",
    "workspace": "workspace_bytes",
    "reserve": "reserve_bytes",
}
#: how vLLM calls what ended a job
REASONS = (*FINISHED, "abort", "error")
# vLLM's bounds; where a small model is faster than the first of them, finer ones come before
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *_FINE,
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class Metrics:
    """The metrics of one worker, in a registry of their own.

    All methods may be called from any thread.

    Args:
        version: of the package.
        n_streams: streams that are open now.
        ready: whether jobs are accepted now.
    """

    def __init__(self, version: str, n_streams: Callable[[], int], ready: Callable[[], bool]) -> None:
        # a second sample a series, with the time at which it began, which nobody reads
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        #: all but the histograms, which are written faster than the library does it
        self._others = registry = CollectorRegistry()
        self._engine = _EngineMetrics()
        registry.register(self._engine)

        self._histograms: list[Histogram] = []

        def histogram(name: str, what: str, bounds: tuple[float, ...]) -> Histogram:
            self._histograms.append(Histogram(f"{PREFIX}{name}", what, bounds))
            return self._histograms[-1]

        def seconds(name: str, what: str, bounds: tuple[float, ...] = _REQUEST) -> Histogram:
            return histogram(f"{name}_seconds", what, bounds)

        def tokens(name: str, what: str) -> Histogram:
            return histogram(name, what, _TOKENS)

        self._first_token = seconds("time_to_first_token", "From submission to the first token.", _FIRST_TOKEN)
        self._per_token = seconds(
            "request_time_per_output_token", "Mean time of a job's tokens after its first.", _PER_TOKEN
        )
        self._e2e = seconds("e2e_request_latency", "From submission to the last token, of jobs that finished.")
        self._queue = seconds("request_queue_time", "From submission to a slot.")
        self._inference = seconds("request_inference_time", "From a slot to the last token, of jobs that finished.")
        self._prefill = seconds("request_prefill_time", "From a slot to the first token.")
        self._decode = seconds("request_decode_time", "From the first token to the last, of jobs that finished.")
        self._prompt = tokens("request_prompt_tokens", "Tokens of a job's prompt.")
        self._generated = tokens("request_generation_tokens", "Tokens that a job generated.")
        self._max_tokens = tokens("request_params_max_tokens", "Tokens that a job might have generated.")

        success = Counter(
            f"{PREFIX}request_success", "Jobs that ended, by reason.", ["finished_reason"], registry=registry
        )
        self._reasons = {reason: success.labels(reason) for reason in REASONS}
        self._outcomes = Counter(
            f"{PREFIX}request_outcomes", "Jobs that ended: OK, or the code of their error.", ["code"], registry=registry
        )
        for code in CODES:
            self._outcomes.labels(code)
        self._errors = Counter(
            f"{PREFIX}http_errors",
            "Answers that are errors, by code and status.",
            ["code", "status"],
            registry=registry,
        )

        for code, status in REFUSALS:
            self._errors.labels(code, str(status))

        Gauge(f"{PREFIX}streams_open", "Streams that are open.", registry=registry).set_function(n_streams)
        Gauge(f"{PREFIX}ready", "1 where jobs are accepted.", registry=registry).set_function(lambda: int(ready()))
        self._load = Gauge(f"{PREFIX}load_seconds", "Time that loading the model took; 0 before.", registry=registry)
        self._model_bytes = Gauge(f"{PREFIX}model_bytes", "Bytes of the model file.", registry=registry)
        self._kv_bytes = Gauge(f"{PREFIX}kv_cache_bytes", "Bytes of the KV cache.", registry=registry)
        self._vram = Gauge(f"{PREFIX}vram_bytes", "Planned memory of the GPU, by part.", ["part"], registry=registry)
        self.vram_planned({})
        self._model = Info(f"{PREFIX}model", "The model that is loaded.", registry=registry)
        Info(f"{PREFIX}build", "The program.", registry=registry).info({"version": version})
        self.registry = CollectorRegistry()
        for part in (self._others, *self._histograms):
            self.registry.register(part)

    # -- what happens

    def job_ended(self, job: JobFacts) -> None:
        """A job has ended, however it did. Called once for each."""
        now = time.monotonic()
        outcome = job.outcome or "INTERNAL"
        finished = outcome in FINISHED
        last = job.ended_at or now
        self._engine.job_ended(job)
        self._outcomes.labels("OK" if finished else outcome).inc()
        self._reasons[outcome if finished else "abort" if outcome == "CANCELLED" else "error"].inc()
        self._prompt.observe(job.tokens_in)
        self._generated.observe(job.tokens_out)
        self._max_tokens.observe(job.max_tokens)
        admitted, first = job.admitted_at, job.first_token_at
        if admitted is not None:
            self._queue.observe(max(admitted - job.submitted_at, 0.0))
        if admitted is not None and first is not None:
            self._prefill.observe(max(first - admitted, 0.0))
            self._first_token.observe(max(first - job.submitted_at, 0.0))
        if finished:
            self._e2e.observe(max(last - job.submitted_at, 0.0))
        if finished and admitted is not None and first is not None:
            self._inference.observe(max(last - admitted, 0.0))
            self._decode.observe(max(last - first, 0.0))
            if job.tokens_out > 1:
                self._per_token.observe(max(last - first, 0.0) / (job.tokens_out - 1))

    def refused(self, code: str, status: int) -> None:
        """A request was answered with an error."""
        self._errors.labels(code, str(status)).inc()

    def vram_planned(self, plan: Mapping[str, int]) -> None:
        """What the model will take on the GPU, as `VramPlan.to_dict` has it; a later plan replaces an earlier one."""
        for part, key in _PARTS.items():
            self._vram.labels(part).set(plan.get(key, 0))

    def model_loaded(self, name: str, seconds: float, info: Mapping[str, object]) -> None:
        """The model is there: the name it is served under, what loading it took, and its `ModelInfo.to_dict`."""
        self._load.set(seconds)
        for gauge, key in ((self._model_bytes, "model_bytes"), (self._kv_bytes, "kv_bytes")):
            value = info.get(key)
            gauge.set(value if isinstance(value, int) else 0)
        facts = {key: info.get(key) for key in ("arch", "quant_kind", "device", "sm", "context_length")}
        self._model.info({"model_name": name, **{k: "" if v is None else str(v) for k, v in facts.items()}})

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Read the engine's state from `stats`, which must not wait for it, from now on."""
        self._engine.read = stats

    # -- what is told

    def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """(text, content type) for a client whose `Accept` header says this: OpenMetrics, or Prometheus's own form."""
        encode, content_type = choose_encoder(accept or "")
        if content_type.startswith("text/plain"):
            return encode(self._others) + "".join(h.text() for h in self._histograms).encode(), content_type
        return encode(self.registry), content_type


class _EngineMetrics(Collector):
    """What is read of the engine when somebody asks, and the tokens of all jobs, ended or not."""

    def __init__(self) -> None:
        self.read: Callable[[], EngineStats] = EngineStats
        self._lock = threading.Lock()
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0  # of jobs that have ended
        self._shown: dict[str, int] = {}

    def job_ended(self, job: JobFacts) -> None:
        with self._lock:
            self._generated_tokens += job.tokens_out
            if job.first_token_at is not None:
                self._prompt_tokens += job.tokens_in
                self._cached_tokens += job.cached_tokens

    def collect(self) -> Iterator[Metric]:
        """All families. Called by the registry."""
        with self._lock:
            prompt, cached, generated = self._prompt_tokens, self._cached_tokens, self._generated_tokens
        now = self.read()
        yield _gauge("num_requests_running", "Jobs that have a slot.", now.n_running)
        yield _gauge("num_requests_waiting", "Jobs that wait for a slot.", now.n_waiting)
        yield _gauge(
            "kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1; of the fullest group.", now.kv_usage
        )
        yield _gauge("kv_blocks", "Blocks of the KV cache.", now.n_kv_blocks)
        yield _gauge("kv_blocks_used", "KV blocks that running jobs own.", now.n_kv_blocks_used)
        yield _gauge("kv_blocks_cached", "KV blocks whose content the prefix cache knows.", now.n_kv_blocks_cached)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache.", now.prefix_queries
        )
        yield self._counter("prefix_cache_hits", "Those that were found there.", now.prefix_hits)
        yield self._counter("prompt_tokens", "Tokens of prompts.", prompt + now.prompt_tokens)
        yield self._counter(
            "prompt_tokens_cached", "Those that were in the prefix cache and not computed.", cached + now.cached_tokens
        )
        yield self._counter("generation_tokens", "Tokens generated.", generated + now.generated_tokens)

    def _counter(self, name: str, what: str, value: int) -> CounterMetricFamily:
        """A counter never falls: a job that ends just now is for a moment among neither those that run nor the rest."""
        with self._lock:
            shown = self._shown[name] = max(value, self._shown.get(name, 0))
        return CounterMetricFamily(f"{PREFIX}{name}", what, value=shown)


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}{name}", what, value=value)
