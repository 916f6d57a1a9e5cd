"""Text to a standard stream that nobody may be reading, without ever waiting for a reader.

A pipe holds 64 KiB; whoever writes more waits, and so would a server that logs to it. Here text goes into a bounded
queue. What does not fit there is lost and counted, and once the reader is back a line says how much it was.

This module knows no log: `events` writes whole lines through it, and so does whatever else prints.
"""

from __future__ import annotations

import io
import os
import queue
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable

#: pieces of text, lines as a rule, that wait for a reader; more are lost
MAX_WAITING = 1000
#: seconds the writing thread waits before it tries a descriptor again that took nothing though it said it would
_RETRY_SEC = 0.01


class UnblockedWriter:
    """Writes text to a file descriptor, in the order of `put`, from any thread, signal handler or finalizer.

    Without `start` a text is written by who puts it, as far as the reader takes it at once; the rest waits for the next
    `put` or `flush`. With it a thread of its own waits for the reader. In a forked child the writer begins anew: what
    waits in the parent is the parent's, and the thread has stayed there.

    Args:
        fd: where to write; closed or gone, its texts are lost.
        tell_lost: makes the line about n lost texts; "" tells nothing.
    """

    def __init__(self, fd: int, tell_lost: Callable[[int], str] = lambda n: "") -> None:
        self.tell_lost = tell_lost
        self._fd = fd
        self._begin()
        _writers.add(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come while its own thread is inside
        self._writing = threading.Lock()
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._rest = b""  # of a text that was written in part
        self._n_lost = 0
        self._has_thread = False
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def start(self) -> None:
        """Let a thread do the writing. Where none can be started, `put` goes on to write what fits."""
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return
        self._has_thread = True

    def put(self, text: str) -> None:
        """Write `text` as soon as the reader takes it. Does not wait, and raises nothing."""
        if not self._has_thread:
            self._write_what_fits(0)
        with self._lock:
            # half of the queue must be free again, or a slow reader would get every second line
            if self._waiting.qsize() >= (MAX_WAITING // 2 if self._n_lost else MAX_WAITING):
                self._n_lost += 1
                return
            self._put_lost()
            self._waiting.put(text.encode("utf-8", "backslashreplace"))
        if not self._has_thread:
            self._write_what_fits(0)

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, but not longer than `seconds`; whether it is."""
        if not self._has_thread:
            return self._write_what_fits(seconds)
        written = threading.Event()
        self._waiting.put(written)
        return written.wait(seconds)

    def _put_lost(self) -> None:
        with self._lock:
            n, self._n_lost = self._n_lost, 0
            if n and (line := self.tell_lost(n)):
                self._waiting.put(line.encode("utf-8", "backslashreplace"))

    def _run(self) -> None:
        with self._writing:
            self._write_rest(None)
            while True:
                text = self._waiting.get()
                if isinstance(text, threading.Event):
                    text.set()
                    continue
                self._rest = text
                self._write_rest(None)
                if self._waiting.empty():
                    self._put_lost()

    def _write_what_fits(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._rest or not self._waiting.empty():
            if not self._writing.acquire(blocking=False):
                return False  # whoever writes now finds this text too
            try:
                while not self._waiting.empty() or self._rest:
                    if not self._rest:
                        text = self._waiting.get()
                        self._rest = b"" if isinstance(text, threading.Event) else text
                    if not self._write_rest(max(0.0, end - time.monotonic())):
                        return False
                self._put_lost()
            finally:
                self._writing.release()
        return True

    def _write_rest(self, seconds: float | None) -> bool:
        """Write `_rest`, waiting at most so long for each part of it (None: for ever); whether it is written."""
        while self._rest:
            try:
                if not self._poll.poll(None if seconds is None else 1e3 * seconds):
                    return False
                # a pipe that can be written takes this much at once
                self._rest = self._rest[os.write(self._fd, self._rest[: select.PIPE_BUF]) :]
            except BlockingIOError:  # another process has made it non-blocking, and has filled it
                if seconds is not None:
                    return False
                time.sleep(_RETRY_SEC)
            except OSError:
                self._rest = b""  # nobody will ever read it
        return True


_writers: weakref.WeakSet[UnblockedWriter] = weakref.WeakSet()


def _begin_in_child() -> None:
    for writer in list(_writers):
        writer._begin()


os.register_at_fork(after_in_child=_begin_in_child)


class UnblockedText(io.TextIOBase):
    """A standard stream of Python over an `UnblockedWriter`: a line is put once it is whole, the rest by `flush`."""

    def __init__(self, writer: UnblockedWriter, fd: int) -> None:
        self._writer = writer
        self._fd = fd
        self._line = ""
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of what is written."""
        return "utf-8"

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor behind it."""
        return self._fd

    def isatty(self) -> bool:
        """Whether a terminal is behind it."""
        return os.isatty(self._fd)

    def write(self, text: str, /) -> int:
        """Take `text`; does not wait."""
        with self._lock:
            whole, line_end, rest = (self._line + text).rpartition("\n")
            self._line = rest
            if line_end:
                self._writer.put(whole + line_end)
        return len(text)

    def flush(self) -> None:
        """Put what is no whole line yet; does not wait."""
        with self._lock:
            text, self._line = self._line, ""
            if text:
                self._writer.put(text)


def unblock_standard_streams() -> tuple[UnblockedWriter, UnblockedWriter]:
    """Make `sys.stdout` and `sys.stderr` streams that never wait; returns their writers.

    A standard descriptor that is closed becomes /dev/null: else the next file or socket the process opens would get its
    number, and whatever is printed.
    """
    writers = []
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
            # Python found it closed when it began, so what it is now is something else
            theirs = getattr(sys, f"__{name}__") is None
        except OSError:
            theirs = False
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if fd:
            fd = os.open(os.devnull, os.O_WRONLY) if theirs else fd
            writers.append(UnblockedWriter(fd))
            setattr(sys, name, UnblockedText(writers[-1], fd))
    return writers[0], writers[1]
