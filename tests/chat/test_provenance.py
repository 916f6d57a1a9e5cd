"""Text with provenance: values are those of str, and no character of a user ever counts as the template's.

Users and templates write with alphabets that share no character, so the origin that is kept can be told from the
character itself.
"""

from __future__ import annotations

import string
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.chat.provenance import (
    TEMPLATE,
    USER,
    Text,
    as_text,
    braces,
    concat,
    made,
    origins_of,
    percent,
    tracked,
    whole,
)

#: letters, white space and line ends of each side; those of users become several characters in upper case
OF_USERS, OF_TEMPLATES = "uvß\u2003\u2028", "ab \n%{}s"
_USERS = {c for o in OF_USERS for c in (o, *o.upper(), *o.title(), *o.casefold())} - {"s"}

texts_of_users = st.text(OF_USERS, max_size=6)


def mixed() -> st.SearchStrategy[str]:
    """Text of both, with origins that are right."""
    piece = st.tuples(st.just(USER), texts_of_users) | st.tuples(st.just(TEMPLATE), st.text("ab \n", max_size=6))
    return st.lists(piece, max_size=4).map(
        lambda pieces: made("".join(t for _, t in pieces), b"".join(o * len(t) for o, t in pieces))
    )


def flat(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [s for v in value for s in flat(v)]


Operation = Callable[[Any, Any, Any, int], Any]

#: what keeps the origin of single characters; `s` is text with the methods, the others are any
EXACT: dict[str, Operation] = {
    "+": lambda s, a, b, n: s + a, "right +": lambda s, a, b, n: str(a) + s, "*": lambda s, a, b, n: s * (n % 4),
    "right *": lambda s, a, b, n: (n % 4) * s, "[n:]": lambda s, a, b, n: s[n:], "[:n]": lambda s, a, b, n: s[:n],
    "[::-1]": lambda s, a, b, n: s[::-1], "[::n]": lambda s, a, b, n: s[:: n or 1],
    "[i]": lambda s, a, b, n: s[n % len(s)] if s else s, "iter": lambda s, a, b, n: list(s),
    "reversed": lambda s, a, b, n: list(reversed(s)), "sorted": lambda s, a, b, n: sorted(s),
    "join": lambda s, a, b, n: s.join([a, b, a]), "join itself": lambda s, a, b, n: s.join(s),
    "split": lambda s, a, b, n: s.split(a or None), "split n": lambda s, a, b, n: s.split(a or None, n),
    "split space": lambda s, a, b, n: s.split(), "rsplit": lambda s, a, b, n: s.rsplit(a or None, n),
    "split space n": lambda s, a, b, n: s.split(None, n), "rsplit space n": lambda s, a, b, n: s.rsplit(None, n),
    "strip": lambda s, a, b, n: s.strip(), "strip a": lambda s, a, b, n: s.strip(a),
    "lstrip": lambda s, a, b, n: s.lstrip(a or None), "rstrip": lambda s, a, b, n: s.rstrip(a or None),
    "lines": lambda s, a, b, n: s.splitlines(), "lines with ends": lambda s, a, b, n: s.splitlines(True),
    "partition": lambda s, a, b, n: s.partition(a or " "), "rpartition": lambda s, a, b, n: s.rpartition(a or " "),
    "prefix": lambda s, a, b, n: s.removeprefix(a), "suffix": lambda s, a, b, n: s.removesuffix(a),
    "own prefix": lambda s, a, b, n: s.removeprefix(s[:n]), "own suffix": lambda s, a, b, n: s.removesuffix(s[n:]),
    "replace": lambda s, a, b, n: s.replace(a or " ", b), "replace n": lambda s, a, b, n: s.replace(a or "u", b, n),
    "lower": lambda s, a, b, n: s.lower(), "str": lambda s, a, b, n: str(s), "format": lambda s, a, b, n: f"{s}",
    "%s": lambda s, a, b, n: percent("%s", s),
    "max": lambda s, a, b, n: max(s, a), "min": lambda s, a, b, n: min(s, a, b),
}  # fmt: skip
#: what may take the template's characters for a user's, but never the other way round
CAUTIOUS: dict[str, Operation] = {
    "upper": lambda s, a, b, n: s.upper(), "title": lambda s, a, b, n: s.title(),
    "capitalize": lambda s, a, b, n: s.capitalize(), "swapcase": lambda s, a, b, n: s.swapcase(),
    "casefold": lambda s, a, b, n: s.casefold(), "center": lambda s, a, b, n: s.center(9, (a or " ")[0]),
    "ljust": lambda s, a, b, n: s.ljust(9, (a or " ")[0]), "rjust": lambda s, a, b, n: s.rjust(9, (a or " ")[0]),
    "zfill": lambda s, a, b, n: s.zfill(9), "expandtabs": lambda s, a, b, n: s.expandtabs(n % 9),
    "translate": lambda s, a, b, n: s.translate({ord("a"): a, ord("u"): None}),
    "replace nothing": lambda s, a, b, n: s.replace("", b), "width": lambda s, a, b, n: f"{s:>9}",
    "format": lambda s, a, b, n: tracked(s + "{}{x}").format(a, x=b), "format_map": lambda s, a, b, n: s.format_map({}),
    "%": lambda s, a, b, n: s % (),
}  # fmt: skip


def check(result: Any, exact: bool) -> None:
    for text in flat(result):
        origins = origins_of(text)
        assert len(origins) == len(text)
        for character, origin in zip(str.__str__(text), origins, strict=True):
            if character in _USERS:
                assert origin == USER[0], (text, origins)
            elif exact:
                assert origin == TEMPLATE[0], (text, origins)


@pytest.mark.parametrize(("exact", "name"), [*((True, n) for n in EXACT), *((False, n) for n in CAUTIOUS)])
def test_values_are_those_of_str_and_users_characters_stay_theirs(exact, name):
    operation = (EXACT if exact else CAUTIOUS)[name]

    @settings(max_examples=30, deadline=None)
    @given(mixed(), mixed(), mixed(), st.integers(-3, 9))
    def holds(s, a, b, n):
        result = operation(tracked(s), a, b, n)
        assert result == operation(str.__str__(s), str.__str__(a), str.__str__(b), n)
        check(result, exact)

    holds()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(EXACT)), mixed(), mixed(), st.integers(-3, 9)), max_size=8), mixed())
