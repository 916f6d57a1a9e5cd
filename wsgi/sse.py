"""JobStream: the server-sent events of one job, from `started` to its one terminal event.

WSGI pulls it chunk by chunk. While it waits for tokens it watches the client's socket, because a server that only
writes learns of a dead client at the second write. However the stream ends, its job ends with it.
"""

from __future__ import annotations

import hashlib
import select
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import msgspec

from worker_orcd.errors import NotReady, WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.serving.job import Finished, Job, TextPiece
from worker_orcd.wsgi.http_errors import from_exception, sse_event
from worker_orcd.wsgi.service import Service

#: seconds between two looks at the client's socket while no token comes
WATCH_SEC = 0.05
#: seconds of silence after which a comment is sent
PING_SEC = 10.0
#: seconds after the grace time in which the job should have ended by itself
LATE_SEC = 0.2
#: pieces put into one write where they are there already
MAX_PIECES_PER_WRITE = 64

_PING = b": ping\n\n"
_UNICODE_LINE_BREAKS = tuple((chr(c).encode(), b"\\u%04x" % c) for c in (0x85, 0x2028, 0x2029))


def encode_event(name: str, data: Mapping[str, object]) -> bytes:
    """One server-sent event. JSON escapes the line breaks of ASCII; those of Unicode, at which many clients cut lines
    too, are escaped here, so the data is one line for everybody."""
    text = msgspec.json.encode(data, enc_hook=str)
    if not text.isascii():
        for line_break, escape in _UNICODE_LINE_BREAKS:
            text = text.replace(line_break, escape)
    return b"event: " + name.encode("ascii") + b"\ndata: " + text + b"\n\n"


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


class JobStream:
    """An iterable of SSE chunks, never empty ones. `close` cancels what is not finished and may come at any time.

    Args:
        service: is told of errors and of the end.
        place: the stream's place in the service.
        job: the job to follow, already submitted.
        events: log bound to the job and its correlation id.
        sock: the client's connection, None outside gunicorn.
    """

    def __init__(self, service: Service, place: object, job: Job, events: EventLog, sock: socket.socket | None) -> None:
        self._service = service
        self._place = place
        self._job = job
        self._log = events
        self._client = ClientSocket(sock)
        self._began = time.monotonic()
        self._last_write = self._began
        self._outcome: dict[str, object] = {"outcome": "disconnected"}
        self._text_hash = hashlib.sha256()
        self._text_chars = 0
        self._tokens_out = 0
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
        """End the stream: cancel the job if it still runs and write `execute_end`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._job.cancel()
        self._service.leave_place(self._place)
        self._log.emit(
            "execute_end",
            "info" if "code" not in self._outcome else "warning",
            **self._outcome,
            tokens_in=self._job.tokens_in,
            tokens_out=self._tokens_out,
            text_chars=self._text_chars,
            text_sha256=self._text_hash.hexdigest(),
            seconds=time.monotonic() - self._began,
        )

    def _run(self) -> Iterator[bytes]:
        job = self._job
        try:
            yield encode_event(
                "started",
                {
                    "job_id": job.job_id,
                    "model": self._service.health()[1]["model"],
                    "started_at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                    "seed": job.seed,
                    "tokens_in": job.tokens_in,
                },
            )
            while True:
                event = job.next_event(WATCH_SEC)
                if isinstance(event, Finished):
                    self._service.place_ends(self._place)
                    yield self._finished(event)
                    return
                if self._client.gone():
                    return
                if isinstance(event, TextPiece):
                    yield self._pieces(event)
                elif self._overdue():
                    raise NotReady("the worker is shutting down")
                elif time.monotonic() - self._last_write >= PING_SEC:
                    yield _PING
        except Exception as error:
            if self._client.gone():
                return
            self._service.place_ends(self._place)
            yield self._failed(from_exception(error), error)

    def _pieces(self, first: TextPiece) -> bytes:
        """The piece and those that are there already. The terminal event can be read again, so it waits its turn."""
        chunk = [self._piece(first)]
        while len(chunk) < MAX_PIECES_PER_WRITE:
            try:
                event = self._job.next_event(0)
            except WorkerError:
                break
            if not isinstance(event, TextPiece):
                break
            chunk.append(self._piece(event))
        return b"".join(chunk)

    def _piece(self, piece: TextPiece) -> bytes:
        self._text_hash.update(piece.text.encode("utf-8", "replace"))
        self._text_chars += len(piece.text)
        self._tokens_out += len(piece.token_ids)
        return encode_event("token", {"t": piece.text, "i": piece.index})

    def _finished(self, end: Finished) -> bytes:
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
        metrics = {
            "queue_ms": round(times.queue_ms, 3),
            "prefill_ms": round(times.prefill_ms, 3),
            "decode_ms": round(times.decode_ms, 3),
            "tokens_per_s": round(times.tokens_per_s, 2),
        }
        return encode_event("metrics", metrics) + encode_event(
            "end",
            {
                "tokens_out": end.tokens_out,
                "decode_time_ms": round(times.decode_ms, 3),
                "finish_reason": end.finish_reason,
            },
        )

    def _failed(self, error: WorkerError, cause: BaseException) -> bytes:
        self._outcome = {"outcome": "error", "code": error.code, "message": error.message}
        if cause is not error:
            self._log.emit("error", "error", code=error.code, message=error.message)
        self._service.note_error(error)
        return encode_event(*sse_event(error))

    def _overdue(self) -> bool:
        deadline = self._service.stop_deadline
        return deadline is not None and time.monotonic() > deadline + LATE_SEC
