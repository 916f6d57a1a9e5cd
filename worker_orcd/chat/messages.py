"""The messages of a conversation, checked: plain JSON values, with content that is text."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from worker_orcd.errors import InvalidRequest, quoted

#: containers within one another in a message (tool calls have arguments of any JSON)
MAX_DEPTH = 32
#: bits of a whole number
MAX_INT_BITS = 1024

#: names of what an assistant thought, best first; templates read the first two, as transformers fills them in
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def checked(messages: object) -> list[dict[str, Any]]:
    """The messages as plain JSON values; keys of a message that are null are left out, as absent ones.

    Raises:
        InvalidRequest: names what is wrong with which.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequest("messages must be a non-empty list", field="messages")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]


def plain_value(value: object, where: str) -> Any:
    """A JSON value with numbers and strings of Python's own types.

    Raises:
        InvalidRequest: it is none, or nested too deeply; says `where`.
    """
    return _plain(value, where, MAX_DEPTH)


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content", field=where)
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        reason = "must be 1 to 64 letters, digits, '_', '.' or '-'"
        raise InvalidRequest(f"{where}.role {reason}", field=f"{where}.role")
    content = message.get("content")
    if content is None and role != "assistant":  # an assistant may only call tools
        raise InvalidRequest(f"{where}.content is missing", field=f"{where}.content")
    if isinstance(content, list | tuple):
        for i, part in enumerate(content):
            _check_part(part, f"{where}.content[{i}]")
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string or a list of parts", field=f"{where}.content")
    given = {k: v for k, v in message.items() if v is not None or k == "content"}
    thought = next((given[k] for k in _THOUGHTS if k in given), None)
    if thought is not None:
        given = {"thinking": thought, **given, "reasoning_content": thought}
    return {plain_value(str(k), where): plain_value(v, where) for k, v in given.items()}


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{where} must be an object with type and text", field=where)
    kind = part.get("type")
    if not isinstance(kind, str) or kind != "text":
        named = f"is {quoted(kind)}" if isinstance(kind, str) else "is missing or no string"
        raise InvalidRequest(f"{where}.type {named}; only parts of type 'text' are taken", field=f"{where}.type")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where}.text must be a string", field=f"{where}.text")


def _plain(value: object, where: str, depth: int) -> Any:
    if depth == 0:
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} levels deep", field=where)
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise InvalidRequest(f"{where} holds surrogate code points, which no UTF-8 text can", field=where)
        return str.__str__(value)  # of an enumeration, `str` is its name
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise InvalidRequest(f"{where} holds a number of more than {MAX_INT_BITS} bits", field=where)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, numbers.Real):  # NumPy's
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {_plain(str(k), where, depth - 1): _plain(v, where, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, where, depth - 1) for v in value]
    raise InvalidRequest(f"{where} holds a {type(value).__name__}, which is no JSON value", field=where)
