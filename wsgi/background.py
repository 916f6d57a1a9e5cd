"""Background: what a ready worker does beside serving. It checks that the model's memory is still on the GPU, and
hashes its file where that was not done before it was loaded.

Two threads that never hold up a stream: one asks the driver every so often, one of low priority reads the file once.
Both end within one chunk of a file or one question when told to.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from worker_orcd.errors import Cancelled, CudaError, WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.runtime.info import provenance_facts

if TYPE_CHECKING:
    from worker_orcd.runtime.llm import LLM

#: how long `stop` waits for each thread; a read that hangs in a dead file system keeps its thread
JOIN_SEC = 1.0
_LOWEST_PRIORITY = 19


class Background:
    """The background work of one loaded model, from `begin` to `stop`.

    Args:
        llm: the model.
        events: the narration log; gets `residency_check` and `provenance`.
        residency_check_sec: seconds between checks; there are none on the CPU.
        on_not_resident: called once with what is wrong when a check fails; no check follows.
        on_fatal: called with the error when the driver says that the CUDA context is lost.
        on_digest: called with the file's SHA-256 once it is known.
    """

    def __init__(
        self,
        llm: LLM,
        events: EventLog,
        residency_check_sec: float,
        on_not_resident: Callable[[list[str]], None],
        on_fatal: Callable[[WorkerError], None],
        on_digest: Callable[[str], None],
    ) -> None:
        self._llm = llm
        self._events = events
        self._interval = residency_check_sec
        self._on_not_resident = on_not_resident
        self._on_fatal = on_fatal
        self._on_digest = on_digest
        self._stop = threading.Event()
        self._begun = threading.Event()
        self._starting = threading.Lock()
        bodies = [("residency", self._check_residency)] if llm.info.device != "cpu" else []
        if llm.info.sha256 is None:
            bodies.append(("provenance", self._hash))
        self._threads = [
            threading.Thread(target=self._run, args=(body,), name=name, daemon=True) for name, body in bodies
        ]

    def start(self) -> None:
        """Start the threads, unless `stop` came first. They wait for `begin`: no model is ready without them.

        Raises:
            RuntimeError: a thread cannot be started.
        """
        with self._starting:
            if not self._stop.is_set():
                for thread in self._threads:
                    thread.start()

    def begin(self) -> None:
        """Let the threads do their work."""
        self._begun.set()

    def stop(self) -> None:
        """End both threads; afterwards the model may be closed. Idempotent."""
        with self._starting:
            self._stop.set()
        self._begun.set()
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(JOIN_SEC)

    def _run(self, body: Callable[[], None]) -> None:
        self._begun.wait()
        if not self._stop.is_set():
            body()

    def _check_residency(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                faults = self._llm.check_residency()
            except WorkerError as error:
                if self._stop.is_set():
                    return
                if isinstance(error, CudaError) and error.sticky:
                    self._on_fatal(error)
                    return
                faults = [f"the check failed: {error.message}"]
            if faults:
                self._events.emit("residency_check", "error", resident=False, faults=faults)
                self._on_not_resident(faults)
                return
            self._events.emit("residency_check", resident=True, seconds=time.monotonic() - began)
            self._stop.wait(self._interval)

    def _hash(self) -> None:
        try:
            # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        except OSError:
            pass
        began = time.monotonic()
        try:
            digest = self._llm.digest(self._go_on)
        except Cancelled:
            return
        except (WorkerError, OSError, ValueError) as error:
            if not self._stop.is_set():  # else the file was closed under a read that had hung
                message = error.message if isinstance(error, WorkerError) else str(error)
                self._events.emit("provenance", "error", message=message)
            return
        self._on_digest(digest)
        facts = provenance_facts({**self._llm.info.to_dict(), "sha256": digest})
        self._events.emit("provenance", **facts, seconds=time.monotonic() - began)

    def _go_on(self, done: int) -> None:
        if self._stop.is_set():
            raise Cancelled("the worker is shutting down")
