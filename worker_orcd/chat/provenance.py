"""Text that knows which of its characters a user wrote: what a template works on.

A template may search, cut and put together what users wrote, and its logic must see the true text; afterwards it must
be known which characters of the prompt came from users, since those never become control tokens. `Text` is a `str` with
the origin of every character beside it. Characters of operations that keep characters keep their origin: `+`, `~`, `%`,
`format`, `join`, slices, `split`, `strip`, `replace`, change of case. All others (`center`, `translate`, ...) give
text that is wholly the user's where anything that went in was. A plain `str` is the template's own.

Values are always those of `str`: where the origin of a result is worked out piece by piece, the pieces must add up to
what `str` gives, or the whole of it counts as the user's.
"""

# ruff: noqa: D102 - the methods are those of str

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, SupportsIndex

#: origins, one byte a character
TEMPLATE, USER = b"t", b"u"
_ONE = {TEMPLATE[0]: TEMPLATE, USER[0]: USER}
_CONVERSION = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?(?P<how>[#0\- +]*\d*(?:\.\d*)?)(?P<kind>[diouxXeEfFgGcrsa%])", re.ASCII
)


class Text(str):
    """A string of which at least one character may be a user's.

    Args:
        text: any text.
        origins: TEMPLATE or USER for every character; None: all are the user's.
    """

    __slots__ = ("_origins",)
    _origins: bytes

    def __new__(cls, text: str = "", origins: bytes | None = None) -> Text:
        self = super().__new__(cls, text)
        self._origins = USER * len(self) if origins is None else origins
        return self

    # methods of str that only look are inherited; __hash__ and __eq__ too, so that it is found in dicts

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        return whole(str.__format__(self, spec), self, spec) if spec else self

    def __getitem__(self, key: SupportsIndex | slice[Any, Any, Any]) -> str:
        if isinstance(key, slice):
            return made(str.__getitem__(self, key), self._origins[key])
        return made(str.__getitem__(self, key), _ONE[self._origins[key]])

    def __iter__(self) -> Iterator[str]:
        if TEMPLATE not in self._origins:
            return map(_USERS.__getitem__, str.__iter__(self))
        return (
            _USERS[character] if origin == USER[0] else character
            for character, origin in zip(str.__iter__(self), self._origins, strict=True)
        )

    def __add__(self, other: str) -> str:
        return made(str.__add__(self, other), self._origins + origins_of(other))

    def __radd__(self, other: str) -> str:
        return made(str.__add__(other, self), origins_of(other) + self._origins)

    def __mul__(self, n: SupportsIndex) -> str:
        return made(str.__mul__(self, n), self._origins * n)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return percent(self, values)

    def __rmod__(self, form: str) -> str:
        return percent(form, self)

    def join(self, items: Iterable[str], /) -> str:
        items = list(items)
        text = str.join(self, items)
        return made(text, _joined(map(origins_of, items), self._origins))

    def lstrip(self, chars: str | None = None, /) -> str:
        text = str.lstrip(self, chars)
        return made(text, self._origins[len(self) - len(text) :])

    def rstrip(self, chars: str | None = None, /) -> str:
        text = str.rstrip(self, chars)
        return made(text, self._origins[: len(text)])

    def strip(self, chars: str | None = None, /) -> str:
        text, n_left = str.strip(self, chars), len(self) - len(str.lstrip(self, chars))
        return made(text, self._origins[n_left : n_left + len(text)])

    def removeprefix(self, prefix: str, /) -> str:
        text = str.removeprefix(self, prefix)
        return made(text, self._origins[len(self) - len(text) :])

    def removesuffix(self, suffix: str, /) -> str:
        text = str.removesuffix(self, suffix)
        return made(text, self._origins[: len(text)])

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(str.rsplit(self, sep, maxsplit), sep)

    def _found(self, pieces: list[str], sep: str | None) -> list[str]:
        out, at = [], 0
        for piece in pieces:
            if sep is None:  # between pieces is white space alone, and a piece does not begin with any
                at = str.index(self, piece, at)
            out.append(made(piece, self._origins[at : at + len(piece)]))
            at += len(piece) + (len(sep) if sep is not None else 0)
        return out

    def splitlines(self, keepends: bool = False) -> list[str]:
        out, at = [], 0
        for line, with_end in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            out.append(made(line, self._origins[at : at + len(line)]))
            at += len(with_end)
        return out

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.rpartition(self, sep))

    def _three(self, pieces: tuple[str, str, str]) -> tuple[str, str, str]:
        a, b = len(pieces[0]), len(pieces[0]) + len(pieces[1])
        before, between, after = (self._origins[:a], self._origins[a:b], self._origins[b:])
        return made(pieces[0], before), made(pieces[1], between), made(pieces[2], after)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:  # `new` goes between all characters, which no template needs
            return whole(str.replace(self, old, new, count), self, new)
        return tracked(new).join(self.split(old, count))

    def lower(self) -> str:
        return self._cased(str.lower)

    def upper(self) -> str:
        return self._cased(str.upper)

    def title(self) -> str:
        return self._cased(str.title)

    def capitalize(self) -> str:
        return self._cased(str.capitalize)

    def swapcase(self) -> str:
        return self._cased(str.swapcase)

    def casefold(self) -> str:
        return self._cased(str.casefold)

    def _cased(self, change: Callable[[str], str]) -> str:
        text = change(self)
        # a character may become several, never fewer: of the same length, each became one
        return made(text, self._origins) if len(text) == len(self) else whole(text, self)

    def center(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return whole(str.center(self, width, fill), self, fill)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return whole(str.ljust(self, width, fill), self, fill)

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return whole(str.rjust(self, width, fill), self, fill)

    def zfill(self, width: SupportsIndex, /) -> str:
        return whole(str.zfill(self, width), self)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        return whole(str.expandtabs(self, tabsize), self)

    def translate(self, table: Any, /) -> str:
        return whole(str.translate(self, table), self, table)

    def format(self, *values: Any, **named: Any) -> str:
        return braces(Formatter(), self, values, named)

    def format_map(self, named: Any, /) -> str:
        return braces(Formatter(), self, (), named)


class _Characters(dict[str, Text]):
    """Characters of users, made once: templates go through whole messages by them."""

    def __missing__(self, character: str) -> Text:
        made = Text(character)
        if len(self) < 4096:
            self[character] = made
        return made


_USERS = _Characters()


def made(text: str, origins: bytes) -> str:
    """Text of known origins: a plain string where none of it is a user's.

    Args:
        text: any string; its own origins do not matter.
        origins: of its characters.
    """
    return Text(text, origins) if USER in origins else str.__str__(text)


def tracked(text: str) -> Text:
    """A string with the methods of `Text`, which take heed of the origins of their arguments."""
    return text if type(text) is Text else Text(text, origins_of(text))


def origins_of(text: str) -> bytes:
    """Origins of all characters. Of strings of unknown classes they are the user's."""
    if type(text) is Text:
        return text._origins
    return (TEMPLATE if type(text) is str else USER) * len(text)


def as_text(value: object) -> str:
    """What `str` makes of a value. Of numbers and None it is the template's, of containers the user's."""
    if type(value) is str or type(value) is Text:
        return value
    return whole(str(value), value)


def whole(text: str, *sources: object) -> str:
    """Text that was made of `sources` in a way that tells nothing of single characters."""
    return str.__str__(text) if all(map(_is_template, sources)) else Text(text)


def _is_template(source: object) -> bool:
    if source is None or isinstance(source, int | float) or type(source) is str:
        return True
    if isinstance(source, tuple):
        return all(map(_is_template, source))
    return type(source) is Text and USER not in source._origins


def concat(parts: Iterable[object]) -> str:
    """The texts of `parts`, joined."""
    texts = [as_text(p) for p in parts]
    text = "".join(texts)
    return made(text, _joined(map(origins_of, texts))) if Text in map(type, texts) else text


def _joined(origins: Iterable[bytes], between: bytes = b"") -> bytes:
    """`between.join(origins)`, a part at a time: `join` takes 80 bytes an item, and an item may be a character."""
    pieces, remaining = [], iter(origins)
    while part := list(itertools.islice(remaining, 4096)):
        pieces.append(between.join(part))
    return between.join(pieces)


def percent(form: str, values: Any) -> str:
    """`form % values`."""
    plain = str.__str__(form)
    text: str = str.__mod__(plain, values)
    if USER in origins_of(form):
        return Text(text)
    pieces: list[str] = []
    remaining = iter(values if isinstance(values, tuple) else (values,))
    at = 0
    for found in _CONVERSION.finditer(plain):
        pieces.append(plain[at : found.start()])
        at = found.end()
        if found["kind"] == "%":
            pieces.append("%")
        else:
            value = next(remaining, "") if found["key"] is None else values[found["key"]]
            as_it_is = found["kind"] == "s" and not found["how"]
            pieces.append(as_text(value) if as_it_is else whole(f"%{found['how']}{found['kind']}" % (value,), value))
    return _adding_up([*pieces, plain[at:]], text)


def braces(formatter: Formatter, form: str, values: Sequence[Any], named: Mapping[str, Any]) -> str:
    """`form.format(*values, **named)`.

    Args:
        formatter: finds the fields; what it must not reach is its own affair.
    """
    plain = str.__str__(form)
    text = str.__str__(formatter.vformat(plain, values, named))
    if USER in origins_of(form):
        return Text(text)
    pieces: list[str] = []
    n_automatic = 0
    for literal, field, spec, conversion in formatter.parse(plain):
        pieces.append(literal)
        if field is None:
            continue
        if not field or field[0] in ".[":
            field, n_automatic = f"{n_automatic}{field}", n_automatic + 1
        if "{" in (spec or ""):  # the spec is made of fields, too
            return Text(text)
        value, _ = formatter.get_field(field, values, named)
        if spec or conversion:
            pieces.append(whole(format(formatter.convert_field(value, conversion), spec or ""), value))
        else:
            pieces.append(value if isinstance(value, str) else whole(format(value), value))
    return _adding_up(pieces, text)


def _adding_up(pieces: list[str], text: str) -> str:
    joined = concat(pieces)
    return joined if joined == text else Text(text)
