"""The master process: gunicorn's, for one worker that is never started a second time.

It ends with its worker, with an exit code a supervisor can act on, and takes every request to end as the same orderly
one: SIGTERM to the worker, once, and time for its streams.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any, Protocol

from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from worker_orcd.wsgi import signals
from worker_orcd.wsgi.exits import StopTime
from worker_orcd.wsgi.service import EXIT_FAILED
from worker_orcd.wsgi.systemd import Notifier

#: seconds between two looks at whether the worker has gone, and for the kernel to end one that was killed
_LOOK_SEC, _KILLED_SEC = 0.02, 0.2


class Host(Protocol):
    """What the master needs of the application."""

    #: seconds a worker that shall end may take, from `stop_time` on, before it is killed
    stop_limit_sec: float
    stop_time: StopTime

    #: told when the server stops, and looked at now and then
    notifier: Notifier

    def worker_failed(self, message: str) -> None:
        """The worker process has ended, or could not be started, and could not say so itself."""


class WorkerArbiter(Arbiter):
    """See the module. Its application is a `Host` beside being gunicorn's."""

    app: Any

    # exit codes of a worker that gunicorn could not set up
    WORKER_BOOT_ERROR = APP_LOAD_ERROR = EXIT_FAILED

    _stopping = False

    @property
    def _host(self) -> Host:
        host: Host = self.app
        return host

    def signal(self, sig: int, frame: FrameType | None) -> None:
        """Handler of all signals. Called by Python."""
        if sig in signals.STOP_SIGNALS:
            self._host.stop_time.note()
        super().signal(sig, frame)

    def spawn_worker(self) -> int:
        """Start the worker. A signal that comes before it has its own handlers waits for them."""
        try:
            with signals.held_back():
                pid: int = super().spawn_worker()
                return pid
        except OSError as error:  # of the fork, or of what is opened for it: the child leaves by SystemExit
            self._host.worker_failed(f"the worker process cannot be started: {error.strerror or error}")
            raise HaltServer("the worker process cannot be started", EXIT_FAILED) from None

    def manage_workers(self) -> None:
        """As gunicorn's, which calls it at every turn of its loop: once a second, or when a signal came."""
        super().manage_workers()
        self._host.notifier.look()

    def reap_workers(self) -> None:
        """Collect ended children. A worker that ends unasked ends the server with its exit code."""
        ended: int | None = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            worker = self.WORKERS.pop(pid, None)
            if worker is not None:
                worker.tmp.close()
                ended = os.waitstatus_to_exitcode(status)
        if ended is None or self._stopping:
            return
        if ended < 0:
            self._host.worker_failed(f"the worker process was killed by {signal.Signals(-ended).name}")
            ended = EXIT_FAILED
        raise HaltServer("the worker process ended", ended)

    def stop(self, graceful: bool = True) -> None:
        """Stop the worker in order and wait for it. Signals that come meanwhile change nothing."""
        self._stopping = True
        self._host.notifier.stopping()
        for listener in self.LISTENERS:
            listener.close()
        self.LISTENERS.clear()
        self.kill_workers(signal.SIGTERM)
        if not self._wait_for_worker(self._host.stop_limit_sec - self._host.stop_time.seconds_ago()):
            self.kill_workers(signal.SIGKILL)
            self._wait_for_worker(_KILLED_SEC)

    def _wait_for_worker(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        self.reap_workers()
        while self.WORKERS and time.monotonic() < end:
            time.sleep(_LOOK_SEC)
            self.reap_workers()
        return not self.WORKERS

    def handle_int(self) -> None:
        """Ctrl-C, Ctrl-\\ and hang-up: as SIGTERM. There is nothing to reload, and nothing that may be cut."""
        self.handle_term()

    handle_quit = handle_hup = handle_int

    def _ignore(self) -> None:
        """One worker it is: no more, no fewer, no second master."""

    handle_ttin = handle_ttou = handle_usr2 = _ignore
