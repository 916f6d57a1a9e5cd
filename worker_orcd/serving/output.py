"""Output: the work of the output thread. Tokens of the ring become text of their jobs; jobs past their deadline end.

Most of it is done by an `OutputLoop` without Python, which comes back where a job has ended, where somebody waits for a
piece, and with tokens that are decoded here (by the decoders of libraries).
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Mapping

from worker_orcd._output import MARK, PIECE, STOPPED, TOKEN, OutputLoop
from worker_orcd._ring import TokenRing
from worker_orcd.errors import InferenceTimeout, InternalError
from worker_orcd.serving.entry import FAILED, LENGTH, STOP, WAKE, Entry, as_worker_error
from worker_orcd.serving.job import Job

_FOREVER = 3600.0


class Output:
    """Reads the ring until it is closed.

    Args:
        ring: carries tokens and marks.
        lock: guards the deadlines; the loop's.
        entries: the sequences that have not ended for their clients, by seq_id; others change it.
    """

    def __init__(self, ring: TokenRing, lock: threading.Condition, entries: Mapping[int, Entry]) -> None:
        self._ring = ring
        self._lock = lock
        self._entries = entries
        self._loop = OutputLoop(ring, FAILED)
        self._deadlines: list[tuple[float, int]] = []  # heap of (deadline, seq_id)

    def add(self, entry: Entry) -> None:
        """Bring the tokens of a sequence that is among the entries, or soon will be, to its job."""
        if isinstance(entry.job, Job):
            self._loop.add(entry.job.seq_id, entry.job.sink)

    def remove(self, seq_id: int) -> None:
        """The sequence has ended for its client."""
        self._loop.remove(seq_id)

    def watch(self, deadline: float, seq_id: int) -> bool:
        """Note a deadline, the lock held. True where it is the next one: then `wake` the thread, the lock released."""
        heapq.heappush(self._deadlines, (deadline, seq_id))
        return self._deadlines[0][1] == seq_id

    def wake(self) -> None:
        """Let the thread look at the deadlines again. From any thread."""
        try:
            self._ring.put(0, WAKE)
        except RuntimeError:
            # the ring closes only when the loop ends, which ends the job as well
            return

    def run(self) -> None:
        """The body of the thread."""
        while True:
            reports = self._loop.run(self._expire())
            if not reports and self._ring.closed and not len(self._ring):
                return
            for seq_id, kind, value in reports:
                entry = self._entries.get(seq_id)
                if entry is None or not isinstance(entry.job, Job):
                    continue  # past its end
                try:
                    self._report(entry, entry.job, kind, value)
                except BaseException as error:  # a library's panic is no Exception, and hurts the one job as well
                    entry.job.end(as_worker_error(error, "the text of the job could not be made"))

    def _report(self, entry: Entry, job: Job, kind: int, value: int) -> None:
        if kind == PIECE:
            job.tell()
        elif kind == TOKEN and entry.text is not None:
            entry.text.push(value)
        elif kind == STOPPED:
            job.finish("stop", _stop_reason(job))
        elif kind == MARK and value == FAILED:
            job.end(InternalError("the logits of the next token are no numbers, or every token is banned"))
        elif kind == MARK and value in (STOP, LENGTH):
            reason = "stop" if value == STOP else "length"
            if entry.text is None:
                job.finish(reason, _stop_reason(job))
            else:
                entry.text.end(reason)

    def _expire(self) -> float:
        """End jobs past their deadline. Returns the seconds to the next deadline."""
        while True:
            with self._lock:
                if not self._deadlines:
                    return _FOREVER
                deadline, seq_id = self._deadlines[0]
                left = deadline - time.monotonic()
                entry = self._entries.get(seq_id)
                if left > 0 and entry is not None:
                    return min(left, _FOREVER)
                heapq.heappop(self._deadlines)
            if entry is not None:
                entry.job.end(InferenceTimeout("the job is past its deadline", job_id=entry.job.job_id))


def _stop_reason(job: Job) -> int | str | None:
    """Which of its stop strings and stop tokens ended a job whose sink decodes."""
    text, token = job.sink.ended_by
    return text or (token if token in job.params.stop_token_ids else None)
