"""Running: a loaded model with its loop, from the moment it begins to load to the moment all of it is freed.

It is made before anything that must be freed, and whoever holds it can free what there is at any moment. `open` and
`close` are for threads that no signal handler interrupts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from worker_orcd._ring import Control, TokenRing
from worker_orcd.errors import NotReady, WorkerError
from worker_orcd.runtime.loading import LoadedModel, LoadOptions, load
from worker_orcd.runtime.warming import Warmed, warm_up
from worker_orcd.serving.deputy import Deputy
from worker_orcd.serving.engine_loop import EngineLoop
from worker_orcd.serving.scheduler import Scheduler
from worker_orcd.tokenizer.stream import StreamDecoder
from worker_orcd.tokenizer.tokenizer import Tokenizer


class Running:
    """Nothing yet; then what `open` loads; nothing again after `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # two threads may close at once
        self._loaded: LoadedModel | None = None
        self._loop: EngineLoop | None = None
        self.warmed = Warmed()
        self._given_up = False

    def open(
        self,
        model: str | os.PathLike[str],
        options: LoadOptions,
        max_queue: int,
        on_fatal: Callable[[WorkerError], None] | None,
        deputy: Deputy,
        watchdog_sec: float = 0.0,
        warm: bool = False,
        prefix_cache: bool = True,
    ) -> None:
        """Load a model, warm it up where that is asked for, and start its loop.

        Raises:
            What `load` and `warm_up` do; NotReady: after `give_up`.
        """
        loaded = self._loaded = load(model, options, self._go_on)
        self._go_on()
        tokenizer = loaded.tokenizer
        new_decoder = None if tokenizer is None else lambda: _decoder(tokenizer)
        if warm:
            self.warmed = warm_up(loaded, lambda: _scheduler(loaded, prefix_cache), new_decoder, self._go_on)
        self._loop = EngineLoop(
            loaded.engine,
            _scheduler(loaded, prefix_cache),
            TokenRing(),
            Control(),
            new_decoder=new_decoder,
            max_queue=max_queue,
            on_fatal=on_fatal,
            deputy=deputy,
            pace=self.warmed.pace,
            watchdog_sec=watchdog_sec,
        )

    def parts(self) -> tuple[LoadedModel, EngineLoop]:
        """What is open.

        Raises:
            NotReady: nothing is.
        """
        if self._loaded is None or self._loop is None:
            raise NotReady("the model is closed")
        return self._loaded, self._loop

    def give_up(self) -> None:
        """Let an `open` in another thread end soon."""
        self._given_up = True

    def in_own_thread(self) -> bool:
        """Whether the caller is a thread of the loop."""
        return self._loop is not None and self._loop.owns(threading.current_thread())

    def close(self) -> None:
        """End the loop and free what it uses. Idempotent."""
        with self._lock:
            loop, loaded = self._loop, self._loaded
            # a device call that hangs keeps the engine thread, and freeing what it uses would crash the process
            if loaded is not None and (loop is None or loop.close()):
                loaded.close()
                self._loaded = None

    def _go_on(self) -> None:
        if self._given_up:
            raise NotReady("the load was interrupted")


def _scheduler(loaded: LoadedModel, prefix_cache: bool) -> Scheduler:
    """A scheduler with nothing in it. The engine's tables are its own from now on."""
    return Scheduler(
        loaded.config,
        loaded.plan.kv_groups,
        loaded.engine.block_tables,
        loaded.tokenizer.stop_ids if loaded.tokenizer is not None else (),
        rope_tables=loaded.engine.rope_tables,
        rope_limits=loaded.plan.rope_limits,
        prefix_cache=prefix_cache,
        copy_block=loaded.engine.copy_block,
    )


def _decoder(tokenizer: Tokenizer) -> StreamDecoder:
    # the text goes on from the prompt, so a leading space belongs to it
    return tokenizer.stream(continues=True)
