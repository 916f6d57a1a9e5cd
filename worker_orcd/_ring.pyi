"""Types of pyx/worker_orcd/_ring.pyx: the ring of sampled tokens, and the flag that interrupts a decode loop."""

from typing import Self

#: entries of a ring made without a size
DEFAULT_CAPACITY: int

class TokenRing:
    """A bounded thread-safe queue of (seq_id, token)."""

    def __new__(cls, capacity: int = 65536) -> Self: ...
    def put(self, seq_id: int, token: int) -> None:
        """Append one entry, waiting while the ring is full."""

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
    """A flag that makes a running decode loop return at its next step boundary."""

    def interrupt(self) -> None:
        """Set the flag; callable from any thread."""

    def clear(self) -> None:
        """Clear the flag: the owner of the loop does it before it decodes again."""

    @property
    def interrupted(self) -> bool:
        """Whether the flag is set."""
