"""Entry: a sequence as the threads of the loop share it, and what the ring between them carries beside tokens."""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.errors import InternalError, WorkerError
from worker_orcd.serving.detokenizer import Detokenizer
from worker_orcd.serving.job import Job
from worker_orcd.serving.logits_job import LogitsJob
from worker_orcd.serving.work import SequenceState

#: entries of the ring that are no tokens; WAKE makes the output thread look at the deadlines again. They are far from
#: the -1 by which an engine says that it could draw no token
STOP, LENGTH, FAILED, WAKE = -1001, -1002, -1003, -1004
#: `SequenceState.ended` -> the mark that ends the sequence in the ring
MARKS = {"stop": STOP, "length": LENGTH, "failed": FAILED}


@dataclass
class Entry:
    """A sequence that has not ended for its client. `text`: what makes its pieces in Python; None where its job's sink
    does, and for logits."""

    seq: SequenceState
    job: Job | LogitsJob
    text: Detokenizer | None


def as_worker_error(error: BaseException, what: str) -> WorkerError:
    """The error itself where it is one of ours, else an `InternalError` that says what went wrong."""
    if isinstance(error, WorkerError):
        return error
    wrapped = InternalError(f"{what}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
