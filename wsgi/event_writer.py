"""EventWriter: the one thread that watches the clients of all answers that take long: who has gone, whose socket can be
written again, who has heard nothing for long. What a client is sent in time does not pass through here: whoever has the
bytes sends them, and only what a socket did not take waits for this thread.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from worker_orcd._output import ClientStream, unwatch, watch

#: seconds between two looks at what depends on the time
TICK_SEC = 0.1
#: bytes that may wait for a client beyond what the system holds for it; who reads so slowly is not served on
MAX_UNSENT_BYTES = 1 << 20


class Client(Protocol):
    """Who is told of a client, in the writer's thread. Nothing here may wait."""

    def gone(self) -> None:
        """It closed or half-closed its connection, or takes nothing any more."""

    def writable(self) -> None:
        """Its socket can be written again."""

    def tick(self) -> None:
        """Some time has passed, or too much waits for somebody."""


class EventWriter:
    """Watches from `start` on, until the process ends. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._clients: dict[int, Client] = {}  # by the number of the socket
        self._lock = threading.Lock()  # held while they become more or fewer

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: the system gives none.
        """
        threading.Thread(target=self._run, name="writer", daemon=True).start()

    def open(self, sock: socket.socket, chunked: bool, client: Client) -> ClientStream:
        """The body of an answer on `sock`, which nobody else may use until `forget`. See `ClientStream`."""
        self.watch(sock, client)
        return ClientStream(sock.fileno(), chunked, self._epoll.fileno(), self._wake, MAX_UNSENT_BYTES)

    def watch(self, sock: socket.socket, client: Client) -> None:
        """Tell `client` when the other side of `sock` has gone, until `forget`.

        Raises:
            OSError: the system does not watch it, or it is closed.
        """
        number = sock.fileno()
        with self._lock:
            wakes = not self._clients  # it sleeps for long while there is nobody
            self._clients[number] = client
        try:
            watch(self._epoll.fileno(), number)
        except BaseException:
            with self._lock:
                del self._clients[number]
            raise
        if wakes:
            os.eventfd_write(self._wake, 1)

    def forget(self, sock: socket.socket) -> None:
        """Watch no longer; to be called before the socket is closed."""
        with self._lock:
            known = self._clients.pop(sock.fileno(), None) is not None
        if known:
            unwatch(self._epoll.fileno(), sock.fileno())

    def _run(self) -> None:
        next_look = 0.0
        while True:
            told = False
            for fd, events in self._epoll.poll(max(next_look - time.monotonic(), 0.0) if self._clients else None):
                client = self._clients.get(fd)
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                    told = True
                elif client is None:
                    continue  # it was forgotten since
                elif not events & ~select.EPOLLOUT:
                    self._call(fd, client, client.writable)
                elif _has_gone(fd):  # else the number is another client's since
                    self._call(fd, client, client.gone)
            if told or time.monotonic() >= next_look:
                for fd, client in list(self._clients.items()):
                    self._call(fd, client, client.tick)
                next_look = time.monotonic() + TICK_SEC

    def _call(self, fd: int, client: Client, method: Callable[[], None]) -> None:
        """Call a method of `client`; a fault of one must not leave all the others unwatched."""
        try:
            method()
        except Exception:
            try:
                client.gone()
            except Exception:
                with self._lock:
                    if self._clients.get(fd) is client:
                        del self._clients[fd]
                        unwatch(self._epoll.fileno(), fd)


def _has_gone(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
