"""TokenStream: the pieces of one job as an iterator, which cancels the job when it is left."""

from __future__ import annotations

from collections.abc import Iterator

from worker_orcd.serving.job import Job, TextPiece


class TokenStream(Iterator[TextPiece]):
    """The pieces of one job, in order. Leaving it early (`close`, `with`, garbage collection) cancels the job.

    Args:
        owner: the model that runs the job; it is kept alive.

    Attributes:
        job: the job; `job.completion()` is the whole result once the pieces are read.

    In a process that was forked from that of the model, iterating raises `EngineGone` and leaving does nothing.
    """

    def __init__(self, owner: object, job: Job) -> None:
        self.job = job
        self._owner = owner  # a model that only its stream needs must stay

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TextPiece:
        try:
            event = self.job.next_event()
        except BaseException:  # KeyboardInterrupt too: nobody reads on
            self.job.abandon()
            raise
        if isinstance(event, TextPiece):
            return event
        raise StopIteration

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.job.abandon()

    def close(self) -> None:
        """Cancel the job where it has not ended. Idempotent."""
        self.job.leave()
