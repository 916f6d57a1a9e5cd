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
from worker_orcd.runtime.request import check_job_id
from worker_orcd.wsgi.http_errors import BodyTooLarge

DEADLINE_HEADER = "X-Deadline"

_AT_FIELD = re.compile(r" - at `\$\.([A-Za-z0-9_]+)")
_NAMED_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)
#: what JSON calls 64.0 may be a whole number; past this one a float no longer tells neighbours apart
_LARGEST_WHOLE_FLOAT = 2.0**53
#: milliseconds since 1970 below which a deadline was meant in seconds: it lies in March 1973
_FIRST_MS = 100_000_000_000
#: a deadline below that is no moment at all, in seconds either: it is a time from now
_FIRST_SEC = 100_000_000


Body = TypeVar("Body", bound=msgspec.Struct)
#: decodes bodies into one structure. Made before threads decode: msgspec completes a structure where it is first used,
#: and ends the process where two threads use it first at the same time.
Decoder = msgspec.json.Decoder


def answer_json(resp: falcon.Response, status: int, data: dict[str, object]) -> None:
    """Answer with a JSON object."""
    resp.status = status
    resp.data = msgspec.json.encode(data, enc_hook=str)


def take(req: falcon.Request, decoder: Decoder[Body]) -> Body:
    """The body of a request, decoded. The log of a refusal gets the job's id where the body has one.

    Raises:
        BodyTooLarge, InvalidRequest: as `read_body` and `decode` do.
    """
    body = read_body(req)
    try:
        taken = decode(body, decoder)
    except InvalidRequest:
        req.context.job_id = _job_id(body)
        raise
    req.context.job_id = _loggable(getattr(taken, "job_id", None))
    return taken


def read_body(req: falcon.Request) -> bytes:
    """The whole request body.

    Raises:
        BodyTooLarge: over `MAX_BODY_BYTES`, by its declared length or by what really arrived.
        InvalidRequest: the client ended or stalled before the declared end, or its chunks are malformed.
    """
    declared = req.content_length
    if declared is not None and declared > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has {declared} bytes; at most {MAX_BODY_BYTES} are taken")
    chunked = "chunked" in (req.env.get("HTTP_TRANSFER_ENCODING") or "").lower()
    if declared is None and not chunked:
        return b""
    try:
        body: bytes = req.env["wsgi.input"].read(MAX_BODY_BYTES + 1 if declared is None else declared)
    except BodyTooLarge:
        raise
    except Exception as error:  # of the server's own kind where chunks are malformed; any is the client's fault
        reason = error.message if isinstance(error, InvalidRequest) else type(error).__name__
        raise InvalidRequest(f"the body could not be read ({reason})") from None
    if len(body) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
    if declared is not None and len(body) < declared:
        raise InvalidRequest(f"the body ended after {len(body)} of {declared} bytes")
    return body


def decode(body: bytes, decoder: Decoder[Body]) -> Body:
    """Decode a JSON body.

    Raises:
        InvalidRequest: for anything that is not exactly one object of the known fields; names the field where one is
            at fault. The text of the request is never repeated in the message.
    """
    request = typed(body, decoder)
    # The body is known to be one flat object here; the last of two equal keys won, which no client can have meant.
    # `len` makes the least of a number, whose value is no matter.
    json.loads(body, object_pairs_hook=_refuse_duplicates, parse_int=len, parse_float=len)
    return request


def typed(body: bytes, decoder: Decoder[Body]) -> Body:
    """`decode`, of two equal keys the last."""
    if not body.strip(b" \t\r\n"):
        kind: Any = decoder.type  # a structure, as `Body` says
        needed = [f.name for f in msgspec.structs.fields(kind) if f.required]
        raise InvalidRequest(f"the body is empty; it must be a JSON object with {' and '.join(needed)}")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is no valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the body is no valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


class _JobId(msgspec.Struct):
    job_id: str


_JOB_ID = Decoder(_JobId)


def _job_id(body: bytes) -> str | None:
    """The job id in a body that may be wrong everywhere else; None where it has none that may be logged."""
    try:
        return _loggable(_JOB_ID.decode(body).job_id)
    except (ValueError, RecursionError):
        return None


def _loggable(job_id: str | None) -> str | None:
    try:
        check_job_id(job_id or "", plain_text=True)
    except InvalidRequest:
        return None
    return job_id


def whole(name: str, value: int | float) -> int:
    """A JSON number as the integer that it is: 64, 64.0 and 6.4e1 are one number.

    Raises:
        InvalidRequest: it has a fraction, or is a float so large that it stands for several integers; says `name`.
    """
    if isinstance(value, int):
        return value
    if not value.is_integer():
        raise InvalidRequest(f"{name} must be a whole number, not {value!r}", field=name)
    if abs(value) > _LARGEST_WHOLE_FLOAT:
        raise InvalidRequest(f"{name} must be written without point and exponent past 2^53", field=name)
    return int(value)


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
    rule = rule.replace("Expected", "expected", 1).replace("int | float", "int").replace(" | null", "")
    return InvalidRequest(f"{at.group(1)}: {rule}", field=at.group(1))


def seconds_left(value: str | None) -> float | None:
    """Seconds until the X-Deadline of a request (RFC 3339, or milliseconds since 1970), None where it has none.

    Raises:
        InvalidRequest: it is neither.
        InferenceTimeout: it has passed; says so where it was meant in seconds, or from now.
    """
    if value is None:
        return None
    text, slip = value.strip(), ""
    try:
        if text.isascii() and text.isdigit() and len(text) <= 15:
            number = int(text)
            moment = number / 1000
            if number < _FIRST_SEC:
                slip = f"; {number} is no moment: {DEADLINE_HEADER} takes milliseconds since 1970, not a time from now"
            elif number < _FIRST_MS:
                slip = f"; {number} looks like seconds: {DEADLINE_HEADER} takes milliseconds since 1970"
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
        raise InferenceTimeout(
            f"the deadline passed {math.ceil(-left * 1000)} ms ago{slip}", field=DEADLINE_HEADER if slip else None
        )
    return left
