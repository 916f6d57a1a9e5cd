"""Waiters: threads that wait for something to be so, without a lock that the waiting and the telling share.

A `threading.Condition` is entered in Python code, and a signal handler that raises there leaves it held for ever. Here
each waiter sleeps on a lock of its own, so an interrupt at any moment leaves nothing that another thread needs.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

#: how long the main thread sleeps at a time, see `sleep_on`
_SLICE_SECONDS = 0.2


def sleep_on(lock: threading.Lock, seconds: float) -> bool:
    """Wait up to `seconds` (-1: for ever) for a lock that somebody else will release. Returns whether it was.

    The main thread wakes now and then: a signal that comes between its last instruction and its sleep, or to another
    thread, does not wake it, and would be seen only at the end.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return lock.acquire(True, seconds)
    until = time.monotonic() + seconds if seconds >= 0 else math.inf
    while not lock.acquire(True, max(min(until - time.monotonic(), _SLICE_SECONDS), 0.0)):
        if time.monotonic() >= until:
            return False
    return True


class Waiters:
    """Those who wait for one thing. What is so must be made so before `notify_all`, and be seen without a lock."""

    def __init__(self) -> None:
        self._asleep: deque[threading.Lock] = deque()  # held; who tells takes one out and releases it

    def notify_all(self) -> None:
        """Let everyone look again. From any thread."""
        while self._asleep:
            try:
                self._asleep.popleft().release()
            except IndexError:
                return  # another thread tells as well

    def wait_for(self, ready: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until `ready()` is true.

        Args:
            timeout: seconds; None: for ever.

        Returns:
            Whether it is.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = -1.0 if until is None else min(until - time.monotonic(), threading.TIMEOUT_MAX)
            if until is not None and left <= 0:
                return False
            lock = threading.Lock()
            lock.acquire()
            self._asleep.append(lock)
            try:
                if not ready():  # else it became so before anyone could know of this one
                    sleep_on(lock, left)
            finally:
                self._forget(lock)
        return True

    def _forget(self, lock: threading.Lock) -> None:
        try:
            self._asleep.remove(lock)
        except (ValueError, IndexError):
            return  # it was told, or others were meanwhile: then it is told next time, for nothing
