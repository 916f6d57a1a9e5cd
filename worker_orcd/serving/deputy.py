"""Deputy: the thread that does for the main thread what must not be cut short.

Python runs signal handlers in the main thread, between any two of its instructions, and the one of Ctrl-C raises. Who
takes a lock there, or changes two things that belong together, can be thrown out in between: the lock stays held for
ever, the thread just started belongs to nobody. So the main thread does neither. It hands such work over and waits on a
lock of its own; an interrupt ends the waiting, never the work. Other threads are not interrupted and need no deputy.
"""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from worker_orcd.errors import EngineGone, InternalError
from worker_orcd.serving.waiters import sleep_on

T = TypeVar("T")

#: how long `finish` waits for the thread, which has nothing left to do by then
_JOIN_SECONDS = 2.0


class _Errand:
    """One piece of work; whoever takes it from the queue runs it, once."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def run(self) -> None:
        work, self._work = self._work, None
        assert work is not None, "an errand is run once"
        try:
            self.value = work()
        except BaseException as error:
            self.error = error
        self.done.release()


class Deputy:
    """Works for the main thread from `start` to `finish`; before and after that every call is done where it is made.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str = "orcd-deputy") -> None:
        self._pid = os.getpid()
        self._errands: SimpleQueue[_Errand | None] = SimpleQueue()  # None: the last one was taken
        self._started = self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    @property
    def forked(self) -> bool:
        """Whether this is a process that was forked later; no thread came along."""
        return self._pid != os.getpid()

    @property
    def stands_in(self) -> bool:
        """Whether it works for the calling thread: the main thread, which holds no lock of ours and so may wait."""
        return self._started and threading.get_ident() == threading.main_thread().ident

    def check_process(self) -> None:
        """Raise `EngineGone` in a process that was forked later. Takes no lock: a copy of one may be held for ever."""
        if self.forked:
            raise EngineGone(
                f"this model was loaded by process {self._pid}, from which this one was forked; load it in the child, "
                "or start children by spawn instead of fork"
            )

    def start(self) -> None:
        """Start the thread.

        Raises:
            InternalError: the system gives none.
        """
        self._started = True  # and no handler can run before the next line has started the thread
        try:
            # Thread.start waits for the thread in Python code, which an interrupt could leave with a lock held that
            # the new thread needs: so a third one starts it, by one call of C
            _thread.start_new_thread(self._start, ())
        except RuntimeError as error:
            self._started = False
            raise self._no_thread(error) from error
        self._await(_Errand(lambda: None))
        if self._failure is not None:
            raise self._no_thread(self._failure) from self._failure

    def call(self, work: Callable[[], T]) -> T:
        """Do `work`: in the deputy's thread where the main thread calls, else here. Errands are done in their order.

        Returns, raises:
            What `work` does; an interrupt of the waiting main thread, and then the work goes on.
        """
        if not self.stands_in:
            return work()
        result: T = self._await(_Errand(work))
        return result

    def post(self, work: Callable[[], object]) -> None:
        """Have `work` done soon, behind what was asked for before; what it raises is dropped. Waits for nothing and
        takes no lock, so it may be called anywhere, also where the garbage collector runs."""
        if self._started:
            self._put(_Errand(work))
        else:
            work()

    def finish(self, work: Callable[[], object]) -> None:
        """Do a last `work` in the deputy's thread, whoever calls, and end the thread. Idempotent: each call has its
        `work` done, the later ones when there is no thread any more."""
        if not self._started:
            work()
        elif threading.current_thread() is self._thread:
            self._work_and_end(work)
        else:
            self._await(_Errand(lambda: self._work_and_end(work)))
            if self._thread.ident is not None:
                self._thread.join(_JOIN_SECONDS)

    def dismiss(self) -> None:
        """End the thread behind what it was asked for, without waiting."""
        self._errands.put(None)

    def _work_and_end(self, work: Callable[[], object]) -> None:
        try:
            work()
        finally:
            self.dismiss()

    def _await(self, errand: _Errand) -> Any:
        self._put(errand)
        sleep_on(errand.done, -1.0)
        error, errand.error = errand.error, None
        if error is None:
            return errand.value
        try:
            raise error
        finally:
            del error  # else it would hold, through this frame, itself and all that the work had in its hands

    def _put(self, errand: _Errand) -> None:
        self._errands.put(errand)
        if self._ended:
            self._drain()  # the thread may have looked for the last time before this

    def _drain(self) -> None:
        while True:
            try:
                errand = self._errands.get_nowait()
            except Empty:
                return
            if errand is not None:
                errand.run()

    def _start(self) -> None:
        try:
            self._thread.start()
        except BaseException as error:
            self._failure, self._ended = error, True
            self._drain()

    def _serve(self) -> None:
        while (errand := self._errands.get()) is not None:
            errand.run()
            del errand  # what it holds is not kept until the next one comes
        self._ended = True
        self._drain()

    @staticmethod
    def _no_thread(error: BaseException) -> InternalError:
        return InternalError(f"the system gives no thread to load the model in: {error}")
