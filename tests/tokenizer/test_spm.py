"""SentencePiece merging against its definition, written out plainly."""

import random
from array import array
from itertools import accumulate, pairwise

import pytest

from worker_orcd._spm import SpmMerger
from worker_orcd.tokenizer.special_tokens import SpecialToken, SpecialTokens


def merger(tokens, scores, byte_ids=(), unk_id=-1):
    pieces = [t.encode() for t in tokens]
    offsets = array("I", [0, *accumulate(map(len, pieces))])
    return SpmMerger(b"".join(pieces), offsets, array("f", scores), array("i", byte_ids), unk_id)


def plain_merge(tokens, scores, text, byte_ids, unk_id):
    """Join the best-scored neighbours, leftmost of equals, until no two are a token together."""
    vocab = {t: i for i, t in reversed(list(enumerate(tokens))) if t}
    pieces = list(text)
    while True:
        pairs = map("".join, pairwise(pieces))
        joins = [(-scores[vocab[pair]], i) for i, pair in enumerate(pairs) if pair in vocab]
        if not joins:
            break
        i = min(joins)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for p in pieces:
        ids += [vocab[p]] if p in vocab else [byte_ids[b] for b in p.encode()] if byte_ids else [unk_id]
    return ids


@pytest.mark.parametrize("ties", [False, True], ids=["distinct-scores", "equal-scores"])
@pytest.mark.parametrize("with_bytes", [False, True], ids=["unknown", "bytes"])
def test_merging_is_its_definition(ties, with_bytes):
    rng = random.Random(5)
    byte_ids = list(range(1000, 1256)) if with_bytes else []
    for _ in range(300):
        words = {"".join(rng.choices("abé日\U0001f600", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 40))}
        tokens = sorted(words)
        scores = [float(rng.randint(-3, 0)) if ties else -float(i) for i in rng.sample(range(len(tokens)), len(tokens))]
        made = merger(tokens, scores, byte_ids, 999)
        for _ in range(10):
            text = "".join(rng.choices("abé日\U0001f600", k=rng.randint(0, 30)))
            assert made.encode(text.encode()) == plain_merge(tokens, scores, text, byte_ids, 999), (tokens, text)


def test_equal_scores_go_left_first():
    assert merger(["a", "aa", "aaa"], [0, 0, 0]).encode(b"aaaa") == [2, 0]
    assert merger(["a", "ab", "ba"], [0, 0, 0], unk_id=9).encode(b"bab") == [2, 9]


def test_hidden_and_repeated_tokens():
    assert merger(["a", "", "aa"], [0, 5, 1]).encode(b"aaa") == [2, 0]
    assert merger(["aa", "aa", "a"], [0, 0, 0]).encode(b"aa") == [0], "of equal texts the first id"
    assert merger([], [], unk_id=3).encode("é".encode()) == [3]
    assert merger(["a"], [0]).encode(b"") == []


@pytest.mark.parametrize(
    ("offsets", "scores", "byte_ids"),
    [([0, 1], [0, 0], []), ([1, 2], [0], []), ([0, 3], [0], []), ([0, 2, 1, 2], [0, 0, 0], []), ([0, 2], [0], [1])],
    ids=["short", "start", "long", "decreasing", "bytes"],
)
def test_lengths_that_do_not_fit_are_refused(offsets, scores, byte_ids):
    with pytest.raises(ValueError, match=r"offsets|byte_ids"):
        SpmMerger(b"ab", array("I", offsets), array("f", scores), array("i", byte_ids), 0)


def test_cutting_at_special_tokens():
    cut = SpecialTokens([
        SpecialToken(1, "<a>", control=True), SpecialToken(2, "<b>", control=False),
        SpecialToken(3, "<l>", control=False, strip_left=True), SpecialToken(4, "<r>", control=False, strip_right=True),
    ]).cut  # fmt: skip
    assert cut("", True) == []
    assert cut("x<a>y<b>", False) == ["x<a>y", 2]
    assert cut("x<a>y<b>", True) == ["x", 1, "y", 2]
    assert cut("<b><b> <b>", False) == [2, 2, " ", 2]
    assert cut("x \n<l> y", False) == ["x", 3, " y"]
    assert cut("x <r>\t y<r>  ", False) == ["x ", 4, "y", 4]
    assert cut("\u00a0<l>", False) == ["\u00a0", 3], "only ASCII white space"
