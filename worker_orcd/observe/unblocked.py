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
from collections import deque
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
        self._waiting: deque[bytes | threading.Event] = deque()  # whoever holds `_writing` takes out
        self._rest = b""  # of a text that was written in part
        self._n_lost = 0
        self._wakes: queue.SimpleQueue[None] | None = None  # of the thread, where there is one
        self._woken = False  # it was told to look and has not begun to
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def start(self) -> None:
        """Let a thread do the writing. Where none can be started, `put` goes on to write what fits."""
        wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        try:
            threading.Thread(target=self._run, args=(wakes,), name="log", daemon=True).start()
        except RuntimeError:
            return
        self._wakes = wakes
        wakes.put(None)

    def put(self, text: str) -> None:
        """Write `text` as soon as the reader takes it. Does not wait, and raises nothing."""
        if self._is_full():
            self._write(0)  # the thread may just not have had its turn
        with self._lock:
            if self._is_full():
                self._n_lost += 1
                return
            self._put_lost()
            self._waiting.append(text.encode("utf-8", "backslashreplace"))
        self._wake()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, but not longer than `seconds`; whether it is."""
        if self._wakes is None:
            return self._write(seconds)
        written = threading.Event()
        self._waiting.append(written)
        self._wake()
        return written.wait(seconds)

    def _is_full(self) -> bool:
        # once it was, half of the queue must be free again, or a slow reader would get every second line
        return len(self._waiting) >= (MAX_WAITING // 2 if self._n_lost else MAX_WAITING)

    def _put_lost(self) -> None:
        with self._lock:
            n, self._n_lost = self._n_lost, 0
            if n and (line := self.tell_lost(n)):
                self._waiting.append(line.encode("utf-8", "backslashreplace"))

    def _wake(self) -> None:
        if self._wakes is None:
            self._write(0)
        elif not self._woken:
            self._woken = True
            self._wakes.put(None)

    def _run(self, wakes: queue.SimpleQueue[None]) -> None:
        while True:
            wakes.get()
            self._woken = False  # before it looks: what is put from here on wakes it again
            self._write(None)

    def _write(self, seconds: float | None) -> bool:
        """Write what waits, for at most so long (None: for ever); whether it is written."""
        end = time.monotonic() + (seconds or 0)
        while self._rest or self._waiting:
            if not self._writing.acquire(blocking=seconds is None):
                return False  # whoever writes now finds this text too
            try:
                while self._rest or self._waiting:
                    if not self._rest and not self._take_some():
                        continue
                    if not self._write_rest(None if seconds is None else max(0.0, end - time.monotonic())):
                        return False
                self._put_lost()
            finally:
                self._writing.release()
        return True

    def _take_some(self) -> bytes:
        """Make `_rest` of the first texts that wait, as many whole ones as a pipe takes at once; who waits for those
        before is told."""
        texts: list[bytes] = []
        n_bytes = 0
        while self._waiting:
            text = self._waiting[0]
            if isinstance(text, threading.Event):
                if texts:
                    break
                text.set()
            elif texts and n_bytes + len(text) > select.PIPE_BUF:
                break
            else:
                texts.append(text)
                n_bytes += len(text)
            self._waiting.popleft()
        self._rest = b"".join(texts)
        return self._rest

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
    """Make `sys.stdout` and `sys.stderr` streams that never wait, for the rest of the process; returns their writers.

    Where Python found a descriptor closed when the process began, what it is by now is something else: the stream leads
    nowhere.
    """
    writers = []
    for fd, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, f"__{name}__") is None:
            fd = os.open(os.devnull, os.O_WRONLY)
        writers.append(UnblockedWriter(fd))
        setattr(sys, name, UnblockedText(writers[-1], fd))
    return writers[0], writers[1]
