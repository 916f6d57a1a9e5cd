"""The events of POST /execute: `started`, `token`*, then `metrics` and `end`, or `error`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from worker_orcd.errors import WorkerError
from worker_orcd.serving.job import Finished, Job, TextPiece
from worker_orcd.wsgi.http_errors import sse_event
from worker_orcd.wsgi.stream_format import PING, PieceTemplate, encode_event

_TOKEN = PieceTemplate(b'event: token\ndata: {"t":"', b'","i":', b"}\n\n")


class JobEvents:
    """The `StreamFormat` of one job.

    Args:
        job: the job, already submitted.
        model: its model's name.
    """

    ping = PING

    def __init__(self, job: Job, model: str) -> None:
        self._job = job
        self._model = model

    def opening(self) -> bytes:
        """The event `started`."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        job = self._job
        return encode_event(
            "started",
            {
                "job_id": job.job_id,
                "model": self._model,
                "started_at": now,
                "seed": job.seed,
                "tokens_in": job.tokens_in,
            },
        )

    def template(self, choice: int) -> PieceTemplate:
        """The event `token`."""
        return _TOKEN

    def pieces(self, choice: int, pieces: Sequence[TextPiece]) -> bytes:
        """The same, by the template."""
        return b"".join(_TOKEN.encode(piece.text, piece.index) for piece in pieces)

    def finished(self, choice: int, end: Finished) -> bytes:
        """The events `metrics` and `end`."""
        times = end.timings
        metrics = {
            "queue_ms": round(times.queue_ms, 3),
            "prefill_ms": round(times.prefill_ms, 3),
            "decode_ms": round(times.decode_ms, 3),
            "tokens_per_s": round(times.tokens_per_s, 2),
        }
        last = {
            "tokens_out": end.tokens_out,
            "decode_time_ms": round(times.decode_ms, 3),
            "finish_reason": end.finish_reason,
        }
        return encode_event("metrics", metrics) + encode_event("end", last)

    def closing(self) -> bytes:
        """Nothing: the one job's end is the stream's."""
        return b""

    def failed(self, error: WorkerError) -> bytes:
        """The event `error`."""
        return encode_event(*sse_event(error))
