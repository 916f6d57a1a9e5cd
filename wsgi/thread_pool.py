"""ThreadPool: the threads that answer requests, in the place of the standard library's.

There a thread that cannot be started (a container's limit on processes) is an error after the request was queued, which
would end the main loop and all streams with it. Here it is an error of that request, which the caller can still refuse.

Answers that are given whole hold their threads for long. None begins unless a thread is left for short calls, so that a
system without threads costs those and not the probes of health.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any

#: short calls that run at once; more of them would but wait for the interpreter together
SHORT_CALLS = 32
_Work = tuple["Future[Any]", Callable[[], Any]]


class ThreadPool(Executor):
    """Runs calls in daemon threads, started when they are needed, or by `start`.

    Args:
        max_threads: more calls at once wait for a thread.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._changed = threading.Condition()
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._n_threads = 0
        self._n_calls = 0  # running or waiting
        self._n_long = 0  # of those
        self._own = threading.local()  # `long`: whether the call that runs in this thread is one of them

    def start(self, n_threads: int) -> None:
        """Start so many threads now, or those that are missing.

        Raises:
            RuntimeError: one cannot be started.
        """
        with self._changed:
            while self._n_threads < min(n_threads, self._max_threads):
                self._add_thread()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` in a thread.

        Raises:
            RuntimeError: long calls have taken all threads and no other can be started; nothing was queued.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._n_long + SHORT_CALLS > self._n_threads <= self._n_calls:
                try:
                    self._add_thread()
                except RuntimeError:
                    if self._n_threads == self._n_long:
                        raise
            self._n_calls += 1
        self._work.put((future, lambda: fn(*args, **kwargs)))
        return future

    def take_long(self) -> None:
        """Called by a call in its thread: it will take long, and another thread is there for those that do not.

        Raises:
            RuntimeError: none can be started; the call should end soon.
        """
        with self._changed:
            self.start(self._n_long + 2)
            self._n_long += 1
            self._own.long = True

    @property
    def is_long(self) -> bool:
        """Whether the call in whose thread this is asked has said that it takes long."""
        return bool(getattr(self._own, "long", False))

    def _add_thread(self) -> None:
        if self._n_threads < self._max_threads:
            threading.Thread(target=self._run, name=f"request-{self._n_threads}", daemon=True).start()
            self._n_threads += 1

    def wait_until_idle(self, seconds: float | None = None) -> bool:
        """Wait until no call runs or waits, but not longer than `seconds` where they are given; whether none does."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._n_calls, seconds)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads once they have done what is queued; waits for that where `wait` says so."""
        for _ in range(self._n_threads):
            self._work.put(None)
        if wait:
            self.wait_until_idle()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            future, call = work
            result, error, self._own.long = None, None, False
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as raised:  # gunicorn raises SystemExit in a thread, and the thread outlives it
                    error = raised
            with self._changed:
                self._n_calls -= 1
                self._n_long -= self._own.long
                self._changed.notify_all()
            if error is not None:
                future.set_exception(error)
            elif not future.cancelled():
                future.set_result(result)
            del work, future, call, result, error
