"""The gthread worker with four corrections for a server of long streams.

- A connection that has sent nothing waits in the poller, not in a thread, so idle connections cost no stream its place.
- A request must be there, headers and body, within `READ_LIMIT_SEC`; then its reading side is shut, which ends the read
  of whoever waits for it. gunicorn itself waits for ever.
- Closing lingers in the thread that answered, not in the main loop, where it would hold up every other client.
- While a stopping worker's jobs have their grace time, it goes on answering: new clients are told 503 instead of being
  left in the backlog.

It builds on the methods of gunicorn's ThreadWorker named below.
"""

from __future__ import annotations

import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterable, MutableMapping
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import TConn, ThreadWorker

#: seconds a client has to send a whole request
READ_LIMIT_SEC = 20.0
#: seconds a closing connection waits for the other side to close
LINGER_SEC = 1.0
#: milliseconds after which a client that takes nothing is cut off
WRITE_LIMIT_MS = 30_000


class StreamWorker(ThreadWorker):
    """gunicorn worker of worker-orcd. `stop_requested` is set once when it shall end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_requested = threading.Event()
        self._reading: dict[socket.socket, float] = {}

    # -- stopping

    def init_signals(self) -> None:
        """As gunicorn's, but Ctrl-C is as orderly as SIGTERM."""
        super().init_signals()
        signal.signal(signal.SIGINT, self.handle_exit)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: stop in order, once."""
        if self.alive:
            super().handle_exit(sig, frame)
            self.stop_requested.set()

    def leave(self) -> None:
        """Make the main loop end; from any thread."""
        self.alive = False
        self.method_queue.defer(lambda: None)

    def set_accept_enabled(self, enabled: bool | None) -> None:
        """As gunicorn's, but a stopping worker does not stop to answer."""
        if enabled or self.alive:
            super().set_accept_enabled(enabled)

    # -- reading

    def accept(self, listener: socket.socket) -> None:
        """Take a connection and let the poller wait for its first byte."""
        try:
            client, address = listener.accept()
        except OSError:  # gone again, or another loop of the poller took it
            return
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, WRITE_LIMIT_MS)
        self.nr_conns += 1
        conn = TConn(self.cfg, client, address, listener.getsockname())
        conn.timeout = time.monotonic() + self.cfg.keepalive
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def load_wsgi(self) -> None:
        """Load the application; once it has answered, its request was read."""
        super().load_wsgi()
        app: Any = self.wsgi

        def read_then_answer(environ: MutableMapping[str, Any], start_response: Any) -> Iterable[bytes]:
            try:
                answer: Iterable[bytes] = app(environ, start_response)
                return answer
            finally:
                self._reading.pop(environ["gunicorn.socket"], None)

        self.wsgi = read_then_answer

    def wait_for_and_dispatch_events(self, timeout: float | None) -> None:
        """The main loop's turn: events, then requests that take too long to arrive."""
        super().wait_for_and_dispatch_events(timeout)
        now = time.monotonic()
        for sock, limit in list(self._reading.items()):
            if now > limit:
                try:
                    sock.shutdown(socket.SHUT_RD)
                except OSError:
                    pass

    # -- answering and closing

    def handle(self, conn: TConn) -> Any:
        """Serve one request in a pool thread; a connection that ends there is half-closed and drained there."""
        self._reading[conn.sock] = time.monotonic() + READ_LIMIT_SEC
        try:
            keep = super().handle(conn)
        finally:
            self._reading.pop(conn.sock, None)
        if keep is False:
            _linger(conn.sock)
        return keep

    def finish_request(self, conn: TConn, fs: Future[Any]) -> None:
        """Back in the main loop: close at once what has lingered already."""
        if not fs.cancelled() and fs.exception() is None and fs.result() is False:
            self.nr_conns -= 1
            conn.close()
            return
        super().finish_request(conn, fs)


def _linger(sock: socket.socket) -> None:
    """Half-close and wait a little for the other side, or the last bytes of the answer may be lost (RFC 9112, 9.6)."""
    try:
        util.close_graceful(sock.dup(), timeout=LINGER_SEC)
    except OSError:
        pass
