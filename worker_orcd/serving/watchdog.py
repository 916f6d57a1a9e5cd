"""Watchdog: notices that an engine no longer answers, as when a GPU hangs in a call that never returns.

It counts its own ticks and no time. A process that was stopped (SIGSTOP, a debugger, a suspended machine) has not
ticked meanwhile, so that nothing is late when it goes on; nor does one that is starved of the processor tick as often.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

#: ticks in the limit, and the longest time between two: an engine that hangs is noticed about one tick late
_TICKS, _LONGEST_TICK = 20, 1.0


class Watchdog:
    """Looks at a count of steps until `close`, or until it does not change while it should.

    Args:
        limit: seconds without a step.
        n_steps: how many steps have ended so far; any change is progress.
        busy: whether there is work, so that a step must end.
        on_hang: called once with the limit, in the thread of `run`, which ends then.
        wait: `wait(seconds)` sleeps and says whether `close` was called; None: really.
    """

    def __init__(
        self,
        limit: float,
        n_steps: Callable[[], int],
        busy: Callable[[], bool],
        on_hang: Callable[[float], None],
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._limit = limit
        self._n_steps = n_steps
        self._busy = busy
        self._on_hang = on_hang
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait

    def close(self) -> None:
        """End `run`. From any thread, and idempotent."""
        self._closed.set()

    def run(self) -> None:
        """The body of a thread."""
        tick = min(self._limit / _TICKS, _LONGEST_TICK)
        seen, silent = self._n_steps(), 0
        while not self._wait(tick):
            n = self._n_steps()
            silent = silent + 1 if n == seen and self._busy() else 0
            seen = n
            # the first tick that saw no step may have begun right after the last one ended
            if (silent - 1) * tick >= self._limit:
                self._on_hang(self._limit)
                return