def test_so_it_is_after_many_operations(steps, s):
    plain = str.__str__(s)
    for name, a, b, n in steps:
        if len(s) > 10_000:
            break
        s = concat(flat(EXACT[name](tracked(s), a, b, n)))
        plain = "".join(flat(EXACT[name](plain, str.__str__(a), str.__str__(b), n)))
        assert s == plain
    check(s, True)


#: (form, how many values)
FORMS = [("%s", 1), ("a%sb%s", 2), ("%s%%%s", 2), ("%5s|", 1), ("%.1s", 1), ("%r", 1), ("% s", 1), ("%", 0), ("%%", 0)]


@settings(deadline=None)
@given(st.sampled_from(FORMS), mixed(), mixed())
def test_percent(form, a, b):
    values = (a, b)[: form[1]]
    try:
        expected = form[0] % tuple(map(str.__str__, values))
    except ValueError as e:
        with pytest.raises(ValueError, match=str(e)):
            percent(form[0], values)
        return
    result = percent(form[0], values)
    assert result == expected
    check(result, form[0] in ("%s", "a%sb%s", "%s%%%s", "%%"))


def test_percent_with_names_numbers_and_one_value():
    user = Text("u")
    for form, values in [
        ("<%(x)s|%(n)d>", {"x": user, "n": 5}), ("<%s>", user), ("<%s|%d|%5.1f>", (user, 3, 2.5)), ("%s", ("a",)),
        ("%s %s", (None, 7)), ("a", ()), ("a", {}), ("%(x)s%(x)s", {"x": user}),
    ]:  # fmt: skip
        result = percent(form, values)
        assert result == form % values
        check(result, True)
    assert origins_of(percent("%s", [user])) == USER * 5  # the repr of a list says nothing of where it is from
    assert origins_of(percent("%*s", (3, user))) == USER * 3
    assert origins_of(percent(Text("%s"), "ab")) == USER * 2
    with pytest.raises(TypeError, match="not enough"):
        percent("%s %s", user)


