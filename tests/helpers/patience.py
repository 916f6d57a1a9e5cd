"""Time in tests that may run in the processor time that others leave, and the turns that threads get meanwhile."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

#: instrumented code is slower by nature, has an allocator of its own, and runs in the time that all other tests leave
SANITIZED = os.environ.get("WORKER_ORCD_SANITIZED") == "1"
#: what a call that waits for nothing is timed with: there by the processor time it takes
clock = time.process_time if SANITIZED else time.monotonic


def patient(seconds: float) -> float:
    """How long to wait for what takes less than so many seconds on a machine that has nothing else to do."""
    return 10 * seconds if SANITIZED else seconds


def turns_of_another_thread(call: Callable[[], object], enough: int = 3, tries: int = 500) -> int:
    """How many turns another Python thread gets while `call` runs: none, where that keeps the lock.

    Args:
        call: is repeated, on a busy machine, until there were enough.
        enough: turns to wait for.
        tries: calls at most.
    """
    turns, ended = [0], threading.Event()

    def take_turns() -> None:
        while not ended.is_set():
            turns[0] += 1
            time.sleep(1e-4)

    during, interval, thread = 0, sys.getswitchinterval(), threading.Thread(target=take_turns)
    thread.start()
    sys.setswitchinterval(1000)  # so that nobody gets the lock from this thread but by its leave
    try:
        for _ in range(tries):
            before = turns[0]
            call()
            during += turns[0] - before
            if during >= enough:
                break
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()
    return during
