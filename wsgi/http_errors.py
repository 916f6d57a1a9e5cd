"""Errors on their way out: one map to HTTP answers, one to SSE events.

Codes and statuses are those of `worker_orcd.errors`; what HTTP alone knows (401, 403, 404, 413, 415) is added here.
"""

from __future__ import annotations

import math

import falcon
import msgspec

from worker_orcd.errors import InternalError, InvalidRequest, NotReady, QueueFull, WorkerError

#: what `threading` says where a thread cannot be started
_NO_THREAD = "can't start new thread"
#: seconds a client of a loading worker is told to wait
RETRY_LOADING_SEC = 1


class BodyTooLarge(InvalidRequest):
    """The request body is larger than the limit; it was not parsed."""

    status = 413


class NoThread(NotReady):
    """No thread can be started: a limit on processes, a container's as a rule, or no memory for its stack."""

    def __init__(self) -> None:
        super().__init__("no thread can be started; is there a limit on processes or memory?")


class Unauthorized(WorkerError):
    """The API key is missing or wrong."""

    code, status = "UNAUTHORIZED", 401


class Forbidden(WorkerError):
    """The request is not one that a user of this worker has meant: another host's name, another site's page."""

    code, status = "FORBIDDEN", 403


class UnsupportedMediaType(WorkerError):
    """The body is not said to be JSON; it was not read."""

    code, status = "UNSUPPORTED_MEDIA_TYPE", 415


def answer(resp: falcon.Response, error: WorkerError) -> None:
    """Make `resp` the HTTP answer of `error`: its status, its details as JSON, Retry-After where it helps."""
    resp.status = error.status
    resp.stream = None
    resp.content_type = falcon.MEDIA_JSON
    resp.data = msgspec.json.encode(error.details(), enc_hook=str)
    if isinstance(error, QueueFull):
        seconds = error.fields.get("retry_after")
        resp.set_header("Retry-After", str(max(1, math.ceil(seconds)) if isinstance(seconds, int | float) else 1))
    elif isinstance(error, NotReady):
        resp.set_header("Retry-After", str(RETRY_LOADING_SEC))
    elif isinstance(error, Unauthorized):
        resp.set_header("WWW-Authenticate", "Bearer")


def sse_event(error: WorkerError) -> tuple[str, dict[str, object]]:
    """The terminal SSE event of a stream that failed."""
    return "error", error.details()


def from_exception(error: BaseException) -> WorkerError:
    """Any exception as a `WorkerError`. Of one that is not ours only the type is told: its text may hold a prompt."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return NoThread()
    return InternalError(f"unexpected {type(error).__name__}")


def from_falcon(error: falcon.HTTPError) -> WorkerError:
    """What Falcon itself refuses (no such route, method not allowed) in our form, with Falcon's status."""
    refused = InvalidRequest(error.description or error.title or "the request was refused")
    refused.status = error.status_code
    return refused
