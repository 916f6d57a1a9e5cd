"""CollectingWorker: the gthread worker with a main loop that collects requests and lingers on connections that end.

It waits for no single connection, and a thread gets a request when nothing of it is missing. So the threads are there
for those who are served, whatever other clients do.

- Heads and bodies must arrive within `READ_LIMIT_SEC`, and all that is arriving fits into one budget of memory.
- When there are as many connections as may be, or no file descriptor is left, the one that has waited longest makes
  room for the new one; where none waits, accepting pauses.

It builds on the methods of gunicorn's ThreadWorker that it overrides.
"""

from __future__ import annotations

import errno
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from worker_orcd.errors import WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.wsgi import raw_answers
from worker_orcd.wsgi.connections import FREE_BYTES, Budget, Connection, Deadlines, Rest
from worker_orcd.wsgi.middleware import peer
from worker_orcd.wsgi.request_buffer import State

#: seconds a client has to send a whole request
READ_LIMIT_SEC = 20.0
#: seconds a closing connection waits for the other side to close, and the bytes it takes meanwhile
LINGER_SEC, LINGER_BYTES = 1.0, 8 << 20
#: milliseconds after which a client that takes nothing is cut off
WRITE_LIMIT_MS = 30_000
#: seconds in which the first bytes of a new connection may still be on their way
FRESH_SEC = 0.5
#: bytes that such a client must take meanwhile of an answer that it is sent whole, or the rest of it
WRITE_LEAST_BYTES = 1 << 16
#: bytes of answers that wait for their clients, in all; beyond them a thread that has one long answer to give waits
#: itself, and other clients are cut off
MAX_REST_BYTES = 64 << 20
#: bytes of requests that are being received, in all, beyond what each connection has free
MAX_RECEIVED_BYTES = 64 << 20
#: bytes read of one connection before the next one's turn
RECV_BYTES = 1 << 16
#: seconds without accepting where no descriptor is left, and between two log lines that say so
ACCEPT_PAUSE_SEC, COMPLAINT_SEC = 0.1, 60.0
#: what a thread returns for a request that is answered on without it, by others or by the main loop
DETACHED, RESTING = object(), object()
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class CollectingWorker(ThreadWorker):
    """A connection is served (by a thread, or as a stream), or waits in one of four places: idle, for its first byte;
    reading, for the rest of a request; unsent, for the client to take its last answer; closing, for it to close.

    Attributes:
        events: the narration log; set before the first request.
        on_refused: called with code and status of an answer that the application does not know.
    """

    events: EventLog
    on_refused: Callable[[str, int], None] = staticmethod(lambda code, status: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = self.worker_connections
        self.worker_connections = self.max_keepalived = sys.maxsize  # ours to see to: gunicorn would stop accepting
        self._idle = Deadlines(self.cfg.keepalive)
        self._reading = Deadlines(READ_LIMIT_SEC)
        self._unsent = Deadlines(WRITE_LIMIT_MS / 1000)
        self._closing = Deadlines(LINGER_SEC)
        self._budget = Budget(MAX_RECEIVED_BYTES)
        self._accept_again = self._complain_again = 0.0
        self._rests_lock = threading.Lock()
        self._n_rests = self._rest_bytes = 0

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Nothing: gunicorn's check is of a rule that does not hold here."""

    # -- the main loop

    def wait_for_and_dispatch_events(self, timeout: float | None) -> None:
        """One turn: events, then whose time is over."""
        now = time.monotonic()
        places = (self._idle, self._reading, self._unsent, self._closing)
        end = min(now + (1.0 if timeout is None else timeout), *(place.end() for place in places))
        if self._accept_again:
            end = min(end, self._accept_again)
        super().wait_for_and_dispatch_events(max(0.0, end - now))
        now = time.monotonic()
        for place in places:
            while place.end() <= now:
                conn = place.first()
                assert conn is not None, "somebody's time is over"
                if place is self._reading:
                    self.refuse(conn, raw_answers.too_slow(READ_LIMIT_SEC))
                else:
                    self._drop(conn)
        if self._accept_again and self._accept_again <= now:
            self._accept_again = 0.0
            for listener in self.sockets:
                self.poller.register(listener, selectors.EVENT_READ, self.accept)

    def accept(self, listener: socket.socket) -> None:
        """Take a connection, and what it has sent already."""
        if self.nr_conns >= self._limit and not self._make_room():
            self._pause()
            return
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._complain()
                if not self._make_room():
                    self._pause()
            return  # else: the client is gone again
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, WRITE_LIMIT_MS)
            conn = Connection(self.cfg, client, address, listener.getsockname())
        except OSError:
            client.close()
            return
        self.nr_conns += 1
        self._wait(conn, self._idle, self._receive)
        self._act(conn, self._receive)

    def _make_room(self) -> bool:
        """End the connection that has waited longest, least harm first. False where all are being served.

        Of those that wait for a request, an idle one goes first, unless it has just come and its request is on its way.
        """
        old_idle = self._idle if self._idle.oldest() >= min(FRESH_SEC, self._reading.oldest()) else None
        for place in (self._closing, self._unsent, old_idle, self._reading, self._idle):
            conn = None if place is None else place.first()
            if conn is None:
                continue
            if place is self._reading:
                self.refuse(conn, raw_answers.too_much())
            if conn.waits is not None:
                self._drop(conn)
            return True
        return False

    def _pause(self) -> None:
        """Accept nothing for a while: the poller would say again and again that somebody is there."""
        if self._accept_again:
            return
        self._accept_again = time.monotonic() + ACCEPT_PAUSE_SEC
        for listener in self.sockets:
            self.poller.unregister(listener)

    def _complain(self) -> None:
        now = time.monotonic()
        if now >= self._complain_again:
            self._complain_again = now + COMPLAINT_SEC
            self.log.warning("no file descriptor is left for a new connection")

    def _wait(self, conn: Connection, place: Deadlines, act: Callable[[Connection], None], write: bool = False) -> None:
        """Let `conn` wait in `place` until its socket can be read (or written), then `act`. Where the system does not
        watch one more, it ends: the main loop must not."""
        event = selectors.EVENT_WRITE if write else selectors.EVENT_READ
        try:
            self.poller.register(conn.sock, event, partial(self._act, conn, act))
        except Exception:
            self.log.exception("a connection cannot be watched")
            self._drop(conn)
            return
        place.add(conn)

    def _act(self, conn: Connection, act: Callable[[Connection], None], sock: object = None) -> None:
        if conn.waits is None:
            return  # ended by what came before in the same turn
        try:
            act(conn)
        except Exception:
            self.log.exception("a connection failed")
            if conn.waits is not None:
                self._drop(conn)

    def _leave_place(self, conn: Connection) -> None:
        if conn.waits is not None:
            self.poller.unregister(conn.sock)
            conn.waits.remove(conn)

    def _drop(self, conn: Connection) -> None:
        """End a connection now."""
        self._leave_place(conn)
        self._budget.give_back(conn)
        self._forget_rest(conn)
        self.nr_conns -= 1
        conn.close()

    # -- collecting

    def _receive(self, conn: Connection) -> None:
        """Read what is there."""
        try:
            data = conn.sock.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._drop(conn)
            return
        if data:
            self._collect(conn, data)
        elif conn.buffer.state is State.BODY:
            self._dispatch(conn)  # it is told that its body ended early
        else:
            self._drop(conn)

    def _collect(self, conn: Connection, data: bytes) -> None:
        buffer = conn.buffer
        if conn.waits is self._idle:
            self._reading.add(conn)
        buffer.feed(data)
        if not self._budget.hold(conn, len(buffer.data)):
            self.refuse(conn, raw_answers.too_much())
            return
        if buffer.wants_continue:
            buffer.wants_continue = False
            try:
                conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError:
                pass  # it is gone, or will send without
        if buffer.ready:
            self._dispatch(conn)

    def _dispatch(self, conn: Connection) -> None:
        """Give a request to a thread - once the last answer is taken, or its thread would wait for that."""
        self._leave_place(conn)
        if conn.parser.req_count and not _writable(conn.sock):
            self._wait(conn, self._unsent, self._dispatch, write=True)
            return
        conn.reader.give(conn.buffer)
        self.enqueue_req(conn)

    # -- after serving, in the main loop

    def finish_request(self, conn: Connection, fs: Future[Any]) -> None:  # type: ignore[override]
        """A thread has answered a request: wait for the next one, or for the client to take the rest, or close."""
        result = False if fs.cancelled() or fs.exception() is not None else fs.result()
        if result is RESTING:
            self._wait(conn, self._unsent, self._send_rest, write=True)
        else:
            self._served(conn, result is True)

    def leave_rest(self, conn: Connection, data: memoryview, keep: bool) -> bool:
        """Let the main loop send `data` when the thread is done with `conn`; in that thread. False where it cannot."""
        with self._rests_lock:
            if self._rest_bytes + len(data) > MAX_REST_BYTES:
                return False
            self._n_rests += 1
            self._rest_bytes += len(data)
        conn.sock.setblocking(False)
        conn.rest = Rest(data, keep, len(data))
        return True

    def _send_rest(self, conn: Connection) -> None:
        rest = conn.rest
        assert rest is not None, "it waits for this"
        try:
            n = conn.sock.send(rest.data)
        except BlockingIOError:
            return
        except OSError:
            self._drop(conn)
            return
        rest.data = rest.data[n:]
        with self._rests_lock:
            self._rest_bytes -= n
        if not rest.data:
            self._leave_place(conn)
            self._forget_rest(conn)
            self._served(conn, rest.keep)
        elif rest.mark - len(rest.data) >= WRITE_LEAST_BYTES:
            rest.mark = len(rest.data)
            self._unsent.add(conn)

    def _forget_rest(self, conn: Connection) -> None:
        if conn.rest is None:
            return
        with self._rests_lock:
            self._n_rests -= 1
            self._rest_bytes -= len(conn.rest.data)
        conn.rest = None

    def _served(self, conn: Connection, keep: bool) -> None:
        """A request is answered: wait for the next one, or close."""
        if not keep:
            self._close(conn)
            return
        try:
            conn.sock.setblocking(False)
        except OSError:
            self._drop(conn)
            return
        rest = conn.next_request()
        self._wait(conn, self._idle, self._receive)
        if rest:
            self._act(conn, partial(self._collect, data=rest))

    def refuse(self, conn: Connection, error: WorkerError) -> None:
        """Answer without a thread, and close."""
        answer = self.told(error, bytes(conn.buffer.data[:FREE_BYTES]) or conn.reader.head, conn.client)
        try:
            conn.sock.send(answer)
        except OSError:
            pass
        self._close(conn)

    def _close(self, conn: Connection) -> None:
        """Half-close and wait a little for the other side, or the answer's last bytes may be lost (RFC 9112, 9.6)."""
        self._leave_place(conn)
        self._budget.give_back(conn)
        conn.buffer.data = bytearray()
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        self._wait(conn, self._closing, self._drain)
        if conn.waits is not None:
            self._drain(conn)

    def _drain(self, conn: Connection) -> None:
        try:
            n = len(conn.sock.recv(RECV_BYTES))
        except BlockingIOError:
            return
        except OSError:
            n = 0
        conn.drained += n
        if not n or conn.drained > LINGER_BYTES:
            self._drop(conn)

    def told(self, error: WorkerError, head: bytes, address: Any) -> bytes:
        """The answer of an error that the application does not know, which is logged here."""
        correlation = raw_answers.id_of(head)
        at_peer = peer(*address[:2]) if isinstance(address, tuple) else None
        facts = {"status": error.status, "code": error.code, "message": error.message}
        name, level = ("error", "error") if error.code == "INTERNAL" else ("refused", "info")
        self.events.emit(name, level, **facts, peer=at_peer, correlation_id=correlation)
        self.on_refused(error.code, error.status)
        return raw_answers.encode(error, correlation, raw_answers.path_of(head))


def _writable(sock: socket.socket) -> bool:
    """Whether a short answer could be sent now."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))
