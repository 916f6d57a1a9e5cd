"""What a client sends, taken in: its body, as JSON of known fields and types, and its deadline.

JSON is decoded straight into typed structures, so nothing nested is ever walked and nothing unknown is kept. What the
values may be is checked where a request is prepared, in the runtime.
"""

from __future__ import annotations

import json
import math
import re
import time
from datetime import datetime
from typing import Any, TypeVar

import falcon
import msgspec

from worker_orcd.config import MAX_BODY_BYTES
from worker_orcd.errors import InferenceTimeout, InvalidRequest
from worker_orcd.wsgi.http_errors import BodyTooLarge

DEADLINE_HEADER = "X-Deadline"

_AT_FIELD = re.compile(r" - at `\$\.([A-Za-z0-9_]+)")
_NAMED_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)


Body = TypeVar("Body", bound=msgspec.Struct)


def answer_json(resp: falcon.Response, status: int, data: dict[str, object]) -> None:
    """Answer with a JSON object."""
    resp.status = status
    resp.data = msgspec.json.encode(data, enc_hook=str)


def read_body(req: falcon.Request) -> bytes:
    """The whole request body.

    Raises:
        BodyTooLarge: over `MAX_BODY_BYTES`, by its declared length or by what really arrived.
        InvalidRequest: the client ended or stalled before the declared end.
    """
    declared = req.content_length
    if declared is not None and declared > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has {declared} bytes; at most {MAX_BODY_BYTES} are taken")
    chunked = "chunked" in (req.env.get("HTTP_TRANSFER_ENCODING") or "").lower()
    if declared is None and not chunked:
        return b""
    try:
        body: bytes = req.env["wsgi.input"].read(MAX_BODY_BYTES + 1 if declared is None else declared)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"the body could not be read ({type(error).__name__})") from None
    if len(body) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
    if declared is not None and len(body) < declared:
        raise InvalidRequest(f"the body ended after {len(body)} of {declared} bytes")
    return body


def decode(body: bytes, kind: type[Body]) -> Body:
    """Decode a JSON body.

    Raises:
        InvalidRequest: for anything that is not exactly one object of the known fields; names the field where one is
            at fault. The text of the request is never repeated in the message.
    """
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is no valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is no valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    # The body is known to be one flat object here; the last of two equal keys won, which no client can have meant.
    json.loads(body, object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str)
    return request


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise InvalidRequest(f"{name} is given twice", field=name)
        seen.add(name)


def _refused(reason: str) -> InvalidRequest:
    named = _NAMED_FIELD.match(reason)
    if named:
        unknown = "unknown" in reason.split("`", 1)[0]
        name = named.group(1)
        shown = name if name.isprintable() and len(name) <= 64 else repr(name[:61])
        return InvalidRequest(f"unknown field {shown}" if unknown else f"{shown} is required", field=shown)
    at = _AT_FIELD.search(reason)
    if at is None:
        return InvalidRequest(f"the body is refused: {reason}")
    rule = reason.split(" - at ", 1)[0].replace("`", "")
    rule = rule.replace("Expected", "expected", 1).replace("str | ", "str or ").replace(" | unset", "")
    return InvalidRequest(f"{at.group(1)}: {rule}", field=at.group(1))


def seconds_left(value: str | None) -> float | None:
    """Seconds until the X-Deadline of a request (RFC 3339, or milliseconds since 1970), None where it has none.

    Raises:
        InvalidRequest: it is neither.
        InferenceTimeout: it has passed.
    """
    if value is None:
        return None
    text = value.strip()
    try:
        if text.isascii() and text.isdigit() and len(text) <= 15:
            moment = int(text) / 1000
        else:
            if "T" not in text.upper():
                raise ValueError("a date without a time")
            parsed = datetime.fromisoformat(text.upper())
            if parsed.tzinfo is None:
                raise ValueError("a time without a zone")
            moment = parsed.timestamp()
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{DEADLINE_HEADER} must be an RFC 3339 time with its zone, or milliseconds since 1970",
            field=DEADLINE_HEADER,
        ) from None
    left = moment - time.time()
    if left <= 0:
        raise InferenceTimeout(f"the deadline passed {math.ceil(-left * 1000)} ms ago")
    return left
