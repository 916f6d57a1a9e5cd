"""Streaming decode: token ids one at a time in, complete characters out.

The pieces of one stream, `flush` included, are exactly the decode of all its tokens at once. Two decoders share that
promise: `_text.TextDecoder`, for tokenizers whose tokens are bytes, and the one here. Which one a tokenizer uses is its
own matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class StreamDecoder(Protocol):
    """What `Tokenizer.stream` returns. Used by one thread at a time."""

    def push(self, token: int) -> str:
        """The characters that this token completes; "" while a character is unfinished.

        Raises:
            InvalidRequest: the id is negative.
        """
        ...

    def flush(self) -> str:
        """What is still held back: U+FFFD for an unfinished character, else "". The stream is then as new."""
        ...


class WindowStreamDecoder:
    """For decoders that are not a table of bytes: re-decodes a window of the last tokens.

    What a token adds is the difference of two decodes that start at the same earlier token, so that whatever the
    decoder does at the start of a text happens in both. A window that ends in an unfinished character waits; after
    `MAX_WINDOW` tokens it is emitted as it is, which keeps the work of a token bounded.

    Args:
        decode: ids -> text.
    """

    #: an unfinished character is at most three tokens of a byte each; the rest is room for decoders that join words
    MAX_WINDOW = 16

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []  # tokens already emitted that the next ones may join with
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """See `StreamDecoder.push`."""
        self._held.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self._held) < self.MAX_WINDOW:
            return ""
        if text:
            self._shown, self._held = self._held, []
        elif len(self._held) >= self.MAX_WINDOW:
            del self._held[: -self.MAX_WINDOW // 2]
        return text

    def flush(self) -> str:
        """See `StreamDecoder.flush`."""
        text = self._new_text() if self._held else ""
        self._shown, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._shown) if self._shown else ""
        return self._decode(self._shown + self._held)[len(before) :]
