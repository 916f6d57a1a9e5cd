"""Places: how many answers may be under way at once, and which of them are."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager

from worker_orcd.errors import QueueFull

#: seconds for sending the last event of a stream that a server pulls; afterwards its client is known not to read
LAST_EVENT_SEC = 0.5


class Places:
    """All methods may be called from any thread.

    Attributes:
        limit: places that there are; fewer than there may be jobs where the system can bear no more.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: dict[object, float | None] = {}  # each with the time at which its last event was sent
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Places that are taken."""
        return len(self._taken)

    def take(self) -> object:
        """The place of one answer, until `leave`. A client that does not read keeps it past its job's end.

        Raises:
            QueueFull: none is free.
        """
        place = object()
        with self._changed:
            late = time.monotonic() - LAST_EVENT_SEC
            n_open = sum(1 for ended_at in self._taken.values() if ended_at is None or ended_at < late)
            if n_open >= self.limit:
                raise QueueFull(f"{n_open} streams are open, as many as may be; try again later", retry_after=1)
            self._taken[place] = None
        return place

    def locked(self) -> AbstractContextManager[object]:
        """Nobody else takes or leaves a place meanwhile. Sending the last bytes without waiting and, once all are sent,
        `leave` together look like one step: a client that asks again as soon as it has its end finds its place free,
        and one that does not read keeps it."""
        return self._changed

    def ends(self, place: object) -> None:
        """The last event is given to a server that pulls. Its client may ask again before we know that it was sent."""
        with self._changed:
            self._taken[place] = time.monotonic()

    def leave(self, place: object) -> None:
        """The answer has ended, however it did. Idempotent."""
        with self._changed:
            self._taken.pop(place, None)
            if not self._taken:
                self._changed.notify_all()

    def wait_until_all_left(self, seconds: float) -> None:
        """Wait until no place is taken, but not longer than `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken, seconds)
