"""What a client sends, read and checked: bodies, correlation ids, deadlines.

Everything here happens before a job exists. JSON is decoded straight into typed structures, so nothing nested is ever
walked and nothing unknown is kept; the ranges of the sampling fields are `SamplingParams.check`. This module knows no
resource, no job and no model.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from datetime import datetime
from typing import Any, TypeVar

import falcon
import msgspec

from worker_orcd.config import MAX_BODY_BYTES, MAX_JOB_ID_CHARS, MAX_PROMPT_CHARS
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InferenceTimeout, InvalidRequest
from worker_orcd.wsgi.http_errors import BodyTooLarge

CORRELATION_HEADER = "X-Correlation-Id"
DEADLINE_HEADER = "X-Deadline"

_CORRELATION_ID = re.compile(r"[\x20-\x7e]{1,128}")
_AT_FIELD = re.compile(r" - at `\$\.([A-Za-z0-9_]+)")
_NAMED_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)


class ExecuteRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /execute. A field left out takes the value of `SamplingParams`."""

    job_id: str
    prompt: str
    max_tokens: int | msgspec.UnsetType = msgspec.UNSET
    temperature: float | msgspec.UnsetType = msgspec.UNSET
    top_p: float | msgspec.UnsetType = msgspec.UNSET
    top_k: int | msgspec.UnsetType = msgspec.UNSET
    min_p: float | msgspec.UnsetType = msgspec.UNSET
    repetition_penalty: float | msgspec.UnsetType = msgspec.UNSET
    stop: list[str] | msgspec.UnsetType = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET

    def check(self) -> None:
        """Check what concerns no sampling: job id, prompt, and the text of the stop strings."""
        check_job_id(self.job_id)
        if not self.prompt:
            raise InvalidRequest("prompt must not be empty", field="prompt")
        if len(self.prompt) > MAX_PROMPT_CHARS:
            raise InvalidRequest(
                f"prompt has {len(self.prompt)} characters; at most {MAX_PROMPT_CHARS} are taken", field="prompt"
            )
        if "\0" in self.prompt:
            raise InvalidRequest("prompt holds a NUL character", field="prompt")
        if self.stop is not msgspec.UNSET and any("\0" in s for s in self.stop):
            raise InvalidRequest("stop holds a NUL character", field="stop")

    def sampling(self) -> SamplingParams:
        """The sampling fields that were given, not yet checked."""
        given = {
            name: value for name in self.__struct_fields__[2:] if (value := getattr(self, name)) is not msgspec.UNSET
        }
        return SamplingParams(**given)


class CancelRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /cancel."""

    job_id: str

    def check(self) -> None:
        """Check the job id."""
        check_job_id(self.job_id)


Body = TypeVar("Body", ExecuteRequest, CancelRequest)


def check_job_id(job_id: str) -> None:
    """Raise `InvalidRequest` where a job id is empty, too long or holds a control character."""
    if not 1 <= len(job_id) <= MAX_JOB_ID_CHARS:
        raise InvalidRequest(f"job_id must have 1 to {MAX_JOB_ID_CHARS} characters, not {len(job_id)}", field="job_id")
    if any(ord(c) < 32 or ord(c) == 127 for c in job_id):
        raise InvalidRequest("job_id holds a control character", field="job_id")


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
        body = req.env["wsgi.input"].read(MAX_BODY_BYTES + 1 if declared is None else declared)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"the body could not be read ({type(error).__name__})") from None
    if len(body) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
    if declared is not None and len(body) < declared:
        raise InvalidRequest(f"the body ended after {len(body)} of {declared} bytes")
    return body


def decode(body: bytes, kind: type[Body]) -> Body:
    """Decode and check a JSON body.

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
    request.check()
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


def correlation_id(value: str | None) -> str:
    """The id a client gave, or a new one.

    Raises:
        InvalidRequest: it is not 1 to 128 printable ASCII characters.
    """
    if value is None:
        return secrets.token_hex(16)
    if not _CORRELATION_ID.fullmatch(value):
        raise InvalidRequest(
            f"{CORRELATION_HEADER} must be 1 to 128 printable ASCII characters", field=CORRELATION_HEADER
        )
    return value


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
