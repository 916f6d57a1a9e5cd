"""Stop strings: found wherever pieces are cut, nothing of them shown, nothing else lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.serving.stop_strings import StopMatcher


def feed(stops, pieces):
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        text, found = matcher.push(piece)
        shown += text
        if found:
            return shown, True
    return shown + matcher.flush(), False


def by_definition(stops, text):
    """The stop string complete first wins; of two complete at one character, the longer."""
    ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    if not ends:
        return text, False
    end, length = min(ends)
    return text[: end + length], True


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        ((), ["ab", "c"], "abc", False),
        (("END",), ["xE", "N", "D y"], "x", True),
        (("END",), ["xE", "NE", "ND"], "xENEND"[:3], True),
        (("END",), ["EEN"], "EEN", False),
        (("b", "abc"), ["abc"], "a", True),
        (("bc", "abc"), ["abc"], "", True),
        (("\n\n",), ["a\n", "b\n", "\nc"], "a\nb", True),
        (("aab",), ["aa", "ab"], "a", True),
        (("日本",), ["日", "本語"], "", True),
    ],
)
def test_cases(stops, pieces, shown, found):
    assert feed(stops, pieces) == (shown, found)


def test_only_a_possible_beginning_is_held_back():
    matcher = StopMatcher(("stop!",))
    assert matcher.push("a s") == ("a ", False)
    assert matcher.push("t") == ("", False)
    assert matcher.push("ep") == ("step", False)
    assert matcher.push(" sto") == (" ", False)
    assert matcher.flush() == "sto"


AB = st.text("ab", max_size=40)


@settings(max_examples=300)
@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), AB, st.lists(st.integers(1, 6), max_size=40))
def test_the_cut_does_not_matter(stops, text, cuts):
    pieces, at = [], 0
    for n in cuts:
        pieces.append(text[at : at + n])
        at += n
    pieces.append(text[at:])
    assert feed(stops, pieces) == by_definition(stops, text)
