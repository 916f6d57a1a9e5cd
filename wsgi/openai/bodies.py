"""JSON bodies with JSON of any shape inside: bounded in depth, no key twice, unknown fields told in the log."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import falcon
import numpy as np

from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi.native import requests
from worker_orcd.wsgi.service import Service

#: containers within one another
MAX_DEPTH = 64
#: names of unknown fields that the log is told of
MAX_TOLD = 100

# possessive, and the end of the text ends a string too: it matches at every quote, so each byte is looked at once
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKET = bytes(c for c in range(256) if c not in b"[]{}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")


class Bodies:
    """Takes in the bodies of one route.

    Args:
        service: has the log.
        kind: the structure of the body.
    """

    def __init__(self, service: Service, kind: Any) -> None:
        self._events = service.events
        self._decoder = requests.Decoder(kind)
        self._known = frozenset(kind.__struct_fields__)
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def take(self, req: falcon.Request) -> Any:
        """The body of a request.

        Raises:
            BodyTooLarge: as `requests.read_body`.
            InvalidRequest: it is not exactly one object whose known fields have their types; names the field. The text
                of the request is never repeated in the message.
        """
        body = requests.read_body(req)
        if too_deep(body):
            raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep")
        taken = requests.typed(body, self._decoder)
        unknown = top_names(body) - self._known
        if unknown:
            self._tell(unknown, req.path)
        return taken

    def _tell(self, unknown: set[str], path: str) -> None:
        # a misquoted body can make a name of a prompt: what does not look like a field's is not written down
        names = {name if _NAME.fullmatch(name) else "(no name of a field)" for name in unknown}
        with self._lock:
            news = sorted(names - self._told)[: MAX_TOLD - len(self._told)]
            self._told.update(news)
        for name in news:
            self._events.emit("field_ignored", "warning", path=path, field=name)


def too_deep(body: bytes, most: int = MAX_DEPTH) -> bool:
    """Whether containers of a JSON text are more than `most` deep within one another."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(_TO_SQUARE, _NO_BRACKET), np.int8)
    depth = np.cumsum(ord("\\") - brackets, dtype=np.int32)  # "[", "\\" and "]" follow one another: 1 and -1
    return bool(len(depth)) and int(depth.max()) > most


def top_names(body: bytes) -> set[str]:
    """The names in the outermost object of a JSON text that is not deep and was decoded into a structure already.

    Raises:
        InvalidRequest: an object of it has a name twice; or what the structure passed over is no JSON.
    """
    try:
        text = str(body, "utf-8")  # json would let surrogates pass
        # the last object to be complete is the outermost; `len` makes the least of a number, whose value is no matter
        return set(json.loads(text, object_pairs_hook=_unique, parse_int=len, parse_float=len))
    except UnicodeDecodeError:
        raise InvalidRequest("the body is no valid UTF-8") from None
    except ValueError:
        raise InvalidRequest("the body is no valid JSON") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(n for n, _ in pairs if n in seen or seen.add(n))  # type: ignore[func-returns-value]
        known = bool(_NAME.fullmatch(name))
        raise InvalidRequest(f"{name if known else 'a name'} is given twice", field=name if known else None)
    return found
