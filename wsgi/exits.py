"""When the server was told to end, and the end of a process: once, at a time that was set, whatever hangs then."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import NoReturn


class StopTime:
    """When master or worker was told to end, whichever heard it first; both know it, when made before the fork.

    On a busy machine a signal may reach the worker late: its jobs have less of the grace time then, but the end is in
    time.
    """

    def __init__(self) -> None:
        self._cell = mmap.mmap(-1, mmap.PAGESIZE)  # shared with children

    def note(self) -> None:
        """It is now, unless it was before. May be called by a signal handler."""
        if not self._noted():
            struct.pack_into("d", self._cell, 0, time.monotonic())  # a clock that all processes share

    def seconds_ago(self) -> float:
        """How long it is ago; 0 where it has not been."""
        noted = self._noted()
        return time.monotonic() - noted if noted else 0.0

    def _noted(self) -> float:
        noted: float = struct.unpack_from("d", self._cell, 0)[0]
        return noted


class ExitTimer:
    """Calls `leave` once, in a thread of its own, when the earliest of the times has come that were set.

    The thread is there from the start, so that an end needs no new one, which a system short of them may refuse.

    Args:
        leave: ends the process.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._changed = threading.Condition()
        self._at: float | None = None

    def start(self) -> None:
        """Begin to wait.

        Raises:
            RuntimeError: no thread can be started.
        """
        threading.Thread(target=self._wait, name="exit", daemon=True).start()

    def within(self, seconds: float) -> None:
        """Leave in so many seconds at the latest."""
        with self._changed:
            at = time.monotonic() + seconds
            if self._at is None or at < self._at:
                self._at = at
                self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            while self._at is None or self._at > time.monotonic():
                self._changed.wait(None if self._at is None else self._at - time.monotonic())
        self._leave()


class ProcessEnd:
    """Ends the process, once: a thread that wants the same meanwhile waits for the one that came first. Neither what is
    done before, nor what others have hung into `os._exit`, is made for two threads at a time.

    Args:
        before: done first, whatever comes of it.
    """

    def __init__(self, before: Callable[[], object]) -> None:
        self._before = before
        self._lock = threading.Lock()

    def __call__(self, code: int) -> NoReturn:
        """End the process with this exit code."""
        self._lock.acquire()  # and never given back
        try:
            self._before()
        finally:
            os._exit(code)
