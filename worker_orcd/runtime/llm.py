"""LLM: a loaded model with its threads - the public Python API.

Puts the parts together (loaded model, scheduler, loop), turns prompts into jobs and jobs into results. What the parts
know of each other is only what is passed here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from worker_orcd.config import GPU_MEMORY_UTILIZATION, check_sha256, file_path
from worker_orcd.cuda.vram import VramPlan
from worker_orcd.engine.sampling import SamplingParams, plain_number
from worker_orcd.errors import InvalidRequest, WorkerError
from worker_orcd.gguf.digests import file_sha256
from worker_orcd.observe.stats import EngineStats
from worker_orcd.runtime.arguments import check_callable, check_count, check_counts, check_number
from worker_orcd.runtime.loading import LoadOptions
from worker_orcd.runtime.progress import Progress, bar, no_progress
from worker_orcd.runtime.request import (
    Limits,
    Messages,
    ModelParts,
    Prepared,
    Prompt,
    Request,
    check_job_id,
    check_seconds,
    check_token_ids,
    prepare,
    prompt_ids,
    requests_of,
)
from worker_orcd.runtime.running import Running
from worker_orcd.runtime.sampling_defaults import file_defaults
from worker_orcd.runtime.streams import is_terminal
from worker_orcd.runtime.token_stream import TokenStream
from worker_orcd.serving.deputy import Deputy
from worker_orcd.serving.engine_work import EngineCall
from worker_orcd.serving.job import Completion, Job

#: most tokens of one step
MAX_BATCH_TOKENS = 1 << 16
#: most jobs that may wait; a server takes fewer, because each of its jobs holds a thread
MAX_QUEUE = 1 << 20
#: jobs of one call that begin together; queueing so many takes a few milliseconds, in which nothing else begins or ends
STARTED_TOGETHER = 256


class LLM:
    """A model, loaded and ready. Use it as a context manager, or call `close`.

    Args:
        model: path of a GGUF file; of a split model the first part.
        device: "cpu", "cuda:N", or "auto": cuda:0 where there is a driver and a GPU, an error elsewhere.
        context_length: positions a sequence may reach; None: as many as the file says and the KV cache holds.
        kv_cache_bytes: size of the KV cache; None: on a GPU what fits, on the CPU what `max_seqs` sequences of 4,096
            positions need, at least 1 GiB, at most a quarter of the free memory. Never more than `max_seqs` sequences
            can use.
        max_seqs: sequences that run together, at most 256 on a GPU; None: 64, fewer where memory of the GPU is short.
        max_batch_tokens: tokens of one step (prompts and running sequences), at least `max_seqs`; None: by device,
            fewer where memory of the GPU is short.
        max_queue: jobs of `submit` that may wait for their turn.
        n_threads: threads of the CPU engine; 0: one for each core that the process may use.
        tokenizer: a tokenizer.json (or another GGUF file) in the place of the file's own vocabulary; None: that, and
            where the file has none a tokenizer.json beside it (`info.tokenizer_source` says which).
        check_tensors: refuse NaN and infinity in norms, biases and block scales, and on a GPU weights of K-quants above
            4,094.
        prefix_cache: compute what a prompt begins with only once, as far as the KV cache still holds it from earlier
            prompts and answers. What comes out is the same.
        progress: show the load. True: a progress bar where stderr is a terminal; or a callable (bytes done, bytes in
            all), which may raise to end the load. It is called from threads of the load.
        expect_sha256: hexadecimal digest that the file must have (of a split model: of its parts one after another).
        trusted_models: JSON list of the models that may be loaded, see docs/provenance.md; others are refused.
        vram_limit_bytes: device memory that weights, KV cache, workspace and reserve may take together on a GPU; None:
            what `gpu_memory_utilization` allows.
        gpu_memory_utilization: share of the GPU's memory that this process may take, above 0 to 1; its context counts
            too, and never more is taken than is free.
        chunk_bytes: bytes of one copy to the GPU.
        warm_up: do at the end of the load what the first request would have to wait for: a driver loads kernels when
            they are first used, and the process that renders chat templates has to start.
        watchdog_sec: the engine counts as dead where it has work and finishes no step for so many seconds; 0: never.
        on_fatal: called with the error when the engine has died; every job has ended by then.
        on_plan: called on a GPU with what the model will take (`vram.VramPlan`) and the bytes that are free, before
            anything is allocated; also where it does not fit, and again where less is tried.

    Attributes:
        info: what is loaded, a `ModelInfo`.
        tokenizer: the `Tokenizer`, or None where the file has none: then prompts are token ids.
        warm_up_seconds: what `warm_up` took; 0.0 without it.

    Raises:
        InvalidRequest: an argument breaks its rule.
        ModelLoadError: the file is not a good model, or not one that is expected or trusted.
        InsufficientVram, InsufficientMemory: the GPU, the system does not hold what was asked for; both numbers.
        CudaError: the device is not there or fails.
        InternalError: the system gives no thread.

    An interrupt (Ctrl-C) of the constructor ends the load and frees everything, and one of a call ends what the call
    asked for. A process that was forked from the one that loaded the model cannot use it: there all that computes or
    waits raises `EngineGone`, and `close` and the end of the process do nothing.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        context_length: int | None = None,
        kv_cache_bytes: int | None = None,
        max_seqs: int | None = None,
        max_batch_tokens: int | None = None,
        max_queue: int = 64,
        n_threads: int = 0,
        tokenizer: str | os.PathLike[str] | None = None,
        check_tensors: bool = True,
        prefix_cache: bool = True,
        progress: bool | Progress = True,
        expect_sha256: str | None = None,
        trusted_models: str | os.PathLike[str] | None = None,
        vram_limit_bytes: int | None = None,
        gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
        chunk_bytes: int = 1 << 20,
        watchdog_sec: float = 0.0,
        warm_up: bool = False,
        on_fatal: Callable[[WorkerError], None] | None = None,
        on_plan: Callable[[VramPlan, int], object] | None = None,
    ) -> None:
        model = file_path("model", model)
        tokenizer = None if tokenizer is None else file_path("tokenizer", tokenizer)
        trusted_models = None if trusted_models is None else file_path("trusted_models", trusted_models)
        numbers = (context_length, kv_cache_bytes, max_seqs, max_batch_tokens, max_queue, n_threads)
        context_length, kv_cache_bytes, max_seqs, max_batch_tokens, max_queue, n_threads = map(plain_number, numbers)
        vram_limit_bytes, chunk_bytes = plain_number(vram_limit_bytes), plain_number(chunk_bytes)
        gpu_memory_utilization, watchdog_sec = plain_number(gpu_memory_utilization), plain_number(watchdog_sec)
        check_counts(
            max_seqs=max_seqs,
            context_length=context_length,
            kv_cache_bytes=kv_cache_bytes,
            vram_limit_bytes=vram_limit_bytes,
        )
        check_counts(False, n_threads=n_threads, chunk_bytes=chunk_bytes)
        check_count("max_batch_tokens", max_batch_tokens, max_seqs or 1, MAX_BATCH_TOKENS, optional=True)
        check_count("max_queue", max_queue, 0, MAX_QUEUE)
        check_number("gpu_memory_utilization", gpu_memory_utilization)
        check_number("watchdog_sec", watchdog_sec)
        if expect_sha256 is not None:
            check_sha256("expect_sha256", expect_sha256)
        check_callable(progress=True if isinstance(progress, bool) else progress, on_fatal=on_fatal, on_plan=on_plan)
        options = LoadOptions(
            device=device,
            context_length=context_length,
            kv_cache_bytes=kv_cache_bytes,
            max_seqs=max_seqs,
            max_batch_tokens=max_batch_tokens,
            n_threads=n_threads,
            tokenizer=tokenizer,
            check_tensors=check_tensors,
            progress=progress,
            expect_sha256=expect_sha256,
            trusted_models=trusted_models,
            vram_limit_bytes=vram_limit_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            chunk_bytes=chunk_bytes,
            on_plan=on_plan,
        )
        deputy = self._deputy = Deputy()
        # there before anything that must be freed: an interrupt may come between any two lines
        running = self._running = Running()
        self._finalizer = weakref.finalize(self, _close, deputy, running)
        try:
            deputy.start()
            deputy.call(
                lambda: running.open(
                    model, options, max_queue, on_fatal, deputy, watchdog_sec, warm_up, bool(prefix_cache)
                )
            )
            loaded, self._loop = running.parts()
            self.info = loaded.info
            self.warm_up_seconds = running.warmed.seconds
            self.tokenizer = loaded.tokenizer
            self._scheduler = self._loop.scheduler
            self._bar = progress is True
            self._model_file = loaded.model_file
            self._sampling_defaults = file_defaults(loaded.model_file, loaded.info.n_vocab)
            self._residency_faults: Callable[[], list[str]] | None = getattr(loaded.engine, "check_residency", None)
        except BaseException:
            running.give_up()
            self.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- results

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue prompts, all of them together; each gets what it would get alone.

        Args:
            prompts: a list of prompts, each a str or a list of token ids; or one str.
            params: one for all, or one for each.

        Returns:
            The results in the order of the prompts.

        Raises:
            InvalidRequest, VramOom: a prompt or its params can never run; then none was started.
            WorkerError: what ended one of them; the others are cancelled.
        """
        self._deputy.check_process()
        return self._run(requests_of(prompts, params))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TokenStream:
        """Continue one prompt and iterate over the text as it comes; closing the iterator cancels.

        Raises:
            InvalidRequest, VramOom, QueueFull, NotReady: at once; the iterator raises what ends the job later.
        """
        jobs: list[Job] = []
        try:
            self._start([self._prepare(Request(prompt, None, _or_default(params)))], jobs)
            return TokenStream(self, jobs[0])
        except BaseException:
            self._abandon(jobs)
            raise

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Completion:
        """The assistant's next message in a conversation, by the chat template of the file.

        Args:
            messages: dicts with "role" and "content": a string, a list of parts {"type": "text", "text": ...} or, of
                an assistant, None.

        Raises:
            InvalidRequest: there is no tokenizer or no chat template, or the template refuses the messages.
            InternalError: the process that renders the template cannot be started, or was ended by something else.
        """
        self._deputy.check_process()
        # None is refused as no conversation, and not as a request that lacks a prompt
        return self._run([Request(messages=() if messages is None else messages, params=_or_default(params))])[0]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits: row i is what the model predicts after ids[0..i].

        Args:
            ids: token ids, at least one, at most the context.

        Returns:
            float32 [n_tokens, n_vocab].
        """
        self._deputy.check_process()
        return self._loop.forward(check_token_ids(ids, self.info.n_vocab, "ids"))

    # -- jobs

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        job_id: str | None = None,
        deadline: float | None = None,
        special: bool = False,
    ) -> Job:
        """Queue one prompt.

        Args:
            prompt: text or token ids.
            params: None: `SamplingParams()`.
            job_id: 1 to 256 characters; None makes one up.
            deadline: `time.monotonic()` at which the job ends with `InferenceTimeout`.
            special: take the text of control tokens in `prompt` for the tokens.

        Raises:
            InvalidRequest, VramOom: it can never run.
            QueueFull, DuplicateJob, NotReady: not now.
        """
        return self.submit_request(Request(prompt, None, _or_default(params), job_id, deadline, special))

    def submit_request(self, request: Request, limits: Limits | None = None) -> Job:
        """Queue a request.

        Args:
            request: what is asked.
            limits: what the caller allows beyond what the model can do.

        Raises:
            InvalidRequest, VramOom: it can never run.
            QueueFull, DuplicateJob, NotReady: not now.
        """
        return self.submit_requests([request], limits)[0]

    def submit_requests(self, requests: Sequence[Request], limits: Limits | None = None) -> list[Job]:
        """Queue requests, all of them or none; they begin together.

        Args:
            requests: up to `STARTED_TOGETHER`.
            limits: what the caller allows beyond what the model can do.

        Returns:
            Their jobs, in the order of the requests.

        Raises:
            InvalidRequest, VramOom: one can never run.
            QueueFull: there is no room for all. DuplicateJob, NotReady: not now.
        """
        if len(requests) > STARTED_TOGETHER:
            raise InvalidRequest(f"{len(requests)} requests; at most {STARTED_TOGETHER} begin together")
        jobs: list[Job] = []
        try:
            self._start([self._prepare(request, limits) for request in requests], jobs)
            return jobs
        except BaseException:
            self._abandon(jobs)
            raise

    def check_request(self, request: Request, limits: Limits | None = None) -> None:
        """Raise what `submit_request` would raise of a request that can never run.

        Raises:
            InvalidRequest, VramOom: it can never run.
        """
        self._prepare(request, limits)

    def prompt_ids(self, request: Request, limits: Limits | None = None) -> np.ndarray:
        """The tokens that the prompt or the messages of a request become: int32 [n_prompt].

        Raises:
            InvalidRequest: of what is wrong with these; nothing else of the request is looked at.
            InternalError: as `chat`.
        """
        self._deputy.check_process()
        parts = ModelParts(self.tokenizer, self.info.n_vocab, self._scheduler)
        return self._deputy.call(lambda: prompt_ids(parts, request, limits or Limits()))

    def job(self, job_id: str) -> Job | None:
        """The queued or running job of this id, None where there is none."""
        self._deputy.check_process()
        check_job_id(job_id)
        return self._loop.job(job_id)

    def cancel(self, job_id: str) -> str:
        """Cancel a job; "cancelling", or "finished" or "unknown" where there was nothing to do. Idempotent."""
        self._deputy.check_process()
        check_job_id(job_id)
        return self._loop.cancel(job_id)

    def stats(self) -> EngineStats:
        """How many jobs run and wait, and what is used of the KV cache; waits for nothing."""
        self._deputy.check_process()
        return self._loop.stats()

    def on_job_end(self, told: Callable[[Job], None]) -> None:
        """Have `told` called for every job that ends from now on, by the thread that ends it: it must not wait. The one
        that was named before is told no more."""
        self._loop.on_job_end = told

    def on_engine_call(self, told: Callable[[EngineCall], object] | None) -> None:
        """Have `told` called for every call of the engine that gave tokens, by the thread that makes them: it must not
        wait. None: nobody."""
        self._loop.on_call(told)

    @property
    def sampling_defaults(self) -> dict[str, int | float]:
        """Fields of `SamplingParams` for which the model file recommends a value, and that. `SamplingParams()` and
        `/execute` do not follow it."""
        return dict(self._sampling_defaults)

    @property
    def error(self) -> WorkerError | None:
        """What the engine died of; None while it lives."""
        return self._loop.error

    def check_residency(self) -> list[str]:
        """Ask the GPU's driver whether all memory of the model is still plain device memory. From any thread.

        Returns:
            What is wrong, a line for each fault; nothing on the CPU.

        Raises:
            CudaError: the driver does not answer.
        """
        self._deputy.check_process()
        return self._residency_faults() if self._residency_faults is not None else []

    def digest(self, progress: Callable[[int], None] = no_progress) -> str:
        """SHA-256 of the model file's bytes (of all parts, one after another); from then on `info` has it too.

        Args:
            progress: called with the bytes done; what it raises ends the work.

        Raises:
            ModelLoadError: the file was changed since it was loaded.
        """
        self._deputy.check_process()
        sha256 = self.info.sha256
        if sha256 is None:
            sha256 = file_sha256(self._model_file, progress)
            self.info = dataclasses.replace(self.info, sha256=sha256)
        return sha256

    def shutdown(self, grace: float = 0.0) -> None:
        """Take no new jobs, let running ones go on for up to `grace` seconds, end the rest with `NotReady`.

        Raises:
            InvalidRequest: grace is no number of seconds.
        """
        self._deputy.check_process()
        self._loop.shutdown(check_seconds("grace", grace))

    def close(self) -> None:
        """End everything and free the memory. Idempotent; also done when the object goes or the process exits.

        An interrupt ends the waiting; the work goes on, and another `close` waits for the rest of it.
        """
        _close(self._deputy, self._running)

    # -- inside

    def _prepare(self, request: Request, limits: Limits | None = None) -> Prepared:
        self._deputy.check_process()
        if not isinstance(request, Request):
            raise InvalidRequest(f"a request must be a Request, not {type(request).__name__}", field="request")
        parts = ModelParts(self.tokenizer, self.info.n_vocab, self._scheduler)
        if request.messages is None:
            return prepare(parts, request, limits or Limits())
        # an interrupt between question and answer of the process that renders would leave the answer for the next one
        return self._deputy.call(lambda: prepare(parts, request, limits or Limits()))

    def _start(self, ready: Sequence[Prepared], jobs: list[Job], bounded: bool = True) -> None:
        """Start them one after another; what is started is in `jobs`, also where this raises."""

        def start(some: Sequence[Prepared]) -> None:
            with self._loop.together():
                if bounded:  # before any of them is there: none takes room that others need
                    sizes = [(p.token_ids, 0 if p.score is not None else p.max_tokens) for p in some]
                    self._loop.check_room([(p.job_id, *size) for p, size in zip(some, sizes, strict=True)])
                for prepared in some:
                    job = self._loop.submit(
                        prepared.token_ids,
                        prepared.params,
                        prepared.seed,
                        max_tokens=prepared.max_tokens,
                        job_id=prepared.job_id,
                        deadline=prepared.deadline,
                        bounded=False,
                        bad_words=prepared.bad_words,
                        score=prepared.score,
                    )
                    jobs.append(job)

        def start_all() -> None:
            for first in range(0, len(ready), STARTED_TOGETHER):
                start(ready[first : first + STARTED_TOGETHER])

        self._deputy.call(start_all)

    def _abandon(self, jobs: list[Job]) -> None:
        """Cancel what was started, and what is being started while the caller is thrown out already."""

        def cancel() -> None:
            for job in jobs:
                job.cancel()

        self._deputy.post(cancel)

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        """All of them together, or none where one can never run."""
        ready = [self._prepare(request) for request in requests]
        jobs: list[Job] = []
        try:
            self._start(ready, jobs, bounded=False)
            return [job.completion() for job in self._with_bar(jobs)]
        except BaseException:
            self._abandon(jobs)
            raise

    def _with_bar(self, jobs: list[Job]) -> Iterable[Job]:
        if not self._bar or len(jobs) < 2 or not is_terminal(sys.stderr):
            return jobs
        shown: Iterable[Job] = bar(jobs, desc="generating", unit="prompt")
        return shown


def _or_default(params: SamplingParams | None) -> SamplingParams:
    # anything else that is false is refused where the request is checked
    return SamplingParams() if params is None else params


def _close(deputy: Deputy, running: Running) -> None:
    if deputy.forked:
        return  # the threads, the device and the processes are the parent's
    if running.in_own_thread():
        running.close()  # the deputy would wait for the thread that waits for it
        deputy.dismiss()
    else:
        deputy.finish(running.close)
