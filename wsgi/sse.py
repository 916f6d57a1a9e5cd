"""JobStream: the server-sent events of one stream, from first bytes to its one end.

What the bytes are is said by a `StreamFormat`. Under our server no thread belongs to a stream: the output thread sends
pieces without Python, whoever ends a job writes the end, and the `EventWriter` tells of clients. Any other WSGI server
pulls the same bytes chunk by chunk. However a stream ends, its jobs end with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from worker_orcd._output import GONE, SENT, ClientStream
from worker_orcd.errors import Cancelled, NotReady, WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.serving.job import Finished, Job, TextPiece
from worker_orcd.wsgi.event_writer import EventWriter
from worker_orcd.wsgi.http_errors import from_exception
from worker_orcd.wsgi.job_record import JobRecord
from worker_orcd.wsgi.service import Service
from worker_orcd.wsgi.stream_format import StreamFormat

#: seconds between two looks at the time while no token comes, where a server pulls
WATCH_SEC = 0.05
#: seconds between two looks at the jobs of a stream that has several, where a server pulls
TURN_SEC = 0.005
#: seconds of silence after which a comment is sent
PING_SEC = 10.0
#: seconds after the grace time in which the job should have ended by itself
LATE_SEC = 0.2
#: seconds that a client has to take the last bytes of a stream that has ended; it keeps its place meanwhile
LAST_BYTES_SEC = 30.0
#: why a stream ends of which too much waits
DEAF = "the client does not read"
#: pieces put into one write where they are there already
MAX_PIECES_PER_WRITE = 64


class JobStream:
    """An iterable of chunks, never empty ones; or, after `detach`, a `Client` of the event writer, without a thread.

    `close` cancels what is not finished and may come at any time.

    Args:
        service: is told of errors and of the end.
        place: the stream's place in the service.
        jobs: the jobs to follow, already submitted: a choice each.
        format: says what the client gets.
        log: bound to the correlation id.
        sock: the client's connection, None outside gunicorn.
    """

    def __init__(
        self,
        service: Service,
        place: object,
        jobs: Sequence[Job],
        format: StreamFormat,
        log: EventLog,
        sock: socket.socket | None,
    ) -> None:
        self._service = service
        self._place = place
        self._format = format
        self._log = log
        self._sock = sock
        self._records = [JobRecord(job, log.bind(job_id=job.job_id)) for job in jobs]
        self._templates = [format.template(choice) for choice in range(len(jobs))]
        self._open = list(range(len(jobs)))  # choices that have not ended
        self._closed = False
        # where a server pulls
        self._last_write = time.monotonic()
        self._chunks = self._run()
        # after `detach`; the lock guards the state of the stream and the order of what is written
        self._lock = threading.Lock()
        self._begun = self._over = self._left = False
        self._over_at = 0.0
        self._writer: EventWriter | None = None
        self._body: ClientStream | None = None
        self._on_done: Callable[[bool], object] = lambda whole: None

    def close(self) -> None:
        """End the stream and its jobs. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._close_records()
        self._service.places.leave(self._place)

    def _close_records(self) -> None:
        """To be called before a client sees the end of its stream: whoever has seen it finds its job in the log, and
        that of the next one behind. Not while the lock is held, which the listener of a cancelled job takes."""
        for record in self._records:
            record.close()

    # -- the bytes

    def _news(self, choice: int, seconds: float) -> bytes:
        """What there is to say of a choice, having waited up to `seconds` for it; b"" for nothing new."""
        job, template = self._records[choice].job, self._templates[choice]
        pieces: list[TextPiece] = []
        event = job.next_event(seconds)
        while isinstance(event, TextPiece):
            pieces.append(event)
            if len(pieces) >= MAX_PIECES_PER_WRITE:
                break
            try:
                event = job.next_event(0)
            except WorkerError:
                break  # it can be read again, so it waits its turn
        chunk = b""
        if pieces and template is not None:
            chunk = b"".join(template.encode(piece.text, piece.index) for piece in pieces)
        elif pieces:
            chunk = self._format.pieces(choice, pieces)
        if isinstance(event, Finished):
            self._open.remove(choice)
            self._records[choice].finished(event)
            self._records[choice].close()  # of an ended job, so that nobody is told
            chunk += self._format.finished(choice, event)
        return chunk

    def _failed(self, cause: BaseException) -> bytes:
        """The end of the stream with an error."""
        error = from_exception(cause)
        for record in self._records:
            record.failed(error)
        if cause is not error:
            self._log.emit("error", "error", code=error.code, message=error.message)
        self._service.note_error(error)
        return self._format.failed(error)

    def _overdue(self) -> bool:
        deadline = self._service.stop_deadline
        return deadline is not None and time.monotonic() > deadline + LATE_SEC

    # -- pulled by a server

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            chunk = next(self._chunks)
        except BaseException:
            self.close()
            raise
        self._last_write = time.monotonic()
        return chunk

    def _run(self) -> Iterator[bytes]:
        try:
            yield self._format.opening()
            while True:
                alone, said = len(self._open) == 1, False
                for choice in list(self._open):
                    chunk = self._news(choice, WATCH_SEC if alone else 0)
                    if not self._open:
                        self._service.places.ends(self._place)
                        yield chunk + self._format.closing()
                        return
                    if chunk:
                        said = True
                        yield chunk
                if said:
                    continue
                if self._overdue():
                    raise NotReady("the worker is shutting down")
                if time.monotonic() - self._last_write >= PING_SEC:
                    yield self._format.ping
                if not alone:
                    time.sleep(TURN_SEC)
        except Exception as error:
            chunk = self._failed(error)
            self._service.places.ends(self._place)
            self._close_records()
            yield chunk

    # -- written by others

    @property
    def begun(self) -> bool:
        """Whether the head of the answer may be on its way."""
        return self._begun

    def detach(self, writer: EventWriter, head: bytes, chunked: bool, on_done: Callable[[bool], object]) -> None:
        """Write the answer to the client's socket from now on, in no thread of its own.

        Args:
            writer: watches the client.
            head: of the answer, with the empty line behind it.
            chunked: whether the body is framed by HTTP/1.1's chunks.
            on_done: called once when the socket is the caller's again, with whether all was sent; in any thread.
        """
        assert self._sock is not None, "detached without a connection"
        opening = self._format.opening()
        self._writer, self._on_done = writer, on_done
        with self._lock:  # nobody may look before the body is there
            self._body = body = writer.open(self._sock, chunked, self)
        try:
            self._begun = True
            if body.begin(head, opening) == GONE:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            for record, template in zip(self._records, self._templates, strict=True):
                if template is not None:
                    record.job.sink.attach(body, template.before, template.after, template.end)
            for choice, record in enumerate(self._records):
                record.job.listen(partial(self._look, choice))
        except BaseException:
            with self._lock:
                self._over, was_left, self._left = True, self._left, True
            if was_left:
                return  # the connection was given back when the client went
            body.release()
            writer.forget(self._sock)
            raise

    def gone(self) -> None:
        """See `Client`."""
        with self._lock:
            self._over = True
        self._leave(whole=False)

    def writable(self) -> None:
        """See `Client`."""
        with self._lock:
            assert self._body is not None, "it is watched"
            send = self._body.writable
            state = self._send_last(send) if self._over else send()
        if state == SENT:
            self._leave(whole=True)
        elif state == GONE:
            self.gone()

    def tick(self) -> None:
        """See `Client`."""
        with self._lock:
            body = self._body
            late = self._over and time.monotonic() - self._over_at > LAST_BYTES_SEC
            if body is None or (self._over and not late):
                return
            stalled = body.overflowed
            if not late and not stalled and not self._overdue() and body.silent_seconds >= PING_SEC:
                body.write(self._format.ping)
        if late:
            self.gone()
        elif stalled:
            for record in self._records:
                record.job.end(Cancelled(DEAF, job_id=record.job.job_id))
        elif self._overdue():
            self._write(partial(self._failed, NotReady("the worker is shutting down")), over=True)

    def _look(self, choice: int) -> None:
        """There may be news of a choice. Called by its job."""
        self._write(partial(self._news_until_end, choice))

    def _news_until_end(self, choice: int) -> bytes:
        assert self._body is not None, "it is written after `detach`"
        while choice in self._open:
            if self._body.lost:  # it may have finished before `tick` could end it
                raise Cancelled(DEAF, job_id=self._records[choice].job.job_id)
            chunk = self._news(choice, 0)
            if choice not in self._open:
                if not self._open:
                    chunk += self._format.closing()
                return chunk
            if not chunk:
                break
            self._body.write(chunk)  # at once: what comes next may be an error
        return b""

    def _write(self, make: Callable[[], bytes], over: bool = False) -> None:
        """Write what `make` returns, which is the end where nothing is open any more or `over`."""
        with self._lock:
            if self._over:
                return
            assert self._body is not None, "it is written after `detach`"
            try:
                chunk = make()
                self._over = over or not self._open
            except Exception as error:
                chunk, self._over = b"", True
                with contextlib.suppress(Exception):  # without its last event it ends all the same
                    chunk = self._failed(error)
            if not self._over:
                if chunk:
                    self._body.write(chunk)
                return
            self._over_at = time.monotonic()
        try:
            self._close_records()
        finally:
            state = self._send_last(partial(self._body.finish, chunk))
        if state == SENT:
            self._leave(whole=True)
        elif state == GONE:
            self.gone()  # where sending failed for want of memory, no event would tell

    def _send_last(self, send: Callable[[], int]) -> int:
        """Send what may be the last bytes; the state of the body. The place is free before the client can ask again."""
        with self._service.places.locked():
            state = send()
            if state == SENT:
                self._service.places.leave(self._place)
        return state

    def _leave(self, whole: bool) -> None:
        """The socket is left to the server."""
        with self._lock:
            if self._left:
                return
            self._left = True
        assert self._writer is not None and self._body is not None and self._sock is not None, "after `detach`"
        self._body.release()
        self._writer.forget(self._sock)
        try:
            self.close()
        finally:
            self._on_done(whole)
