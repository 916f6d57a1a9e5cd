"""Types of pyx/worker_orcd/_ring.pyx: the ring of sampled tokens, and what interrupts a decode loop."""

from collections.abc import Iterable
from typing import Self

#: entries of a ring made without a size
DEFAULT_CAPACITY: int

class TokenRing:
    """A bounded thread-safe queue of (seq_id, token)."""

    def __new__(cls, capacity: int = 65536) -> Self: ...
    def put(self, seq_id: int, token: int) -> None:
        """Append one entry, waiting while the ring is full."""

    def put_many(self, seq_ids: Iterable[int], tokens: Iterable[int]) -> None:
        """Append one entry for each of two sequences of one length, as `put` does."""

    def pop(self, timeout: float) -> list[tuple[int, int]]:
        """All entries there are (at most 4096), waiting up to `timeout` seconds for the first."""

    def close(self) -> None:
        """Wake every waiter; later puts fail, pops drain what is left. Idempotent."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""

    @property
    def capacity(self) -> int:
        """Entries the ring holds."""

    def __len__(self) -> int: ...

class Control:
    """What other threads tell an engine's call, and how far it is: steps that have ended are counted."""

    def interrupt(self) -> None:
        """Make a running decode loop return at its next step boundary; callable from any thread."""

    def abort(self) -> None:
        """Interrupt, and let the step under way be given up: nobody wants its results. From any thread."""

    def clear(self) -> None:
        """Take both back: the owner of the loop does it before it calls the engine again."""

    def step_done(self) -> None:
        """Count a step."""

    @property
    def interrupted(self) -> bool:
        """Whether a decode loop shall return."""

    @property
    def aborted(self) -> bool:
        """Whether the step under way shall be given up."""

    @property
    def n_steps(self) -> int:
        """Steps that have ended so far."""
