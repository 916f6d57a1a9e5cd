"""JobRecord: what the log says of a job of an answer when it is over."""

from __future__ import annotations

import hashlib
import threading
import time

from worker_orcd.errors import WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.serving.job import Finished, Job


class JobRecord:
    """What the log says of a job when it is over."""

    def __init__(self, job: Job, log: EventLog) -> None:
        self.job = job
        self._log = log
        self._began = time.monotonic()
        self._outcome: dict[str, object] = {"outcome": "disconnected"}
        self._ended = self._closed = False
        self._closing = threading.Lock()

    def finished(self, end: Finished) -> None:
        """The job came to its end."""
        times = end.timings
        self._ended = True
        self._outcome = {
            "outcome": "finished",
            "finish_reason": end.finish_reason,
            "queue_ms": times.queue_ms,
            "prefill_ms": times.prefill_ms,
            "decode_ms": times.decode_ms,
            "tokens_per_s": times.tokens_per_s,
        }

    def failed(self, error: WorkerError) -> None:
        """The job ended with an error, its own or that of another choice; no effect on one that has finished."""
        if not self._ended:
            self._outcome = {"outcome": "error", "code": error.code, "message": error.message}

    def close(self) -> None:
        """Cancel the job if it still runs and write `execute_end`. Idempotent; in any thread."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self.job.cancel()
        text = self.job.sink.text
        self._log.emit(
            "execute_end",
            "info" if "code" not in self._outcome else "warning",
            **self._outcome,
            tokens_in=self.job.tokens_in,
            cached_tokens=self.job.cached_tokens,
            tokens_out=self.job.sink.n_tokens,
            text_chars=len(text),
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            seconds=time.monotonic() - self._began,
        )
