"""Messages in the form that a template wants: content as one string or as a list of parts, and no content at all.

Templates differ: some read `message.content` as a string, some go through its parts, and many do the one for some roles
and the other for others. What a template wants shows when it runs. So messages are given as the user gave them, and
the classes here notice what cannot be meant: a list of parts that is printed or searched like a string, a character
that is asked for its `type`, a null that becomes text. Then the template runs again, with the content of that role in
the other form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, overload

from jinja2 import TemplateError

from worker_orcd.chat.provenance import Text

#: what parts are joined by for a template that wants a string
SEPARATOR = "\n"
#: runs of a template over one conversation, after which every content is a string
MAX_RUNS = 6

T = TypeVar("T")


class WantsString(Exception):
    """A template uses the content of a role's messages like a string.

    Args:
        role: of the message.
        null: the content is null, and no list of parts.
    """

    def __init__(self, role: str, null: bool) -> None:
        super().__init__(f"the content of {role} as text")
        self.role = role
        self.null = null


class WantsParts(Exception):
    """A template asks a character of a string for its `type`, as if it were a part of a list."""


class _NoString:
    """A value that a template must not make text of."""

    __slots__ = ("_role",)

    def __init__(self, role: str) -> None:
        self._role = role

    def _refuse(self, *_: object) -> NoReturn:
        raise WantsString(self._role, isinstance(self, Null))

    __str__ = __repr__ = __format__ = __add__ = __radd__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if hasattr(str, name) and not name.startswith("_"):
            self._refuse()
        raise AttributeError(name)


class Null(_NoString):
    """Content that is null; all that a string could do asks for one, so that no template fails of it."""

    __slots__ = ()

    __len__ = __getitem__ = __contains__ = __lt__ = __gt__ = __mod__ = __mul__ = _NoString._refuse

    def __iter__(self) -> Iterator[str]:
        yield from self._refuse()  # not before the first step, as of `Parts`

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Null)

    __hash__ = None  # type: ignore[assignment]


class Part(_NoString, Mapping[str, Any]):
    """One part of a content.

    Args:
        values: its keys.
        role: of the message.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any], role: str) -> None:
        super().__init__(role)
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name in self._values:  # for jinja2, which then looks among the keys
            raise AttributeError(name)
        return super().__getattr__(name)


class Parts(_NoString, Sequence[Any]):
    """A content that is a list of parts; knows whether one was ever looked at.

    Args:
        parts: the parts.
        role: of the message.
        seen: called when one is looked at.
    """

    __slots__ = ("_parts", "_seen")

    def __init__(self, parts: Sequence[Part], role: str, seen: Callable[[], object]) -> None:
        super().__init__(role)
        self._parts = parts
        self._seen = seen

    @overload
    def __getitem__(self, key: int) -> Part: ...
    @overload
    def __getitem__(self, key: slice) -> Parts: ...
    def __getitem__(self, key: int | slice) -> Part | Parts:
        if isinstance(key, slice):
            return Parts(self._parts[key], self._role, self._seen)
        self._seen()
        return self._parts[key]

    def __iter__(self) -> Iterator[Part]:
        for part in self._parts:  # not before the first step: jinja2's `is iterable` calls iter()
            self._seen()
            yield part

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, value: object) -> bool:
        if isinstance(value, str):
            self._refuse()
        return value in self._parts


class Conversation:
    """Messages, and the form that a template was found to want them in.

    Args:
        messages: JSON values; `content`, where there is one, is a string, a list of text parts or None.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._messages = messages
        #: roles whose parts are given as a string
        self._joined: set[str] = set()
        self._all_joined = not any(isinstance(m.get("content"), list) for m in messages)
        #: roles whose null content is given as an empty string
        self._emptied: set[str] = set()
        self._all_emptied = not any(m.get("content") is None for m in messages)
        #: whether strings are given as lists of one part, but for the roles of `_joined`
        self._split = False
        self._unseen: dict[int, str] = {}

    def run(self, work: Callable[[list[dict[str, Any]], bool], T]) -> T:
        """What `work` makes of the messages in the form that it wants.

        Args:
            work: (messages, whether to raise `WantsParts`) -> anything. All strings of the messages but roles are the
                user's `Text`.
        """
        for _ in range(MAX_RUNS - 1):
            self._unseen = {}
            try:
                result = work([self._given(m) for m in self._messages], not self._split)
            except WantsString as e:
                (self._emptied if e.null else self._joined).add(e.role)
            except WantsParts:
                self._split = True
            except Exception as e:
                if not self._all_joined or self._split:
                    self._all_joined, self._split = True, False
                elif not self._all_emptied and isinstance(e, TemplateError):  # it refuses, or misses, a string
                    self._all_emptied = True
                else:
                    raise
            else:
                if not self._unseen:
                    return result
                self._joined.update(self._unseen.values())  # a template that passes over lists may take strings
        self._all_joined, self._all_emptied, self._split = True, True, False
        return work([self._given(m) for m in self._messages], False)

    def _given(self, message: Mapping[str, Any]) -> dict[str, Any]:
        role = message["role"]
        out = {users(k): role if k == "role" else users(v) for k, v in message.items()}
        content = message.get("content")
        joined = self._all_joined or role in self._joined
        if content is None:
            out["content"] = "" if self._all_emptied or role in self._emptied else Null(role)
        elif isinstance(content, list):
            out["content"] = users(SEPARATOR.join(p["text"] for p in content)) if joined else self._parts(content, role)
        elif self._split and role not in self._joined:
            out["content"] = self._parts([{"type": "text", "text": content}], role)
        return out

    def _parts(self, content: list[Any], role: str) -> Parts:
        parts = Parts([Part(users(p), role) for p in content], role, lambda: self._unseen.pop(id(parts), None))
        if content:
            self._unseen[id(parts)] = role
        return parts


def as_json(value: object, **options: Any) -> str:
    """JSON of what a template has.

    Args:
        options: as of `json.dumps`.

    Raises:
        WantsString: it is a content that is null, or holds one that is a list of parts.
    """
    if isinstance(value, Null):
        str(value)
    return json.dumps(value, **{"ensure_ascii": False, **options}, default=_no_json)


def _no_json(value: object) -> None:
    if not isinstance(value, Null):
        raise TypeError(f"{value} is no JSON value")  # content that is parts says here that it is wanted as a string


def users(value: Any) -> Any:
    """A JSON value with all of its strings as the user's text."""
    if isinstance(value, str):
        return Text(value) if value else ""
    if isinstance(value, dict):
        return {users(k): users(v) for k, v in value.items()}
    if isinstance(value, list):
        return [users(v) for v in value]
    return value
