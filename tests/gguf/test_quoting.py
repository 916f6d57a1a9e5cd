"""Text of a file in a message: escaped, on one line, short."""

import pytest

from worker_orcd.errors import MAX_QUOTED, excerpt, quoted

LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("text", ["", "llama", "it's", "x" * MAX_QUOTED, "\u00e9\u4e16"])
def test_short_plain_text_stays(text: str):
    assert excerpt(text) == text
    assert quoted(text) == f"'{text}'"


@pytest.mark.parametrize("character", [*LINE_ENDS, "\x1b", "\0", "\ud800", "\u202e", "\U000e0001"])
@pytest.mark.parametrize("n", [1, 7, 80, 1000])
def test_no_character_leaves_the_line_or_passes_the_limit(character: str, n: int):
    shown = excerpt(character * n)
    assert shown.isprintable() and len(shown) <= MAX_QUOTED
    whole = character.encode("unicode_escape").decode() if character != "\ud800" else "\\ud800"
    kept = shown.removesuffix("...")
    assert kept == whole * (len(kept) // len(whole)) and kept  # no escape is cut in two


def test_long_text_ends_in_dots():
    assert excerpt("x" * 81) == "x" * 77 + "..."
    assert len(excerpt("y" * (1 << 20))) == MAX_QUOTED
