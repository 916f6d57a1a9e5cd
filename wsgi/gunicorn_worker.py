"""The gthread worker with six corrections for a server of long streams.

- Every signal that ends it ends it in order, and so does the second one; see `signals`.
- A thread that cannot be started is an error of the one request that wanted it.
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

import falcon
import msgspec
from gunicorn import util
from gunicorn.workers.gthread import TConn, ThreadWorker

from worker_orcd.config import MAX_BODY_BYTES
from worker_orcd.wsgi import signals
from worker_orcd.wsgi.http_errors import RETRY_LOADING_SEC, NoThread
from worker_orcd.wsgi.middleware import CORRELATION_HEADER, correlation_id
from worker_orcd.wsgi.thread_pool import ThreadPool

#: seconds a client has to send a whole request
READ_LIMIT_SEC = 20.0
#: seconds a closing connection waits for the other side to close
LINGER_SEC = 1.0
#: milliseconds after which a client that takes nothing is cut off
WRITE_LIMIT_MS = 30_000


class StreamWorker(ThreadWorker):
    """gunicorn worker of worker-orcd. `stop_requested` is set once when it shall end."""

    app: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_requested = threading.Event()
        self._reading: dict[socket.socket, float] = {}

    # -- stopping

    def init_signals(self) -> None:
        """As gunicorn's, but all that ends the worker is as orderly as SIGTERM. From here on signals get through."""
        super().init_signals()
        for number in signals.STOP_SIGNALS:
            signal.signal(number, self.handle_exit)
            signal.siginterrupt(number, False)  # of no thread's system calls either
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # as the master's: there is no second master
        signals.let_through()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end: stop in order, once."""
        self.app.stop_time.note()
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

    # -- threads

    def get_thread_pool(self) -> Any:
        """One that lives on when a thread cannot be started. Called by gunicorn."""
        self._pool = ThreadPool(self.cfg.threads)
        return self._pool

    def wait_for_answers(self, seconds: float) -> None:
        """Wait until no request is being answered, but not longer than `seconds`; from any thread but the main one."""
        self._pool.wait_until_idle(seconds)

    def enqueue_req(self, conn: TConn) -> None:
        """As gunicorn's, but a request for which there is no thread is answered here and now."""
        try:
            super().enqueue_req(conn)
        except RuntimeError:
            self.log.error("A request was refused: no thread can be started for it")
            _refuse(conn.sock)
            self.nr_conns -= 1
            conn.close()

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


def _refuse(sock: socket.socket) -> None:
    """Tell a client that there is no thread for its request. Does not wait, so it takes and sends what goes at once."""
    body = msgspec.json.encode(NoThread().details())
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {falcon.MEDIA_JSON}\r\nContent-Length: {len(body)}\r\n"
        f"Retry-After: {RETRY_LOADING_SEC}\r\n{CORRELATION_HEADER}: {correlation_id(None)}\r\nConnection: close\r\n\r\n"
    )
    sock.setblocking(False)
    try:
        sock.recv(MAX_BODY_BYTES)  # bytes that nobody has read would turn the end of the answer into a reset
        sock.send(head.encode("ascii") + body)
    except OSError:
        pass  # it has gone
