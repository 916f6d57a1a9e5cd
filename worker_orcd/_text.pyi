"""Types of pyx/worker_orcd/_text.pyx: token ids to text by a table of bytes."""

from collections.abc import Iterable

from typing_extensions import Buffer

class TokenTable:
    """What each token of a vocabulary stands for in bytes."""

    def __init__(self, blob: bytes, offsets: Buffer, control: Iterable[int], strip_space: bool) -> None: ...
    @property
    def n_vocab(self) -> int:
        """Ids are below this."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; empty for an id from `n_vocab` on."""

class TextDecoder:
    """A stream decoder: constant work a token, at most three bytes held back."""

    def __init__(self, table: TokenTable, skip_control: bool, continues: bool) -> None: ...
    def push(self, token: int) -> str:
        """The characters that this token completes; "" while a character is unfinished."""

    def flush(self) -> str:
        """What is still held back: U+FFFD for an unfinished character, else ""."""
