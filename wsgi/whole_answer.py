"""`wait_for`: jobs that are answered whole, in the thread of their request; they end where their client goes."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from worker_orcd.errors import Cancelled
from worker_orcd.observe.events import EventLog
from worker_orcd.serving.job import Completion, Finished, Job
from worker_orcd.wsgi.http_errors import from_exception
from worker_orcd.wsgi.job_record import JobRecord
from worker_orcd.wsgi.service import Service


class _Waiting:
    """The `Client` of jobs that are answered whole: when it goes, they end."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.has_gone = False

    def gone(self) -> None:
        """See `Client`."""
        self.has_gone = True
        for job in self._jobs:
            job.end(Cancelled("the client has gone", job_id=job.job_id))

    def writable(self) -> None:
        """Nothing is written."""

    def tick(self) -> None:
        """Its jobs have their own deadlines."""


def wait_for(
    service: Service, place: object, jobs: Sequence[Job], log: EventLog, sock: socket.socket | None
) -> list[Completion]:
    """Wait for the ends of jobs that are answered whole, in their order. When one fails or the client goes, all end.

    It keeps the calling thread, which sleeps meanwhile.

    Args:
        as `JobStream`.

    Raises:
        WorkerError: the first job's that failed; Cancelled: the client has gone.
        RuntimeError: no thread would be left for others.
    """
    records = [JobRecord(job, log.bind(job_id=job.job_id)) for job in jobs]
    client, writer = _Waiting(jobs), service.writer
    try:
        service.keep_thread()
        if writer is not None and sock is not None:
            writer.watch(sock, client)
        try:
            completions = []
            for record in records:
                done = record.job.completion()
                record.finished(Finished(done.finish_reason, len(done.token_ids), done.timings, done.stop_reason))
                completions.append(done)
            return completions
        finally:
            if writer is not None and sock is not None:
                writer.forget(sock)
    except Exception as error:
        known = from_exception(error)
        if not client.has_gone:
            for record in records:
                record.failed(known)
        service.note_error(known)
        raise
    finally:
        for record in records:
            record.close()
        service.places.leave(place)
