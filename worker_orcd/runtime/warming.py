"""warm_up: what a first request would have to wait for is done at the end of the load.

A GPU's driver loads a kernel's code at its first launch and a graph at its first replay; the processor's side has first
calls too. Nothing here is special: the engine's own calls run on made-up tokens, of every shape that runs something no
other shape does, and then one job goes the way of all jobs through a loop of its own. Afterwards the engine is as new:
what is in the KV cache is never read before it is written, slots are set when they get a sequence, and a scheduler
begins with tables of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from worker_orcd._ring import Control, TokenRing
from worker_orcd.engine.protocol import Batch, Engine
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InternalError, WorkerError
from worker_orcd.runtime.loading import LoadedModel
from worker_orcd.serving.detokenizer import Decoder
from worker_orcd.serving.engine_loop import EngineLoop
from worker_orcd.serving.pace import Pace
from worker_orcd.serving.scheduler import Scheduler
from worker_orcd.tokenizer.tokenizer import Tokenizer

_GREEDY = SamplingParams(temperature=0.0, seed=0)
#: no small top-k: a GPU draws by that in the launches of greedy steps
_DRAWN = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=0)
#: seconds between two looks at whether the load shall go on
_LOOK_SEC = 0.1


@dataclass(frozen=True)
class Warmed:
    """What a warm-up found: how long it took, and what the engine's steps take; None: not known."""

    seconds: float = 0.0
    pace: Pace | None = None


def warm_up(
    loaded: LoadedModel,
    new_scheduler: Callable[[], Scheduler],
    new_decoder: Callable[[], Decoder] | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> Warmed:
    """Run everything once.

    Args:
        loaded: nobody else calls its engine meanwhile.
        new_scheduler: makes one for the engine.
        new_decoder: as of `EngineLoop`.
        go_on: asked now and then; what it raises ends the warm-up.

    Raises:
        WorkerError: the engine fails, so that no request would work. A chat template that does not take the simplest
            conversation is no such failure: who chats is told.
    """
    began = time.monotonic()
    chat = _start_chat(loaded.tokenizer)
    n_positions = min(loaded.config.context_length, loaded.plan.max_positions or loaded.config.context_length)
    pace, draws = _steps(loaded.engine, n_positions, go_on)
    if draws:
        _job(loaded.engine, new_scheduler(), new_decoder, go_on)
    if loaded.tokenizer is not None:
        loaded.tokenizer.encode("A first text.")
    while chat is not None and chat.is_alive():
        chat.join(_LOOK_SEC)
        go_on()
    return Warmed(time.monotonic() - began, pace)


def _steps(engine: Engine, n_positions: int, go_on: Callable[[], None]) -> tuple[Pace, bool]:
    """Steps of all shapes. Returns what the last one with prompt tokens took, which is the largest and loads the least
    of the kernels, and whether there was a token to draw."""
    config = engine.config
    slots = np.arange(config.max_seqs)
    for table, n_blocks in zip(engine.block_tables, config.n_blocks, strict=True):
        table[:] = (slots % n_blocks)[:, np.newaxis]  # blocks are shared: nobody minds what is in them
    engine.rope_tables[:] = 0
    for slot in slots:
        engine.set_slot(int(slot), _GREEDY)
    n, seconds, draws = 0, 0.0, True
    for rows in engine.warm_rows:
        batch = _prompts(engine, n_positions, rows)
        began = time.monotonic()
        sampled, _ = engine.step(batch)
        n, seconds = len(batch.tokens), time.monotonic() - began
        draws = draws and bool(np.all(sampled >= 0))
        go_on()
    for rows in engine.warm_outputs:  # so many logits rows only texts that are scored ask for
        engine.forward(_prompts(engine, n_positions, rows, every_row=True))
        go_on()
    for group, n_blocks in enumerate(config.n_blocks):
        if n_blocks > 1:
            engine.copy_block(group, 0, n_blocks - 1)
    ring, control = TokenRing(), Control()
    for sampling in (_GREEDY, _DRAWN):
        engine.set_slot(0, sampling)  # one that is drawn makes all of its step so
        for n_seqs in engine.warm_seqs:
            _decode(engine, n_seqs, ring, control)
            go_on()
    pace = Pace(config.max_batch_tokens)
    if n:
        pace.step_took(n, seconds)
    return pace, draws


def _prompts(engine: Engine, n_positions: int, rows: int, every_row: bool = False) -> Batch:
    """A step of `rows` prompt tokens, of as few sequences of `n_positions` as hold them, or as many as fit."""
    n_seqs = min(-(-rows // n_positions), engine.config.max_seqs)
    lengths = [min(n_positions, rows - i * n_positions) for i in range(n_seqs)]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    slots = np.repeat(np.arange(n_seqs, dtype=np.int32), lengths)
    n = len(positions)
    outputs = np.arange(n) if every_row else np.cumsum(lengths) - 1
    return Batch(_tokens(engine, n), positions, slots, 0, outputs.astype(np.int32))


def _decode(engine: Engine, n_seqs: int, ring: TokenRing, control: Control) -> None:
    slots = np.arange(n_seqs, dtype=np.int32)
    no_stops, stop_offsets = np.empty(0, np.int32), np.zeros(n_seqs + 1, np.int32)
    positions = np.zeros(n_seqs, np.int32)
    tokens = _tokens(engine, n_seqs)
    engine.decode(slots, slots.astype(np.int64), tokens, positions, 1, no_stops, stop_offsets, ring, control)
    ring.pop(0.0)


def _tokens(engine: Engine, n: int) -> np.ndarray:
    """`n` ids that differ, so that a layer of experts has work for many of them."""
    return (np.arange(n, dtype=np.int64) * 7919 % engine.n_vocab).astype(np.int32)


def _job(
    engine: Engine,
    scheduler: Scheduler,
    new_decoder: Callable[[], Decoder] | None,
    go_on: Callable[[], None],
) -> None:
    """A job of two tokens through a loop of its own, with all that is on the way."""
    loop = EngineLoop(engine, scheduler, TokenRing(), Control(), new_decoder=new_decoder)
    try:
        max_tokens = min(2, scheduler.room_for(1))
        if max_tokens < 1:
            return
        params = SamplingParams(temperature=1.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
        job = loop.submit(_tokens(engine, 1), params, 0, max_tokens=max_tokens)
        try:
            while not job.finished:
                job.next_event(_LOOK_SEC)
                go_on()
        except InternalError as error:
            # numbers that are none, of tokens that nobody asked for: what is asked for may do
            if error.sticky:
                raise
    finally:
        if not loop.close():
            raise InternalError("the engine does not come back from a step of the warm-up")


def _start_chat(tokenizer: Tokenizer | None) -> threading.Thread | None:
    """Let a thread start the process that renders chat templates, where there is a template."""
    if tokenizer is None or tokenizer.chat_template_sha256 is None:
        return None

    def render() -> None:
        try:
            tokenizer.apply_chat([{"role": "user", "content": "Hello"}])
        except WorkerError:
            return

    thread = threading.Thread(target=render, name="orcd-warm-chat", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None  # a system short of threads: the first chat will say so
    return thread
