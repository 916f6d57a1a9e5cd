"""load: from a model file to an engine that is ready - verified, planned, sized, uploaded, with its tokenizer.

What can run side by side does: the tokenizer is made while the weights are copied and checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from worker_orcd.config import DEFAULT_MAX_TOKENS
from worker_orcd.cuda.vram import VramPlan
from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import Engine, EngineConfig
from worker_orcd.errors import InsufficientMemory, InsufficientVram, WorkerError
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.gguf.trusted_models import TrustedModels, Verified, verify
from worker_orcd.models import plan
from worker_orcd.runtime import devices, sizing
from worker_orcd.runtime.info import ModelInfo, model_facts
from worker_orcd.runtime.progress import LazyFuture, LoadProgress, Progress, no_progress, submit
from worker_orcd.tokenizer.tokenizer import Tokenizer

#: how often sizes are chosen anew where a device gives less than it promised; the last are a twentieth of the first
TRIES = 12


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; each attribute is the argument of `LLM` of that name, checked already."""

    device: str
    context_length: int | None
    kv_cache_bytes: int | None
    max_seqs: int | None
    max_batch_tokens: int | None
    n_threads: int
    tokenizer: str | os.PathLike[str] | None
    check_tensors: bool
    progress: bool | Progress
    expect_sha256: str | None
    trusted_models: str | os.PathLike[str] | None
    vram_limit_bytes: int | None
    gpu_memory_utilization: float
    chunk_bytes: int
    on_plan: Callable[[VramPlan, int], object] | None


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready, and what it was made of.

    Attributes:
        model_file: open.
        plan, config: what the engine was made for.
        engine: holds the weights.
        tokenizer: None for a file without one.
        info: the facts about all of it.
    """

    model_file: ModelFile
    plan: plan.Plan
    config: EngineConfig
    engine: Engine
    tokenizer: Tokenizer | None
    info: ModelInfo

    def close(self) -> None:
        """Free what it takes. No thread may be inside the engine."""
        self.engine.close()
        self.model_file.close()


def load(model: str | os.PathLike[str], options: LoadOptions, go_on: Callable[[], None] = lambda: None) -> LoadedModel:
    """Load a model file.

    Args:
        go_on: asked now and then; what it raises ends the load.

    Raises:
        What `LLM` says; also what `go_on` and `options.progress` raise. Then everything is freed.
    """
    trusted = None if options.trusted_models is None else TrustedModels(options.trusted_models)
    demanded = options.expect_sha256 is not None or trusted is not None
    device = devices.resolve(options.device)
    model_file = ModelFile(model)
    engine: Engine | None = None
    try:
        with (
            LoadProgress(options.progress, model_file.size, go_on=go_on) as phases,
            ThreadPoolExecutor(2, "orcd-load") as pool,
        ):
            phases.expect(demanded, options.check_tensors or device != "cpu")
            # before anything is made of what the file says
            digests = phases.next() if demanded else no_progress
            verified = verify(model_file, trusted, options.expect_sha256, digests)
            # an upload and a check need no lock of Python while they run, and making a tokenizer holds it for most of
            # a second: it begins when they are under way
            made = LazyFuture(pool, Tokenizer.from_model, model_file, options.tokenizer)
            read = phases.next()

            def reading(done: int) -> None:
                made.start()
                read(done)

            with devices.retain_context(device):
                the_plan = plan.build(model_file, options.context_length)
                checked = None
                if options.check_tensors and device == "cpu":
                    checked = submit(pool, model_file.check_tensors, options.n_threads, read)
                    made.start()
                config, engine = _open_what_fits(device, model_file, the_plan, options, reading)
            if checked is not None:
                checked.result()
            tokenizer: Tokenizer | None = made.result()
            model_file.check_unchanged()
            phases.done()
        source = _tokenizer_source(model_file, tokenizer, options)
        info = _info(model_file, the_plan, config, engine, tokenizer, source, verified, device)
    except BaseException:
        if engine is not None:
            engine.close()
        model_file.close()
        raise
    return LoadedModel(model_file, the_plan, config, engine, tokenizer, info)


def _open_what_fits(
    device: str, model_file: ModelFile, the_plan: plan.Plan, options: LoadOptions, reading: Callable[[int], None]
) -> tuple[EngineConfig, Engine]:
    """Choose sizes and make the engine; where the device gives less than it promised, smaller ones are tried.

    Sizes that the caller named stay. A try that fails has freed everything before the next one begins.

    Raises:
        InsufficientVram, InsufficientMemory: of the last try, where nothing smaller is left to choose.
    """
    at_most: int | None = None
    failed: WorkerError | None = None
    for _ in range(TRIES):
        try:
            config = sizing.engine_config(
                device,
                the_plan,
                model_file.path,
                options.context_length,
                options.kv_cache_bytes,
                options.max_seqs,
                options.max_batch_tokens,
                options.vram_limit_bytes,
                options.gpu_memory_utilization,
                at_most,
            )
        except (InsufficientVram, InsufficientMemory) as error:
            raise failed or error from None
        try:
            return config, devices.open_engine(
                device,
                model_file,
                the_plan,
                config,
                n_threads=options.n_threads,
                chunk_bytes=options.chunk_bytes,
                progress=reading,
                check_tensors=options.check_tensors,
                on_plan=options.on_plan,
            )
        except (InsufficientVram, InsufficientMemory) as error:
            failed = error.with_traceback(None)
        at_most = sizing.next_smaller(device, the_plan, config)
    assert failed is not None, "the loop ends with an engine or an error"
    raise failed


def _tokenizer_source(model_file: ModelFile, tokenizer: Tokenizer | None, options: LoadOptions) -> str | None:
    """See `ModelInfo.tokenizer_source`."""
    if tokenizer is None:
        return None
    if options.tokenizer is not None:
        return "given"
    return "model" if tokenizer.path == model_file.path else "beside"


def _info(
    model_file: ModelFile,
    the_plan: plan.Plan,
    config: EngineConfig,
    engine: Engine,
    tokenizer: Tokenizer | None,
    tokenizer_source: str | None,
    verified: Verified,
    device: str,
) -> ModelInfo:
    facts: dict[str, Any] = {
        **model_facts(model_file, the_plan, tokenizer),
        **verified.facts(),
        **devices.engine_facts(engine),
    }
    block_bytes, groups = kv_blocks.block_bytes(the_plan), the_plan.kv_groups

    def seqs_held(n_positions: int) -> int:
        return min(config.max_seqs, kv_blocks.sequences_held(groups, config.n_blocks, n_positions))

    return ModelInfo(
        **facts,
        tokenizer_source=tokenizer_source,
        context_length=config.context_length,
        kv_bytes=sum(n * b for n, b in zip(config.n_blocks, block_bytes, strict=True)),
        kv_positions=kv_blocks.positions_held(groups, config.n_blocks),
        default_seqs=seqs_held(min(config.context_length, 64 + DEFAULT_MAX_TOKENS)),
        full_context_seqs=seqs_held(config.context_length),
        device=device,
        max_seqs=config.max_seqs,
        max_batch_tokens=config.max_batch_tokens,
    )
