"""Decoding by a table of bytes: as Python's own incremental decoder does it, whatever the bytes and the cuts."""

from __future__ import annotations

import codecs
import random
from array import array
from itertools import accumulate

import pytest

from worker_orcd._text import TextDecoder, TokenTable
from worker_orcd.errors import InvalidRequest


def table_of(tokens, control=(), strip_space=False):
    return TokenTable(b"".join(tokens), array("I", [0, *accumulate(map(len, tokens))]), control, strip_space)


class ByPython:
    """The same by `codecs`."""

    def __init__(self, tokens, control, strip_space, skip_control, continues):
        self.tokens, self.skip = tokens, control if skip_control else ()
        self.strips = self.strip_next = strip_space and not continues
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        data = self.tokens[token] if token < len(self.tokens) and token not in self.skip else b""
        if self.strip_next and data:
            self.strip_next, data = False, data.removeprefix(b" ")
        return self.utf8.decode(data)

    def flush(self):
        text = self.utf8.decode(b"", True)
        self.utf8.reset()
        self.strip_next = self.strips
        return text


#: bytes at which ranges of well-formed UTF-8 begin and end
EDGES = bytes((0x00, 0x20, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC,
               0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF))  # fmt: skip


def test_every_three_bytes_of_the_edges_one_by_one_and_together():
    single = table_of([bytes((b,)) for b in range(256)])
    every = [bytes((a, b, c)) for a in EDGES for b in EDGES for c in EDGES]
    together = table_of(every)
    for n, data in enumerate(every):
        want = data.decode("utf-8", "replace")
        stream = TextDecoder(single, False, False)
        assert "".join(map(stream.push, data)) + stream.flush() == want, data
        stream = TextDecoder(together, False, False)
        assert stream.push(n) + stream.flush() == want, data


@pytest.mark.parametrize("seed", range(4))
def test_piece_by_piece_as_pythons_decoder(seed):
    draw = random.Random(seed)
    texts = ["a", " ", "  b", "é", "漢字", "\U0001f600", " \u2028", "\u0301", ""]
    for _ in range(300):
        tokens = [t.encode() for t in texts] + [bytes(draw.choices(EDGES, k=draw.randrange(5))) for _ in range(20)]
        whole = "\U0001f600é漢".encode()
        tokens += [whole[i:j] for i in range(len(whole)) for j in range(i + 1, i + 3)]
        control = set(draw.sample(range(len(tokens)), 5))
        strip, skip, continues = (draw.random() < 0.5 for _ in range(3))
        ours = TextDecoder(table_of(tokens, control, strip), skip, continues)
        theirs = ByPython(tokens, control, strip, skip, continues)
        for _ in range(3):
            ids = draw.choices(range(len(tokens) + 3), k=draw.randrange(40))
            assert [ours.push(i) for i in ids] == [theirs.push(i) for i in ids], (tokens, ids)
            assert ours.flush() == theirs.flush()


def test_a_table_gives_its_bytes_back():
    tokens = [b"", b"ab", b"\xff\x00", b"c"]
    table = table_of(tokens, (1,))
    assert table.n_vocab == 4 and [table.token_bytes(i) for i in range(6)] == [*tokens, b"", b""]
    assert table.token_bytes(1 << 70) == b"" and TextDecoder(table, False, False).push(1 << 70) == ""
    for call in (table.token_bytes, TextDecoder(table, False, False).push):
        with pytest.raises(InvalidRequest, match="negative"):
            call(-1)


@pytest.mark.parametrize(
    ("offsets", "control"), [([0, 1], ()), ([1, 3], ()), ([0, 2, 1, 3], ()), ([], ()), ([0, 3], (1,)), ([0, 3], (-1,))]
)
def test_a_table_that_does_not_fit_its_bytes_is_refused(offsets, control):
    with pytest.raises(ValueError, match=r"offsets|control"):
        TokenTable(b"abc", array("I", offsets), control, False)
