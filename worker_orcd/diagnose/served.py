"""A worker in a process of its own, and a client that reads many streams of it in one loop.

The client must not be what is measured: raw sockets, one epoll, events counted in bytes and not parsed. It knows of an
answer only what it counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from worker_orcd.config import FLAGS
from worker_orcd.errors import InternalError, excerpt

#: seconds without a byte of any stream after which the server counts as hung
SILENCE_SEC = 120.0
#: seconds that a worker gets to end
_END_SEC = 10.0
_LOOK_SEC = 0.02
_TOKENS_OUT = re.compile(rb'"tokens_out":(\d+)')


@dataclass(frozen=True)
class Route:
    """Where streams come from, and by which bytes their events are told: those with text, the last one, an error. None
    of them can stand in a text as it is sent."""

    path: str
    token: bytes
    end: bytes
    error: bytes


EXECUTE = Route("/execute", b"event: token\n", b"event: end\n", b"event: error\n")
COMPLETIONS = Route("/v1/completions", b'"finish_reason":null', b"data: [DONE]\n", b'data: {"error":')


class Worker:
    """`worker-orcd serve` on a free port of this machine, ready; ended at the end of the context.

    Args:
        arguments: of `serve`, beside its address and the form of its log. Variables of the environment that stand for
            flags of `serve` do not reach it.

    Raises:
        InternalError: it ends before it is ready, with what it says.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        own = {f"WORKER_ORCD_{(flag.name or name).replace('-', '_').upper()}" for name, flag in FLAGS.items()}
        environment = {name: value for name, value in os.environ.items() if name not in own}
        address = ["--host", "127.0.0.1", "--port", "0", "--log-format", "json"]
        # a file, which takes a log of any length while nobody reads
        with contextlib.ExitStack() as opened:
            self._log = opened.enter_context(tempfile.TemporaryFile("w+b"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker_orcd", "serve", *address, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                env=environment,
            )
            opened.callback(self._end)
            self._wait_until_ready()
            self._opened = opened.pop_all()

    def _wait_until_ready(self) -> None:
        while True:
            ended = self._process.poll() is not None
            events = {event.get("event"): event for event in self._events()}
            if "ready" in events and "startup" in events:
                self.port = int(events["startup"]["port"])
                return
            if ended:
                reason = events.get("error", {}).get("message", f"it ended with {self._process.returncode}")
                raise InternalError(f"the worker cannot serve: {reason}")
            time.sleep(_LOOK_SEC)

    def _events(self) -> list[dict[str, Any]]:
        # by position: the worker writes at the place in the file that is also this process's
        log = self._log.fileno()
        lines = os.pread(log, os.fstat(log).st_size, 0).split(b"\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it. Idempotent."""
        self._opened.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_SEC)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class StreamTimes:
    """When the events of a stream came, `time.perf_counter()` in seconds.

    Attributes:
        began: before its connection was opened.
        arrivals: of each token event; those that came in one read have the same.
        ended: of the last event.
        tokens_out: as the `end` event of `/execute` says; tokens without text have no event.
    """

    began: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens_out: int = 0

    @property
    def first_token(self) -> float:
        """Seconds to the first token event; one must have come."""
        return self.arrivals[0] - self.began

    @property
    def per_token(self) -> float | None:
        """Seconds from a token to the next; None where there are fewer than two."""
        n = len(self.arrivals)
        return (self.arrivals[-1] - self.arrivals[0]) / (n - 1) if n > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between the arrivals of neighbouring tokens."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class _Stream:
    """A connection and what has come of it."""

    def __init__(self, port: int, body: dict[str, object], route: Route) -> None:
        self._route = route
        self.times = StreamTimes(time.perf_counter())
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=SILENCE_SEC)
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = json.dumps(body).encode()
            head = f"POST {route.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            self.sock.sendall(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
            self.sock.setblocking(False)
        except BaseException:
            self.sock.close()
            raise
        self._rest = b""
        self._accepted = False

    def read(self) -> bool:
        """Take what is there. Returns whether the stream has ended.

        Raises:
            InternalError: it was refused, ended with an error event, or was cut.
        """
        data = self.sock.recv(1 << 18)
        now = time.perf_counter()
        self._rest += data
        if not self._accepted and self._rest:
            if not b"HTTP/1.1 200".startswith(self._rest[:12]):
                if data and b"}" not in self._rest:
                    return False  # the reason is on its way
                raise InternalError(f"the worker refuses a stream: {excerpt(self._rest.decode('latin-1'), 400)}")
            self._accepted = len(self._rest) >= 12
        last = self._rest.rfind(b"\n\n")
        if last >= 0:
            events, self._rest = self._rest[: last + 2], self._rest[last + 2 :]
            self.times.arrivals += [now] * events.count(self._route.token)
            end = events.find(self._route.end)
            if end >= 0:
                tokens_out = _TOKENS_OUT.search(events, end)
                self.times.ended, self.times.tokens_out = now, int(tokens_out[1]) if tokens_out else 0
                return True
            error = events.find(self._route.error)
            if error >= 0:
                raise InternalError(f"a stream failed: {excerpt(events[error:].decode('latin-1'), 400)}")
        if not data:
            raise InternalError("a stream was cut")
        return False


def read_streams(port: int, bodies: Sequence[dict[str, object]], route: Route = EXECUTE) -> list[StreamTimes]:
    """Open a stream for each body, all at once, and read them to their ends.

    Raises:
        InternalError: one was refused, failed or was cut, or all were silent for `SILENCE_SEC`.
        OSError: no connection.
    """
    streams: dict[int, _Stream] = {}
    times: list[StreamTimes] = []
    poll = select.epoll()
    try:
        for body in bodies:
            stream = _Stream(port, body, route)
            streams[stream.sock.fileno()] = stream
            times.append(stream.times)
            poll.register(stream.sock, select.EPOLLIN)
        while streams:
            ready = poll.poll(SILENCE_SEC)
            if not ready:
                raise InternalError(f"{len(streams)} streams were silent for {SILENCE_SEC:g} s")
            for fd, _ in ready:
                if streams[fd].read():
                    poll.unregister(fd)
                    streams.pop(fd).sock.close()
        return times
    finally:
        for stream in streams.values():
            stream.sock.close()
        poll.close()
