"""StreamWorker: the gunicorn worker of worker-orcd. It serves what `CollectingWorker` has collected, in threads.

A stream is begun by a thread and then left to those who have its bytes; the connection comes back when it has ended.

While a stopping worker's jobs have their grace time, it goes on answering: new clients are told 503 instead of being
left in the backlog. It builds on the methods of gunicorn's ThreadWorker that it overrides.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any

from gunicorn.http import wsgi

from worker_orcd.machine import give_back_memory
from worker_orcd.wsgi import raw_answers, signals
from worker_orcd.wsgi.collecting_worker import DETACHED, RESTING, CollectingWorker
from worker_orcd.wsgi.connections import Connection, Outbox
from worker_orcd.wsgi.event_writer import EventWriter
from worker_orcd.wsgi.http_errors import NoThread
from worker_orcd.wsgi.request_buffer import State
from worker_orcd.wsgi.sse import JobStream
from worker_orcd.wsgi.thread_pool import SHORT_SEC, ThreadPool

#: seconds that a stopping worker keeps idle connections, for a request that may be on its way
STOP_IDLE_SEC = 2.0
#: seconds in which a client must take an answer for which the main loop has no room, all of it
LONG_WRITE_SEC = 300.0
#: bytes of a request that takes so much memory in passing that it is given back afterwards
LARGE_BYTES = 1 << 16
#: probes: a few in each turn of the main loop are answered there, where they wait for no thread
PROBES = (b"GET /health", b"GET /ready", b"GET /metrics")
PROBES_IN_A_TURN = 4
#: what is answered before all that waits for a thread: more probes, and what makes room
FIRST = (*PROBES, b"POST /cancel")


class StreamWorker(CollectingWorker):
    """gunicorn worker of worker-orcd. `stop_requested` is set once when it shall end.

    Attributes:
        writer: watches the clients of streams; set before the first request.
    """

    app: Any
    writer: EventWriter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop_requested = threading.Event()
        self._thread = threading.local()
        self._n_probes = 0  # that were answered in this turn of the main loop

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

    def is_parent_alive(self) -> bool:
        """As gunicorn's, but who has lost its master ends as at a signal: nobody else would tell it. Looked at once a
        second; its listener would keep the port from the next server."""
        alive = bool(super().is_parent_alive())
        if not alive:
            self.handle_exit(signal.SIGTERM, None)
        return alive

    def leave(self) -> None:
        """Make the main loop end; from any thread."""
        self.alive = False
        self.method_queue.defer(lambda: None)

    def set_accept_enabled(self, enabled: bool | None) -> None:
        """As gunicorn's, but a stopping worker does not stop to answer."""
        if enabled or self.alive:
            super().set_accept_enabled(enabled)

    def _cap_keepalive(self, deadline: float) -> None:
        """The worker stops: idle connections get until `deadline`. Called by gunicorn."""
        self._idle.cap(deadline)
        self._idle.seconds = min(self._idle.seconds, STOP_IDLE_SEC)

    # -- threads

    def get_thread_pool(self) -> Any:
        """One that lives on when a thread cannot be started. Called by gunicorn."""
        self._pool = ThreadPool(self.cfg.threads)
        return self._pool

    def start_threads(self) -> None:
        """Start the least that serves: a thread for one answer that takes long, and one for all that is short.

        Raises:
            RuntimeError: one cannot be started.
        """
        self._pool.start(2)

    def keep_thread(self) -> None:
        """The request that this pool thread answers will keep it for long.

        Raises:
            RuntimeError: no thread would be left for others.
        """
        self._pool.take_long()

    def wait_for_and_dispatch_events(self, timeout: float | None) -> None:
        """As `CollectingWorker`, but soon again while requests wait for a thread."""
        if self._pool.relieve():
            timeout = SHORT_SEC if timeout is None else min(timeout, SHORT_SEC)
        self._n_probes = 0
        super().wait_for_and_dispatch_events(timeout)

    def wait_for_answers(self, seconds: float) -> None:
        """Wait until no request is being answered, but not longer than `seconds`; from any thread but the main one."""
        end = time.monotonic() + seconds
        self._pool.wait_until_idle(seconds)
        while self._n_rests and time.monotonic() < end:
            time.sleep(0.005)

    def enqueue_req(self, conn: Connection) -> None:  # type: ignore[override]
        """As gunicorn's, but a probe is answered here and now, and so is a request for which there is no thread. The
        main loop is not woken for an answer that is left to others."""
        head, is_small = conn.reader.head, conn.reader.n_bytes <= LARGE_BYTES
        if head.startswith(PROBES) and is_small and self._n_probes < PROBES_IN_A_TURN:
            self._n_probes += 1
            self._handled(conn, self._answer_here(conn))
            return
        submit = self._pool.submit_first if head.startswith(FIRST) else self._pool.submit
        try:
            submit(self.handle, conn).add_done_callback(partial(self._handled, conn))
        except RuntimeError:
            self.refuse(conn, NoThread())

    def _answer_here(self, conn: Connection) -> Future[Any]:
        answered: Future[Any] = Future()
        try:
            answered.set_result(self.handle(conn))
        except BaseException as error:  # as in a thread
            answered.set_exception(error)
        return answered

    def _handled(self, conn: Connection, future: Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None or future.result() is not DETACHED:
            self.method_queue.defer(self.finish_request, conn, future)

    # -- serving, in a pool thread; of a probe in the main loop

    def handle(self, conn: Connection) -> Any:  # type: ignore[override]
        """Serve one request, all of whose bytes are there."""
        self._budget.give_back(conn)
        self._thread.head = conn.reader.head
        is_large = conn.reader.n_bytes > LARGE_BYTES
        try:
            return super().handle(conn)
        finally:
            if is_large:
                give_back_memory()

    def handle_request(self, req: Any, conn: Connection) -> Any:  # type: ignore[override]
        """Answer one request, in the place of gunicorn's method, which keeps its thread until the answer is sent.

        Returns:
            Whether another request may follow; DETACHED: `_served` is called when that is known; RESTING: there is a
            rest to be sent.
        """
        req._expected_100_continue = False  # the main loop has said it
        if conn.buffer.state is not State.WHOLE:
            req.force_close()  # it broke off: no other can follow
        should_close = req.should_close
        req.should_close = lambda: req.body.failed or should_close()  # of which the answer's headers tell
        response: Any
        response, environ = wsgi.create(req, conn.sock, conn.client, conn.server, self.cfg)
        environ["wsgi.multithread"] = True
        if not self.alive:
            response.force_close()
        body = self.wsgi(environ, response.start_response)
        if isinstance(body, JobStream):
            return self._begin(body, response, conn)
        response.sock = outbox = Outbox()
        try:
            for chunk in body:
                response.write(chunk)
            response.close()
        finally:
            if hasattr(body, "close"):
                body.close()
        return self._send(conn, memoryview(outbox.data), not response.should_close())

    def _send(self, conn: Connection, data: memoryview, keep: bool) -> Any:
        """Send an answer without waiting for its client, or another's answer would wait for a thread."""
        try:
            n = conn.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            n = 0
        if n == len(data):
            return keep
        keep = bool(self._keepalive_after(conn, keep))
        if self.leave_rest(conn, data[n:], keep):
            return RESTING
        if not self._pool.is_long:
            return False  # cut off: its thread is there for others
        conn.sock.settimeout(LONG_WRITE_SEC)
        try:
            conn.sock.sendall(data[n:])
        except TimeoutError:
            return False
        return keep

    def _begin(self, stream: JobStream, response: Any, conn: Connection) -> Any:
        """Leave a stream's answer to others, its head included: DETACHED says that `conn` is theirs."""
        try:
            response.sock = outbox = Outbox()
            response.send_headers()
            keep = not response.should_close() and self._keepalive_after(conn, True)

            def done(whole: bool) -> None:
                self.method_queue.defer(self._served, conn, whole and keep)

            stream.detach(self.writer, bytes(outbox.data), response.chunked, done)
        except BaseException as error:
            stream.close()
            if stream.begun and isinstance(error, Exception) and not isinstance(error, OSError):
                self.log.exception("Error handling request")  # a second answer would be taken for the first one's
                return False
            raise
        return DETACHED

    def _keepalive_after(self, conn: Connection, keepalive: Any) -> Any:
        """Whether another request may follow. A body that nobody read is skipped; it may turn out to be malformed."""
        if keepalive is DETACHED or keepalive is RESTING:
            return keepalive
        try:
            return bool(super()._keepalive_after(conn, keepalive))  # type: ignore[misc]
        except Exception:
            return False

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what gunicorn could not parse, or what failed outside of the application, as the application would."""
        try:
            client.sendall(self.told(raw_answers.refusal(exc), self._thread.head, addr))
        except OSError:
            pass
