"""What each token id stands for in bytes: one blob and offsets, made once, shared by decoding and streaming.

A vocabulary of 150,000 tokens as Python objects is 10 MB of small objects; as one blob it is 1.5 MB. Text comes out of
bytes by one rule everywhere: UTF-8, and each maximal part of an ill-formed sequence becomes one U+FFFD (what
`bytes.decode("utf-8", "replace")` does), so decoding at once and decoding piece by piece agree.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate

from worker_orcd._text import TokenTable

#: U+2581, which SentencePiece vocabularies write for a space
SPM_SPACE = "\u2581"
#: tokens that are looked up in one go; other threads get the Python lock in between
_PART = 1 << 12


def byte_alphabet() -> dict[int, int]:
    """The characters that byte-level vocabularies (GPT-2) write for the 256 bytes: code point -> byte.

    Printable Latin-1 characters stand for themselves; the 68 others take the code points from 256 on, in byte order.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in shown]
    return {b: b for b in shown} | {256 + i: b for i, b in enumerate(hidden)}


class Vocab:
    """Bytes of every token. `table` holds them for decoders.

    Args:
        blob: the bytes of all tokens, one after the other.
        lengths: bytes of each token, [n_vocab].
        control: ids that `skip_special` leaves out.
        strip_space: whether a leading space of a whole text is the tokenizer's own and not the writer's.
    """

    def __init__(self, blob: bytes, lengths: Iterable[int], control: Collection[int], strip_space: bool) -> None:
        offsets = array("I", [0, *accumulate(lengths)])
        if offsets[-1] != len(blob):
            raise ValueError(f"token lengths sum to {offsets[-1]}, the blob has {len(blob)} bytes")
        self.n_vocab = len(offsets) - 1
        self.control = frozenset(control)
        self.strip_space = strip_space
        self.table = TokenTable(blob, offsets, self.control, strip_space)

    def token_bytes(self, token: int) -> bytes:
        """See `TokenTable.token_bytes`."""
        return self.table.token_bytes(token)

    def decode(self, ids: Iterable[int], skip_special: bool, continues: bool) -> str:
        """Text of a whole sequence; see `Tokenizer.decode`."""
        taken = [i for i in ids if not (skip_special and i in self.control)]
        parts = [taken[first : first + _PART] for first in range(0, len(taken), _PART)]
        data = b"".join([b"".join(map(self.table.token_bytes, part)) for part in parts])
        if self.strip_space and not continues and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")


def byte_level_bytes(tokens: Sequence[str], literal: Collection[int]) -> tuple[bytes, list[int]]:
    """Blob and lengths (for `Vocab`) of a byte-level vocabulary.

    Args:
        tokens: texts by id, in the alphabet of `byte_alphabet`.
        literal: ids of control and user-defined tokens, whose text is not in that alphabet but itself.
    """
    alphabet = byte_alphabet()
    plain = list(tokens)
    for i in literal:
        plain[i] = ""
    joined = "".join(plain)
    # The usual case, one pass over all tokens: a character is a byte, so lengths carry over. Not so where a token was
    # written outside the alphabet; such a one stands for its own text.
    odd = {i: tokens[i].encode() for i in literal}
    if not set(map(ord, set(joined))) <= alphabet.keys():
        odd |= {i: t.encode() for i, t in enumerate(plain) if not set(map(ord, t)) <= alphabet.keys()}
        for i in odd:
            plain[i] = ""
        joined = "".join(plain)
    blob = joined.translate(alphabet).encode("latin-1")
    lengths = list(map(len, plain))
    if odd:
        blob, lengths = _insert(blob, lengths, odd)
    return blob, lengths


def _insert(blob: bytes, lengths: list[int], odd: dict[int, bytes]) -> tuple[bytes, list[int]]:
    """Put the bytes of the tokens in `odd` (empty in `blob` so far) into their places."""
    offsets = [0, *accumulate(lengths)]
    parts, at = [], 0
    for i in sorted(odd):
        parts += [blob[at : offsets[i]], odd[i]]
        at = offsets[i]
        lengths[i] = len(odd[i])
    return b"".join([*parts, blob[at:]]), lengths


def spm_bytes(tokens: Sequence[str], literal: Collection[int], byte_tokens: Collection[int]) -> tuple[bytes, list[int]]:
    """Blob and lengths (for `Vocab`) of a SentencePiece vocabulary.

    Args:
        tokens: texts by id, U+2581 for a space.
        literal: ids of control and user-defined tokens, whose text is itself.
        byte_tokens: ids of the tokens ``<0x00>`` .. ``<0xFF>``, each one byte.
    """
    pieces = [t.replace(SPM_SPACE, " ").encode() for t in tokens]
    for i in literal:
        pieces[i] = tokens[i].encode()
    for i in byte_tokens:
        pieces[i] = bytes((int(tokens[i][3:5], 16),))
    return b"".join(pieces), list(map(len, pieces))