@settings(deadline=None)
@given(
    st.sampled_from(["{}", "a{}b{}", "{0}{1}{0}", "{x}-{}", "{{{}}}", "{!r}", "{:>9}", "{:{y}}", "{0[0]}", "{x.n}"]),
    mixed(),
    mixed(),
)
def test_braces(form, a, b):
    class Held:
        n = b

        def __format__(self, spec: str) -> str:
            return format(b, spec)

    given_ = ([a] if "[" in form else a, b), {"x": Held() if "." in form else b, "y": ">9"}
    result = braces(string.Formatter(), form, *given_)
    assert result == form.format(*given_[0], **given_[1])
    check(result, not any(c in form for c in "!:"))


def test_braces_of_users_and_of_objects_are_users():
    assert origins_of(braces(string.Formatter(), Text("{}a"), ("b",), {})) == USER * 2
    assert origins_of(braces(string.Formatter(), "a{}", ([],), {})) == TEMPLATE + USER * 2
    assert origins_of(braces(string.Formatter(), "a{}{}", (5, None), {})) == TEMPLATE * 6


def test_looks_like_a_string_in_every_other_way():
    text = Text("user")
    assert hash(text) == hash("user")
    assert {"user": 1}[text] == 1
    assert text in ["user"]
    assert "se" in text
    assert repr(text) == "'user'"
    assert text.encode() == b"user"
    assert isinstance(text, str)
    with pytest.raises(IndexError):
        text[4]
    with pytest.raises(TypeError):
        text + 1
    with pytest.raises(TypeError):
        text.join([1])


def test_no_method_of_str_that_makes_text_is_forgotten():
    looks = {"encode", "maketrans", "count", "find", "index", "rfind", "rindex", "startswith", "endswith"}
    looks |= {n for n in dir(str) if n.startswith("is")}
    assert {n for n in dir(str) if not n.startswith("_")} - looks <= set(vars(Text))


def test_text_of_values():
    assert as_text("a") == "a"
    assert origins_of(as_text(5)) == TEMPLATE
    assert origins_of(as_text(None)) == TEMPLATE * 4
    assert origins_of(as_text(["a"])) == USER * 5

    class Other(str):
        pass

    assert origins_of(Other("a")) == USER
    assert origins_of(concat(["a", 5, Text("u"), Other("x")])) == b"ttuu"
    assert type(concat(["a", 5])) is str
    assert type(made("a", TEMPLATE)) is str
    assert type(whole("a", "b", 5, None, ("c",))) is str
    assert origins_of(whole("a", ("b", Text("u")))) == USER


@pytest.mark.parametrize(
    ("join", "separator"), [(concat, ""), (Text("", b"").join, ""), (Text("-", TEMPLATE).join, "-")]
)
def test_characters_are_joined_in_little_memory(join, separator):
    """Templates go through long messages by characters, and their process has 64 MiB."""
    text = Text("word <b>|") * 30_000
    parts = [*text, "end"]
    tracemalloc.start()
    try:
        joined = join(parts)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert joined == separator.join([*str.__str__(text), "end"])
    n = len(separator)
    assert origins_of(joined) == (USER + TEMPLATE * n) * len(text) + TEMPLATE * 3
    print(f"{most / len(parts):.1f} bytes a character (limit 40)")
    assert most < 40 * len(parts)
