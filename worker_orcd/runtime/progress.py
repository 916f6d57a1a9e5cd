"""What a load does side by side, and its progress over several passes through the model's bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from worker_orcd.errors import no_thread
from worker_orcd.runtime.streams import is_terminal

#: called with (bytes done, bytes in all)
Progress = Callable[[int, int], object]


class LoadProgress:
    """One progress over several passes through the file, to a callable or to a bar."""

    def __init__(
        self, progress: bool | Progress, size: int, verb: str = "loading", go_on: Callable[[], None] = lambda: None
    ) -> None:
        self._size = size
        self._go_on = go_on  # raises where the work shall end
        self._lock = threading.Lock()
        self._n_phases = 1
        self._done: list[int] = []  # bytes of each pass that has begun
        self._bar: Any = None
        self._report: Progress | None = progress if callable(progress) else None
        if progress is True and is_terminal(sys.stderr):
            self._bar = bar(total=size, desc=verb, unit="B", unit_scale=True, leave=False)
            self._report = self._move_bar

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, *phases: bool) -> None:
        """How many passes there will be."""
        self._n_phases = max(sum(phases), 1)
        self._report_done(0)

    def next(self) -> Callable[[int], None]:
        """Begin the next pass; the result takes the bytes of it that are done, from any thread."""
        phase = len(self._done)
        self._done.append(0)

        def report(done: int) -> None:
            with self._lock:
                self._done[phase] = min(done, self._size)
                self._report_done(sum(self._done) // self._n_phases)

        return report

    def done(self) -> None:
        """Everything is loaded."""
        self._report_done(self._size)

    def _report_done(self, done: int) -> None:
        self._go_on()
        if self._report is not None:
            self._report(done, self._size)

    def _move_bar(self, done: int, total: int) -> None:
        self._bar.update(done - self._bar.n)


def submit(pool: Executor, call: Callable[..., Any], *args: Any) -> Future[Any]:
    """`pool.submit`.

    Raises:
        InternalError: the system gives no thread.
    """
    try:
        return pool.submit(call, *args)
    except RuntimeError as error:
        raise no_thread("for the load", error) from error


class LazyFuture:
    """A call in another thread that begins once, when it is first told to or asked for."""

    def __init__(self, pool: Executor, call: Callable[..., Any], *args: Any) -> None:
        self._begin: Callable[[], Future[Any]] = lambda: submit(pool, call, *args)
        self._future: Future[Any] | None = None

    def start(self) -> Future[Any]:
        """Begin, if it has not begun."""
        if self._future is None:
            self._future = self._begin()
        return self._future

    def result(self) -> Any:
        """What the call returned; raises what it raised."""
        return self.start().result()


def bar(*args: Any, **settings: Any) -> Any:
    """A `tqdm` bar that starts no thread, and takes no lock that an interrupt could leave held."""
    from tqdm import tqdm  # a quarter of a second of import that a server never needs

    class Bar(tqdm):  # type: ignore[type-arg]
        monitor_interval = 0
        _lock = threading.RLock()

    return Bar(*args, **settings)


def no_progress(done: int) -> None:
    """For a pass that nobody watches."""
