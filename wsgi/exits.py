"""ExitTimer: the end of the process at a time that was set, whatever hangs then.

Its thread is there from the start, so that an end needs no new thread, which a system short of them may refuse.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class ExitTimer:
    """Calls `leave` once, in a thread of its own, when the earliest of the times has come that were set.

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
