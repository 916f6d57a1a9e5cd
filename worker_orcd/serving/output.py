"""Output: the work of the output thread. Tokens of the ring become text of their jobs; jobs past their deadline end."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Mapping
from typing import Any

from worker_orcd.errors import InferenceTimeout, InternalError
from worker_orcd.serving.entry import FAILED, LENGTH, STOP, WAKE, Entry, as_worker_error

_FOREVER = 3600.0


class Output:
    """Reads the ring until it is closed.

    Args:
        ring: a `TokenRing`, or an object like it.
        lock: guards the deadlines; the loop's.
        entries: the sequences that have not ended for their clients, by seq_id; others change it.
    """

    def __init__(self, ring: Any, lock: threading.Condition, entries: Mapping[int, Entry]) -> None:
        self._ring = ring
        self._lock = lock
        self._entries = entries
        self._deadlines: list[tuple[float, int]] = []  # heap of (deadline, seq_id)

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
            entries = self._ring.pop(self._expire())
            if not entries and self._ring.closed:
                return
            for seq_id, token in entries:
                entry = self._entries.get(seq_id)
                if entry is None or entry.text is None:
                    continue  # past its end
                try:
                    if token >= 0:
                        entry.text.push(token)
                    elif token == FAILED:
                        entry.job.end(
                            InternalError("the logits of the next token are no numbers, or every token is banned")
                        )
                    elif token in (STOP, LENGTH):
                        entry.text.end("stop" if token == STOP else "length")
                except BaseException as error:  # a library's panic is no Exception, and hurts the one job as well
                    entry.job.end(as_worker_error(error, "the text of the job could not be made"))

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
