"""The signals that end the server: each is an orderly end, from the first line of the command to the last.

Ctrl-C, Ctrl-\\ and a closed terminal reach master and worker at once, a supervisor's SIGTERM the master alone, and
people press Ctrl-C twice; whatever comes after the first changes nothing. The handlers of master and worker are
gunicorn's business and `gunicorn_worker`'s; here is what lies before, between and after them.

It imports nothing but `signal` and `os`, so that a command can call it before it imports the rest.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: what ends the server. SIGABRT is not among them: with it the master ends a worker that has gone silent
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


def leave_at_once() -> None:
    """From now on a signal ends the process with 0: nothing has begun yet that would have to be ended."""
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait. A child forked meanwhile inherits that, and calls `let_through` once it has its own handlers; one
    that came before would end it, or be handled as its parent does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """Let the signals through that `held_back` holds."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ignore() -> None:
    """Signals change nothing any more: the process is about to end with its exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
