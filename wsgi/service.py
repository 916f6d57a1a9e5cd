"""Service: the life of the worker - loading, ready, unhealthy, stopping - and the one model it serves.

It holds what the resources share and answers health from memory. The server tells it to start
and to stop, and is told through `on_exit` when the process shall end and with which code.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import worker_orcd
from worker_orcd.config import ServeConfig
from worker_orcd.errors import Cancelled, CudaError, NotReady, WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.observe.metrics import Metrics
from worker_orcd.runtime.info import provenance_facts
from worker_orcd.wsgi.background import Background
from worker_orcd.wsgi.http_errors import from_exception
from worker_orcd.wsgi.openai.ids import MAX_JOBS, is_answer, job_ids
from worker_orcd.wsgi.places import Places

if TYPE_CHECKING:
    from worker_orcd.runtime.info import MemoryPlan
    from worker_orcd.runtime.llm import LLM
    from worker_orcd.wsgi.event_writer import EventWriter

#: exit codes: stopped as told, failed before ready, the engine died (of a poisoned CUDA context, as a rule)
EXIT_OK, EXIT_FAILED, EXIT_DEAD = 0, 1, 70
#: seconds that open streams get to send their terminal event once their jobs have ended
FLUSH_SEC = 0.5
#: facts of `ModelInfo` that the log tells of a load
_LOADED = ("quant_kind", "device", "lowering", "context_length", "kv_bytes", "vram_bytes")
#: facts of `ModelInfo` that say how many jobs run together
_CAPACITY = ("max_seqs", "kv_positions", "default_seqs", "full_context_seqs")
_PROGRESS_STEPS = (25, 50, 75, 100)

Progress = Callable[[int, int], None]
Fatal = Callable[[WorkerError], None]
OnPlan = Callable[["MemoryPlan", int], None]
Loader = Callable[[ServeConfig, Progress, Fatal, OnPlan], "LLM"]


def load_llm(config: ServeConfig, progress: Progress, on_fatal: Fatal, on_plan: OnPlan) -> LLM:
    """The `LLM` that `config` asks for. `progress(done, total)` is called with bytes while it loads, `on_plan` with the
    VRAM plan and the free bytes before it takes memory of a GPU, and `on_fatal` should the engine die later."""
    from worker_orcd.runtime.llm import LLM  # opens compiled modules, which a server with another model does not need

    return LLM(
        config.model,
        device=config.device,
        context_length=config.context_length,
        kv_cache_bytes=config.kv_cache_bytes,
        max_seqs=config.max_seqs,
        max_queue=config.max_queue,
        n_threads=config.n_threads,
        tokenizer=config.tokenizer,
        check_tensors=config.check_tensors,
        prefix_cache=config.prefix_cache,
        expect_sha256=config.expect_sha256,
        trusted_models=config.trusted_models,
        vram_limit_bytes=config.vram_limit_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        chunk_bytes=config.chunk_bytes,
        progress=True if config.progress_bar else progress,
        watchdog_sec=config.watchdog_sec,
        warm_up=True,
        on_fatal=on_fatal,
        on_plan=on_plan,
    )


class Service:
    """One model, its state and its streams. All methods may be called from any thread.

    `places` are those of the answers that are under way. `writer` watches their clients; None: nobody does. `warm_up`
    is called once the model is loaded, before jobs are accepted. An answer that keeps its thread for long calls
    `keep_thread` first, which raises where no thread would be left for others.

    Args:
        config: checked start-up values.
        events: the narration log.
        load: makes the LLM; runs in a thread of its own.
        url: where the worker listens, for the log.
        on_exit: called once with the exit code when the process shall end.
        on_ready: called once when jobs are accepted.
        terminate: asks for an orderly end of the whole server, as SIGTERM would.
    """

    def __init__(
        self,
        config: ServeConfig,
        events: EventLog,
        load: Loader = load_llm,
        url: str = "",
        on_exit: Callable[[int], None] = lambda code: None,
        terminate: Callable[[], None] = lambda: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.events = events
        self.url = url
        self.terminate = terminate
        self.on_exit = on_exit
        self.on_ready = on_ready
        self.exit_code = EXIT_OK
        self.places = Places(config.max_streams)
        self.writer: EventWriter | None = None
        self.keep_thread: Callable[[], None] = lambda: None
        self.warm_up: Callable[[], None] = lambda: None
        self.stop_deadline: float | None = None
        self.fingerprint: str | None = None  # of answers; chosen with the first, and the same for all
        self._load_llm = load
        self._lock = threading.Lock()
        self._state = "loading"
        self._percent = 0
        self._llm: LLM | None = None
        self._background: Background | None = None
        self._started_at = time.monotonic()
        self._facts: dict[str, Any] = {
            "worker_id": config.worker_id,
            "model": config.served_model_name or os.path.basename(config.model),
            "device": config.device,
        }
        self._dead = threading.Event()
        self.metrics = Metrics(worker_orcd.__version__, lambda: len(self.places), lambda: self._state == "ready")

    # -- what the resources ask

    @property
    def state(self) -> str:
        """ "loading" | "ready" | "unhealthy" | "stopping"."""
        return self._state

    @property
    def model(self) -> str:
        """The name by which the model is served."""
        return str(self._facts["model"])

    def llm(self) -> LLM:
        """The loaded model.

        Raises:
            NotReady: while loading, unhealthy or stopping.
        """
        llm = self._llm
        if self._state != "ready" or llm is None:
            reasons = {
                "loading": "the model is loading",
                "stopping": "the worker is shutting down",
                "unhealthy": "the worker is unhealthy",
            }
            raise NotReady(reasons.get(self._state, "the worker is not ready"))
        return llm

    def cancel(self, job_id: str) -> str:
        """Cancel a job, or all of an answer, also while stopping or unhealthy: it may be cancelled as long as it runs.

        Returns:
            "cancelling", "finished" or "unknown"; while the model loads there is no job, so every one is unknown.
        """
        llm = self._llm
        if llm is None:
            return "unknown"
        states = [llm.cancel(one) for one in (job_ids(job_id, MAX_JOBS) if is_answer(job_id) else [job_id])]
        return "cancelling" if "cancelling" in states else states[0]

    def health(self) -> tuple[bool, dict[str, object]]:
        """(healthy, what /health shows). Reads memory only."""
        state = self._state
        if state == "loading":
            return False, {"status": "loading", "percent": self._percent, **self._facts}
        status = {"ready": "healthy", "stopping": "stopping"}.get(state, "unhealthy")
        return state == "ready", {
            "status": status,
            **self._facts,
            "uptime_seconds": round(time.monotonic() - self._started_at, 1),
        }

    def note_error(self, error: WorkerError) -> None:
        """Look at an error on its way to a client: nothing works after a poisoned CUDA context."""
        if isinstance(error, CudaError) and error.sticky:
            self.engine_died(error)

    def engine_died(self, error: WorkerError) -> None:
        """The engine is of no more use: health goes unhealthy, streams send their last event, the process ends."""
        with self._lock:
            if self._state == "stopping" or self.exit_code == EXIT_DEAD:
                return
            self._state = "unhealthy"
            self.exit_code = EXIT_DEAD
        self.events.emit("error", "error", **error.details())
        self._dead.set()

    # -- life

    def start(self) -> None:
        """Begin to load, in a thread; with another that waits for the engine's death, which must need no new thread."""
        try:
            for body, name in ((self._leave_when_dead, "dead"), (self._load, "load")):
                threading.Thread(target=body, name=name, daemon=True).start()
        except RuntimeError as error:
            self.load_failed(error)

    def load_failed(self, error: BaseException) -> None:
        """The model is not loaded and will not be: say why, and end the process."""
        if self._state == "stopping":
            return
        known = from_exception(error)
        self.exit_code = EXIT_FAILED
        fields = {"device": self.config.device, "path": self.config.model, **known.details()}
        if known is not error:
            fields["cause"] = repr(error)
        self.events.emit("error", "error", **fields)
        self.on_exit(EXIT_FAILED)

    def stop(self, grace: float, on_streams_ended: Callable[[], None] = lambda: None) -> None:
        """Take no new jobs, give running ones `grace` seconds, end the rest with an error event, free the model.

        Returns when all that is done; later calls return at once. `on_streams_ended` is called before the model is
        freed, which may have to wait for a step of the engine.
        """
        with self._lock:
            if self._state == "stopping":
                return
            self._state = "stopping"
            self.stop_deadline = time.monotonic() + grace
            llm, background, n_streams = self._llm, self._background, len(self.places)
        self.events.emit("shutdown", grace_sec=grace, streams=n_streams)
        if llm is not None:
            try:
                llm.shutdown(grace)
            except WorkerError as error:
                self.events.emit("error", "error", **error.details())
            # what has been generated may still be on its way to a slow reader
            self.places.wait_until_all_left(max(FLUSH_SEC, self.stop_deadline - time.monotonic()))
            on_streams_ended()
            if background is not None:
                background.stop()
            llm.close()

    def _leave_when_dead(self) -> None:
        self._dead.wait()
        self.places.wait_until_all_left(FLUSH_SEC)
        self.on_exit(EXIT_DEAD)

    def _load(self) -> None:
        try:
            self._load_and_begin()
        except BaseException as error:  # whatever it is, nothing else would say that the load has ended
            self.load_failed(error)

    def _load_and_begin(self) -> None:
        config, events = self.config, self.events
        size = os.path.getsize(config.model) if os.path.isfile(config.model) else None
        events.emit("model_load_start", path=config.model, bytes=size)
        self._show_progress(0)
        began = time.monotonic()
        llm = self._load_llm(config, self._progress, self.engine_died, self._show_plan)
        seconds = time.monotonic() - began - llm.warm_up_seconds
        info = llm.info.to_dict()
        with self._lock:
            if self._state == "loading":
                self._llm = llm
                self._facts = _facts(config, info)
        if self._llm is None:
            llm.close()
            return
        self._advance(100)
        self.metrics.model_loaded(str(self._facts["model"]), seconds, info)
        self.metrics.watch(llm.stats)
        llm.on_job_end(self.metrics.job_ended)
        n_bytes = info.get("model_bytes") or size or 0
        events.emit(
            "model_load_complete",
            bytes=n_bytes,
            seconds=seconds,
            gb_per_s=n_bytes / 1e9 / max(seconds, 1e-9),
            warm_up_seconds=llm.warm_up_seconds,
            **{k: info.get(k) for k in _LOADED},
        )
        for path in info.get("slow_paths") or ():
            events.emit("slow_path", message=path)
        if info.get("tokenizer_source") == "beside":
            reason = "the model file holds no vocabulary; the tokenizer.json beside it is used"
            events.emit("tokenizer_beside", "warning", path=info["tokenizer_path"], message=reason)
        if info.get("verified_by") is not None:
            events.emit("provenance", **provenance_facts(info))
        self.warm_up()
        background = Background(
            llm, events, config.residency_check_sec, self._not_resident, self.engine_died, self._know_digest
        )
        with self._lock:
            if self._state != "loading":
                return
            self._background = background
        background.start()
        with self._lock:
            if self._state != "loading":
                return
            self._state = "ready"
        seqs = {name: info.get(name) for name in _CAPACITY}
        events.emit("ready", url=self.url, seconds=time.monotonic() - self._started_at, **seqs)
        self.on_ready()
        background.begin()
        if config.print_curl:
            try:
                print(curl_line(self.url, config.api_key is not None), flush=True)
            except OSError:
                pass  # nobody reads our standard output

    def _not_resident(self, faults: list[str]) -> None:
        """Memory of the model is not where it was put: no more jobs, and health says so."""
        with self._lock:
            self._facts = {**self._facts, "resident": False}
            if self._state == "ready":
                self._state = "unhealthy"

    def _know_digest(self, digest: str) -> None:
        with self._lock:
            self._facts = {**self._facts, "sha256": digest}

    def _show_plan(self, plan: MemoryPlan, free: int) -> None:
        self.metrics.vram_planned(plan.to_dict())
        self.events.emit("vram_plan", **plan.to_dict(), bytes_free=free)

    def _progress(self, done: int, total: int) -> None:
        if self._state == "stopping":
            raise Cancelled("the worker is shutting down")
        self._advance(min(99, 100 * done // total if total else 99))

    def _advance(self, percent: int) -> None:
        """Show each step that lies between the last percent and this one."""
        for step in _PROGRESS_STEPS:
            if self._percent < step <= percent:
                self._show_progress(step)
        self._percent = max(self._percent, percent)

    def _show_progress(self, percent: int) -> None:
        if not self.config.progress_bar:
            self.events.emit("model_load_progress", percent=percent)


def curl_line(url: str, with_key: bool) -> str:
    """A command that streams a first completion from the worker at `url`."""
    key = '-H "Authorization: Bearer $WORKER_ORCD_API_KEY" ' if with_key else ""
    body = '{"job_id":"hello","prompt":"Write a haiku about the sea","max_tokens":64,"seed":42}'
    return f"curl -N {key}{url}/execute -H 'Content-Type: application/json' -d '{body}'"


def _facts(config: ServeConfig, info: dict[str, Any]) -> dict[str, Any]:
    """What /health shows of a loaded model."""
    return {
        "worker_id": config.worker_id,
        "model": config.served_model_name or info.get("name") or os.path.basename(config.model),
        "resident": True,
        "quant_kind": info.get("quant_kind"),
        "vram_bytes_used": info.get("vram_bytes", 0),
        "tokenizer_kind": info.get("tokenizer_kind"),
        "vocab_size": info.get("n_vocab"),
        "context_length": info.get("context_length"),
        **{name: info.get(name) for name in _CAPACITY},
        "sm": info.get("sm"),
        "cuda_runtime_version": info.get("cuda_runtime_version"),
        "device": info.get("device"),
        **provenance_facts(info),
    }
