"""What the worker's main loop knows of a connection: its bytes, its place among those that wait, and the memory that
all of them may take. Nothing here blocks.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from gunicorn.http.errors import LimitRequestHeaders
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import Unreader
from gunicorn.workers.gthread import TConn

from worker_orcd.config import MAX_BODY_BYTES
from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi.http_errors import BodyTooLarge
from worker_orcd.wsgi.request_buffer import RequestBuffer, State

#: bytes of a connection that are always kept, whatever the others take: a probe fits
FREE_BYTES = 1 << 14


class BufferReader(Unreader):
    """Gives gunicorn's parser what has been collected, and says at its end why there is no more.

    Attributes:
        head: of the request, or as much of it as is looked at.
        n_bytes: of the whole request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = b""
        self.n_bytes = 0
        self._data = b""
        self._state = State.HEAD

    def give(self, buffer: RequestBuffer) -> None:
        """Read from `buffer` from now on; its bytes are taken out of it."""
        self._data, self._state = bytes(buffer.data), buffer.state
        self.n_bytes = len(self._data)
        self.head = self._data[:FREE_BYTES].split(b"\r\n\r\n", 1)[0] + b"\r\n"
        buffer.data = bytearray()

    def chunk(self, size_hint: int | None = None) -> bytes:
        """All bytes, then none. Called by gunicorn.

        Raises:
            BodyTooLarge, LimitRequestHeaders: there would be more than is taken.
            InvalidRequest: there would be more, but what is there is no HTTP.
        """
        if self._state is State.HEAD_TOO_LARGE:
            raise LimitRequestHeaders("the head is too large")
        data, self._data = self._data, b""
        if not data and self._state is State.BODY_TOO_LARGE:
            raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes, or too many small chunks")
        if not data and self._state is State.MALFORMED:
            raise InvalidRequest("the request is no HTTP/1.1, or a line of it does not end with CR and LF")
        return data


class Outbox:
    """Takes the bytes of an answer in the place of its socket, so that they leave together or not at all: the process
    may end between two of them."""

    def __init__(self) -> None:
        self.data = bytearray()

    def sendall(self, data: bytes) -> None:
        """Called by gunicorn."""
        self.data += data


@dataclass
class Rest:
    """What a socket did not take at once of an answer.

    Attributes:
        keep: whether another request may follow.
        mark: bytes that were left when the client's time began.
    """

    data: memoryview
    keep: bool
    mark: int


class Connection(TConn):
    """A client's connection.

    Attributes:
        buffer: what arrives while no thread serves it.
        reader: what the parser reads.
        held: bytes of the common budget that it has.
        waits: where it waits for something to happen; None while a thread serves it, and after its end.
        drained: bytes thrown away since it began to close.
        rest: what its client has still to take of the last answer, or None.
    """

    def __init__(self, cfg: Any, sock: Any, client: Any, server: Any) -> None:
        super().__init__(cfg, sock, client, server)
        self.initialized = True  # no thread need do it: there is neither TLS nor HTTP/2 here
        self.parser: Any = RequestParser(cfg, (), client)
        self.parser.unreader = self.reader = BufferReader()
        self.buffer = RequestBuffer(MAX_BODY_BYTES)
        self.held = 0
        self.waits: Deadlines | None = None
        self.drained = 0
        self.rest: Rest | None = None

    def next_request(self) -> bytes:
        """Begin to collect the next request; returns what has come of it behind the last one."""
        self.buffer = RequestBuffer(MAX_BODY_BYTES)
        rest: bytes = self.reader.take_buffered()
        return rest


class Deadlines:
    """Connections that wait for one kind of thing, all for equally long, and so in the order of their ends."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends: dict[Connection, float] = {}

    def add(self, conn: Connection) -> None:
        """Let `conn` wait here, and nowhere else, from now on."""
        if conn.waits is not None:
            conn.waits.remove(conn)
        self._ends[conn] = time.monotonic() + self.seconds
        conn.waits = self

    def remove(self, conn: Connection) -> None:
        """`conn` waits no more."""
        del self._ends[conn]
        conn.waits = None

    def first(self) -> Connection | None:
        """Whose time ends first."""
        return next(iter(self._ends), None)

    def end(self) -> float:
        """`time.monotonic()` at which the time of the first ends; infinite where none waits."""
        return next(iter(self._ends.values()), float("inf"))

    def oldest(self) -> float:
        """Seconds that the first has waited; 0 where none waits."""
        return max(0.0, time.monotonic() - self.end() + self.seconds)

    def cap(self, end: float) -> None:
        """Let the time of all end by `end`."""
        self._ends = {conn: min(own, end) for conn, own in self._ends.items()}


class Budget:
    """Bytes that all connections together may take beyond what each has free. Any thread may give back."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes
        self._lock = threading.Lock()

    def hold(self, conn: Connection, n_bytes: int) -> bool:
        """Whether `conn` may keep `n_bytes` in all; what that takes of the budget is taken."""
        more = max(0, n_bytes - FREE_BYTES) - conn.held
        with self._lock:
            if more > self._left:
                return False
            self._left -= more
        conn.held += more
        return True

    def give_back(self, conn: Connection) -> None:
        """`conn` takes nothing of it any more."""
        with self._lock:
            self._left += conn.held
        conn.held = 0
