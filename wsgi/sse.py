"""JobStream: the server-sent events of one stream, from first bytes to its one end; `wait_for`: jobs answered whole.

What the bytes are is said by a `StreamFormat`. WSGI pulls them chunk by chunk. While a stream waits for tokens it
watches the client's socket, because a server that only writes learns of a dead client at the second write. However a
stream ends, its jobs end with it.
"""

from __future__ import annotations

import hashlib
import select
import socket
import time
from collections.abc import Iterator, Sequence

from worker_orcd.errors import Cancelled, NotReady, WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.serving.job import Completion, Finished, Job, TextPiece
from worker_orcd.wsgi.http_errors import from_exception
from worker_orcd.wsgi.service import Service
from worker_orcd.wsgi.stream_format import StreamFormat

#: seconds between two looks at the client's socket while no token comes
WATCH_SEC = 0.05
#: seconds between two looks at the jobs of a stream that has several
TURN_SEC = 0.005
#: seconds of silence after which a comment is sent
PING_SEC = 10.0
#: seconds after the grace time in which the job should have ended by itself
LATE_SEC = 0.2
#: pieces put into one write where they are there already
MAX_PIECES_PER_WRITE = 64


class ClientSocket:
    """Tells whether the other side has gone. With no socket (outside gunicorn) it never has."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._poll = None
        if sock is not None:
            self._poll = select.poll()
            self._poll.register(sock, select.POLLRDHUP)

    def gone(self) -> bool:
        """Whether the client closed or half-closed its connection. Does not wait."""
        return self._poll is not None and bool(self._poll.poll(0))


class JobRecord:
    """What the log says of a job when it is over."""

    def __init__(self, job: Job, log: EventLog) -> None:
        self.job = job
        self._log = log
        self._began = time.monotonic()
        self._outcome: dict[str, object] = {"outcome": "disconnected"}
        self._text_hash = hashlib.sha256()
        self._text_chars = 0
        self._tokens_out = 0
        self._closed = False

    def text(self, text: str, n_tokens: int) -> None:
        """Text of `n_tokens` tokens goes to the client."""
        self._text_hash.update(text.encode("utf-8", "replace"))
        self._text_chars += len(text)
        self._tokens_out += n_tokens

    def finished(self, end: Finished) -> None:
        """The job came to its end."""
        times = end.timings
        self._tokens_out = end.tokens_out
        self._outcome = {
            "outcome": "finished",
            "finish_reason": end.finish_reason,
            "queue_ms": times.queue_ms,
            "prefill_ms": times.prefill_ms,
            "decode_ms": times.decode_ms,
            "tokens_per_s": times.tokens_per_s,
        }

    def failed(self, error: WorkerError) -> None:
        """The job ended with an error, its own or that of another choice."""
        self._outcome = {"outcome": "error", "code": error.code, "message": error.message}

    def close(self) -> None:
        """Cancel the job if it still runs and write `execute_end`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.job.cancel()
        self._log.emit(
            "execute_end",
            "info" if "code" not in self._outcome else "warning",
            **self._outcome,
            tokens_in=self.job.tokens_in,
            tokens_out=self._tokens_out,
            text_chars=self._text_chars,
            text_sha256=self._text_hash.hexdigest(),
            seconds=time.monotonic() - self._began,
        )


class JobStream:
    """An iterable of chunks, never empty ones. `close` cancels what is not finished and may come at any time.

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
        self._records = [JobRecord(job, log.bind(job_id=job.job_id)) for job in jobs]
        self._templates = [format.template(choice) for choice in range(len(jobs))]
        self._client = ClientSocket(sock)
        self._last_write = time.monotonic()
        self._closed = False
        self._chunks = self._run()

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

    def close(self) -> None:
        """End the stream and its jobs. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for record in self._records:
            record.close()
        self._service.leave_place(self._place)

    def _run(self) -> Iterator[bytes]:
        open_choices = list(range(len(self._records)))
        try:
            yield self._format.opening()
            while open_choices:
                chunk = b""
                for choice in list(open_choices):
                    event = self._records[choice].job.next_event(WATCH_SEC if len(open_choices) == 1 else 0)
                    if isinstance(event, TextPiece):
                        chunk += self._pieces(choice, event)
                    elif isinstance(event, Finished):
                        open_choices.remove(choice)
                        self._records[choice].finished(event)
                        chunk += self._format.finished(choice, event)
                if not open_choices:
                    self._service.place_ends(self._place)
                    yield chunk + self._format.closing()
                    return
                if self._client.gone():
                    return
                if chunk:
                    yield chunk
                    continue
                if self._overdue():
                    raise NotReady("the worker is shutting down")
                if time.monotonic() - self._last_write >= PING_SEC:
                    yield self._format.ping
                if len(open_choices) > 1:
                    time.sleep(TURN_SEC)
        except Exception as error:
            if self._client.gone():
                return
            self._service.place_ends(self._place)
            yield self._failed(from_exception(error), error, open_choices)

    def _pieces(self, choice: int, first: TextPiece) -> bytes:
        """The piece and those that are there already. The terminal event can be read again, so it waits its turn."""
        record, pieces = self._records[choice], [first]
        while len(pieces) < MAX_PIECES_PER_WRITE:
            try:
                event = record.job.next_event(0)
            except WorkerError:
                break
            if not isinstance(event, TextPiece):
                break
            pieces.append(event)
        for piece in pieces:
            record.text(piece.text, len(piece.token_ids))
        template = self._templates[choice]
        if template is None:
            return self._format.pieces(choice, pieces)
        return b"".join(template.encode(piece.text, piece.index) for piece in pieces)

    def _failed(self, error: WorkerError, cause: BaseException, open_choices: Sequence[int]) -> bytes:
        for choice in open_choices:
            self._records[choice].failed(error)
        if cause is not error:
            self._log.emit("error", "error", code=error.code, message=error.message)
        self._service.note_error(error)
        return self._format.failed(error)

    def _overdue(self) -> bool:
        deadline = self._service.stop_deadline
        return deadline is not None and time.monotonic() > deadline + LATE_SEC


def wait_for(
    service: Service, place: object, jobs: Sequence[Job], log: EventLog, sock: socket.socket | None
) -> list[Completion]:
    """Wait for the ends of jobs that are answered whole, in their order. When one fails or the client goes, all end.

    Args:
        as `JobStream`.

    Raises:
        WorkerError: the first job's that failed; Cancelled: the client has gone.
    """
    client = ClientSocket(sock)
    records = [JobRecord(job, log.bind(job_id=job.job_id)) for job in jobs]
    try:
        completions = []
        for record in records:
            while not isinstance(event := record.job.next_event(WATCH_SEC), Finished):
                if isinstance(event, TextPiece):
                    record.text(event.text, len(event.token_ids))
                elif client.gone():
                    raise Cancelled("the client has gone", job_id=record.job.job_id)
            record.finished(event)
            completions.append(record.job.completion())
        return completions
    except Exception as error:
        known = from_exception(error)
        for record in records:
            if not record.job.finished:
                record.failed(known)
        service.note_error(known)
        raise
    finally:
        for record in records:
            record.close()
        service.leave_place(place)
