"""LogitsJob: teacher-forced logits on their way to the one thread that waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from worker_orcd.errors import WorkerError
from worker_orcd.serving.waiters import Waiters


class LogitsJob:
    """Teacher-forced logits being computed: float32 [n_tokens, n_vocab] in `logits` once `wait` returns."""

    deadline = None

    def __init__(self, seq_id: int, logits: np.ndarray, on_end: Callable[[LogitsJob], None]) -> None:
        self.job_id = f"logits-{seq_id}"
        self.seq_id = seq_id
        self.logits = logits
        self.error: WorkerError | None = None
        self.admitted_at: float | None = None
        self._ending = self._ended = False
        self._on_end = on_end
        self._waiters = Waiters()
        self._lock = threading.Lock()  # of those who end it; never taken by the main thread

    def take(self, first: int, logits: np.ndarray) -> None:
        """The logits of the tokens from `first` on, float32 [n, n_vocab]."""
        self.logits[first : first + len(logits)] = logits

    def complete(self) -> None:
        """The last logits were taken."""
        self.end(None)

    def wait(self) -> None:
        """Wait for the end."""
        self._waiters.wait_for(lambda: self._ended)

    def end(self, error: WorkerError | None) -> bool:
        """End it, with an error or with the logits complete. The first end wins."""
        with self._lock:
            if self._ending:
                return False
            self._ending = True
        self._on_end(self)
        self.error = error
        self._ended = True
        self._waiters.notify_all()
        return True
