"""Connection: HTTP/1.1 over one socket, as it arrives, with every way to leave that a client has.

A connection carries one request at a time. What its answer means is not known here: its body goes to a sink.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

_RESET = struct.pack("ii", 1, 0)
Sink = Callable[[bytes], None]


class Malformed(Exception):
    """What arrived is no HTTP answer."""


class Answer:
    """One HTTP answer that arrives piece by piece.

    Attributes:
        status: None until the head is there.
        headers: names in lower case.
        done: whether it has come to its end, by its length or its last chunk.
        body: what no sink took: all of it where there is none, or where the answer is no 200.
    """

    def __init__(self, sink: Sink | None = None) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.done = False
        self.body = bytearray()
        self.rest = b""  # behind its end
        self._sink = sink
        self._data = b""
        self._left = 0  # bytes of the body, or of the chunk with its line end
        self._step = self._head

    def feed(self, data: bytes) -> None:
        """Take what has arrived.

        Raises:
            Malformed: it is no HTTP.
        """
        self._data += data
        while not self.done and self._step():
            pass
        if self.done:
            self.rest, self._data = self.rest + self._data, b""

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ValueError: it is none.
        """
        return json.loads(self.body.decode("utf-8"))

    def _head(self) -> bool:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            if len(self._data) > 1 << 16:
                raise Malformed("the head of an answer has no end")
            return False
        first, *lines = self._data[:end].decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise Malformed(f"not a status line: {first[:60]!r}")
        self._data = self._data[end + 4 :]
        if words[1] == "100":
            return True
        self.status = int(words[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        if self.status != 200:
            self._sink = None
        if self.status in (204, 304):
            self.done = True
        elif self.headers.get("transfer-encoding") == "chunked":
            self._step = self._chunk_size
        elif (length := self.headers.get("content-length")) is not None:
            self._left = int(length)
            self._step = self._whole
        else:
            raise Malformed("an answer with neither length nor chunks")
        return True

    def _take(self, data: bytes) -> None:
        if self._sink is None:
            self.body += data
        else:
            self._sink(data)

    def _whole(self) -> bool:
        piece, self._data = self._data[: self._left], self._data[self._left :]
        self._left -= len(piece)
        if piece:
            self._take(piece)
        self.done = self._left == 0
        return False

    def _chunk_size(self) -> bool:
        end = self._data.find(b"\r\n")
        if end < 0:
            return False
        try:
            size = int(self._data[:end], 16)
        except ValueError:
            raise Malformed(f"not the size of a chunk: {self._data[:20]!r}") from None
        self._data = self._data[end + 2 :]
        self._left = size
        self._step = self._chunk if size else self._trailer
        return True

    def _chunk(self) -> bool:
        if len(self._data) < self._left + 2:
            return False
        self._take(self._data[: self._left])
        self._data = self._data[self._left + 2 :]
        self._step = self._chunk_size
        return True

    def _trailer(self) -> bool:
        if len(self._data) < 2:
            return False
        self._data = self._data[2:]
        self.done = True
        return False


class Connection(asyncio.Protocol):
    """One connection to the worker; made by `connect`.

    Attributes:
        answer: the one that arrives; None where none is expected.
        lost: the other side has closed, or the connection broke.
        fault: why what arrived is no HTTP answer.
    """

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.lost = False
        self.fault: str | None = None
        self._transport: asyncio.Transport | None = None
        self._goal: Callable[[], bool] | None = None
        self._reached: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Give bytes to the answer."""
        if self.answer is None or self.answer.done:
            self.fault = self.fault or f"bytes behind the end of an answer: {data[:60]!r}"
        elif self.fault is None:
            try:
                self.answer.feed(data)
            except (Malformed, ValueError) as error:
                self.fault = str(error)
        self._look()

    def eof_received(self) -> bool:
        """Close as the other side does."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake who waits."""
        self.lost = True
        self._writable.set()
        self._look()

    def pause_writing(self) -> None:
        """The other side does not take it."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It does again."""
        self._writable.set()

    def _look(self) -> None:
        future = self._reached
        if future is not None and not future.done() and (self.over or self._goal is None or self._goal()):
            future.set_result(None)

    # -- what clients do

    @property
    def over(self) -> bool:
        """Whether nothing more can arrive for the present answer."""
        return self.lost or self.fault is not None or (self.answer is not None and self.answer.done)

    def begin(self, sink: Sink | None = None) -> Answer:
        """Expect an answer."""
        self.answer = Answer(sink)
        return self.answer

    async def send(self, data: bytes) -> None:
        """Send bytes; those for which a lost connection has no use are dropped."""
        if not self.lost and self._transport is not None:
            self._transport.write(data)
            await self._writable.wait()

    async def until(self, goal: Callable[[], bool], timeout: float) -> bool:
        """Wait until `goal()` or the end of the answer; False where neither came within `timeout` seconds."""
        if self.over or goal():
            return True
        self._goal, self._reached = goal, asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(self._reached, timeout)
        except TimeoutError:
            return False
        finally:
            self._goal = self._reached = None
        return True

    async def end(self, timeout: float) -> bool:
        """Wait for the end of the answer; False where it did not come."""
        return await self.until(lambda: False, timeout)

    def reset(self) -> None:
        """Leave with RST."""
        if not self.lost and self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def close(self) -> None:
        """Leave with FIN, or RST where something has arrived unread: the system decides."""
        if not self.lost and self._transport is not None:
            self._transport.abort()

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        if not self.lost and self._transport is not None:
            self._transport.write_eof()

    def stall(self) -> None:
        """Read nothing more."""
        if not self.lost and self._transport is not None:
            self._transport.pause_reading()

    def read_on(self) -> None:
        """Read again."""
        if not self.lost and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


async def connect(host: str, port: int, receive_buffer: int | None = None) -> Connection:
    """A new connection.

    Raises:
        OSError: nobody takes it within 10 s.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.wait_for(loop.sock_connect(sock, (host, port)), 10)
    except BaseException:
        sock.close()
        raise
    _, connection = await loop.create_connection(Connection, sock=sock)
    return connection


def request(host: str, path: str, body: bytes | None, headers: dict[str, str] | None = None) -> bytes:
    """A whole request: GET where `body` is None, else POST of JSON."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {host}"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")
