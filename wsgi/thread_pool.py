"""ThreadPool: the threads that answer requests, in the place of the standard library's.

There a thread that cannot be started (a container's limit on processes) is an error after the request was queued, which
would end the main loop and all streams with it. Here it is an error of that request, which the caller can still refuse.

Most calls are short and need the interpreter all the time, so one of them runs at a time: more would take it from each
other, and from the thread that drives the engine. A call that says that it takes long (an answer that is given whole),
or has run for long whatever it does (a chat template, a huge prompt), counts no more among those. None that says so
begins unless a thread is left for short calls, so that a system without threads costs those and not the probes of
health.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

#: short calls that run at once
SHORT_CALLS = 1
#: seconds after which a call is no short one
SHORT_SEC = 0.005


@dataclass(eq=False)
class _Call:
    """A call and what is known of it. `long`: it is none of the short ones; `says_long`: it has said so."""

    future: Future[Any]
    work: Callable[[], Any]
    began: float = 0.0
    long: bool = False
    says_long: bool = False


class ThreadPool(Executor):
    """Runs calls in daemon threads, started when they are needed, or by `start`.

    Args:
        max_threads: more calls at once wait for a thread.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._changed = threading.Condition()
        self._handed_out: SimpleQueue[_Call | None] = SimpleQueue()  # to threads that are idle
        self._waiting: deque[_Call] = deque()
        self._waiting_first: deque[_Call] = deque()
        self._was_first = False  # the last call that began
        self._running: set[_Call] = set()  # what is handed out, too
        self._n_threads = self._n_idle = self._n_long = 0
        self._own = threading.local()  # `call`: the one that runs in this thread

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
        return self._submit(_Call(Future(), lambda: fn(*args, **kwargs)), self._waiting)

    def submit_first(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """As `submit`, before the calls of `submit` that wait; these are every second one all the same."""
        return self._submit(_Call(Future(), lambda: fn(*args)), self._waiting_first)

    def _submit(self, call: _Call, waiting: deque[_Call]) -> Future[Any]:
        with self._changed:
            waiting.append(call)
            try:
                self._hand_out()
            except RuntimeError:
                if self._n_threads == self._n_long:
                    waiting.remove(call)
                    raise
        return call.future

    def relieve(self) -> bool:
        """Let calls that wait begin in the place of those that have turned out not to be short.

        Returns:
            Whether some wait on: then ask again after `SHORT_SEC`.
        """
        if not self._some_wait:
            return False
        with self._changed:
            late = time.monotonic() - SHORT_SEC
            for call in self._running:
                if not call.long and call.began < late:
                    self._set_long(call)
            try:
                self._hand_out()
            except RuntimeError:
                pass  # they wait for a thread that comes back
            return self._some_wait

    def take_long(self) -> None:
        """Called by a call in its thread: it will take long, and another thread is there for those that do not.

        Raises:
            RuntimeError: none can be started; the call should end soon.
        """
        call: _Call = self._own.call
        with self._changed:
            self.start(self._n_long + (1 if call.long else 2))
            call.says_long = True
            if not call.long:
                self._set_long(call)
                self._hand_out()

    @property
    def is_long(self) -> bool:
        """Whether the call in whose thread this is asked has said that it takes long."""
        call: _Call | None = getattr(self._own, "call", None)
        return call is not None and call.says_long

    def wait_until_idle(self, seconds: float | None = None) -> bool:
        """Wait until no call runs or waits, but not longer than `seconds` where they are given; whether none does."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running and not self._some_wait, seconds)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads once they have done what is queued; waits for that where `wait` says so."""
        for _ in range(self._n_threads):
            self._handed_out.put(None)
        if wait:
            self.wait_until_idle()

    @property
    def _some_wait(self) -> bool:
        return bool(self._waiting or self._waiting_first)

    # -- inside, with the lock held

    def _add_thread(self) -> None:
        if self._n_threads < self._max_threads:
            threading.Thread(target=self._run, name=f"request-{self._n_threads}", daemon=True).start()
            self._n_threads += 1
            self._n_idle += 1

    def _set_long(self, call: _Call) -> None:
        call.long = True
        self._n_long += 1

    def _next(self) -> _Call | None:
        """A call that may begin, taken from those that wait."""
        if not self._some_wait or len(self._running) - self._n_long >= SHORT_CALLS:
            return None
        self._was_first = bool(self._waiting_first) and not (self._was_first and self._waiting)
        call = (self._waiting_first if self._was_first else self._waiting).popleft()
        call.began = time.monotonic()
        self._running.add(call)
        return call

    def _hand_out(self) -> None:
        """Let begin what may."""
        while self._some_wait and len(self._running) - self._n_long < SHORT_CALLS:
            if not self._n_idle:
                self._add_thread()
            if not self._n_idle:
                return  # there may be no more threads
            self._n_idle -= 1
            self._handed_out.put(self._next())

    # -- in the threads

    def _run(self) -> None:
        while (call := self._handed_out.get()) is not None:
            while call is not None:
                call = self._run_one(call)

    def _run_one(self, call: _Call) -> _Call | None:
        """Run a call; the next one, or None where the thread is idle now."""
        self._own.call = call
        result, error = None, None
        if call.future.set_running_or_notify_cancel():
            try:
                result = call.work()
            except BaseException as raised:  # gunicorn raises SystemExit in a thread, and the thread outlives it
                error = raised
        self._own.call = None
        with self._changed:
            self._running.remove(call)
            self._n_long -= call.long
            after = self._next()
            self._n_idle += after is None
            self._changed.notify_all()
        if error is not None:
            call.future.set_exception(error)
        elif not call.future.cancelled():
            call.future.set_result(result)
        return after
