"""Answers that the application never sees: to what is no HTTP, comes too slowly, or is too much. They look as its own
errors do: JSON, with a correlation id, and a `refused` line in the log. No text of a request is repeated.
"""

from __future__ import annotations

import re
from http import HTTPStatus

import msgspec
from gunicorn.http import errors as gunicorn_errors

from worker_orcd.errors import InvalidRequest, NotReady, WorkerError
from worker_orcd.wsgi.http_errors import RETRY_LOADING_SEC, from_exception
from worker_orcd.wsgi.middleware import CORRELATION_HEADER, REQUEST_ID_HEADER, correlation_id

#: where a client's id is looked for, the first that it gave counts
_GIVEN_IDS = tuple(
    re.compile(rb"\r\n" + name.encode() + rb":[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)
    for name in (CORRELATION_HEADER, REQUEST_ID_HEADER)
)
#: what gunicorn's parser refuses: its class of error, our status and words. The first that fits counts.
_REFUSALS: tuple[tuple[type[Exception], int, str], ...] = (
    (gunicorn_errors.LimitRequestLine, 414, "the request line is too long"),
    (gunicorn_errors.LimitRequestHeaders, 431, "the headers are too large or too many"),
    (gunicorn_errors.UnsupportedTransferCoding, 501, "the transfer coding is not supported"),
    (gunicorn_errors.ExpectationFailed, 417, "the only expectation that is met is 100-continue"),
    (gunicorn_errors.InvalidRequestMethod, 400, "the method of the request is malformed"),
    (gunicorn_errors.InvalidHTTPVersion, 400, "the version of HTTP is none that is spoken here (1.0 and 1.1)"),
    (gunicorn_errors.InvalidRequestLine, 400, "the request line is malformed"),
    (gunicorn_errors.InvalidHeaderName, 400, "the name of a header is malformed"),
    (gunicorn_errors.ParseException, 400, "a header is malformed or contradicts another"),
)
#: those of its classes that tell of an answer's headers, not of a request's
_OURS = ("InvalidResponseHeader", "InvalidResponseHeaderName")


def refusal(error: BaseException) -> WorkerError:
    """What a client is told of an exception on the way to the application."""
    if type(error).__name__ not in _OURS:
        for kind, status, words in _REFUSALS:
            if isinstance(error, kind):
                return _with_status(InvalidRequest(words), status)
    return from_exception(error)


def too_slow(seconds: float) -> WorkerError:
    """The client took too long to send its request."""
    return _with_status(InvalidRequest(f"the request did not arrive within {seconds:g} s"), 408)


def too_much() -> WorkerError:
    """More is being received than there is room for."""
    return NotReady("too much is being received at once")


def id_of(head: bytes) -> str:
    """The correlation id in the bytes of a request, or a new one."""
    found = next((match for given in _GIVEN_IDS if (match := given.search(head)) is not None), None)
    try:
        return correlation_id(found.group(1).decode("latin-1") if found else None)
    except InvalidRequest:
        return correlation_id(None)


def encode(error: WorkerError, correlation: str) -> bytes:
    """The whole HTTP answer; the connection ends with it."""
    body = msgspec.json.encode(error.details(), enc_hook=str)
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"{CORRELATION_HEADER}: {correlation}",
        f"{REQUEST_ID_HEADER}: {correlation}",
    ]
    if isinstance(error, NotReady):
        lines.append(f"Retry-After: {RETRY_LOADING_SEC}")
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body


def _with_status(error: WorkerError, status: int) -> WorkerError:
    error.status = status
    return error
