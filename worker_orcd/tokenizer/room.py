"""Room: how much text is tokenized at once.

The `tokenizers` library takes up to 450 bytes of memory for each character while it works. A machine has that for one
long prompt, and not for as many as a server has threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: characters that are being tokenized at once; a longer text is alone
AT_ONCE = 1 << 18
#: a text up to this long waits for nothing
FREE = 1 << 12


class Room:
    """Room for texts, of any thread's but the main one's: an interrupt there could leave it taken for ever."""

    def __init__(self, n_chars: int = AT_ONCE) -> None:
        self._n_chars = self._left = n_chars
        self._turn = threading.Lock()  # of the one that waits for room, so that a long text gets some in the end
        self._changed = threading.Condition()

    @contextmanager
    def for_text(self, n_chars: int) -> Iterator[None]:
        """Wait until there is room for a text of `n_chars` characters, and take it for the length of the block."""
        if n_chars <= FREE or threading.current_thread() is threading.main_thread():
            yield
            return
        taken = min(n_chars, self._n_chars)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._left >= taken)
            self._left -= taken
        try:
            yield
        finally:
            with self._changed:
                self._left += taken
                self._changed.notify()
