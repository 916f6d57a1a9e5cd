"""Errors on their way out: one map to HTTP answers, in the worker's own shape or in OpenAI's, one to SSE events.

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


#: paths whose clients know OpenAI's shape of an error, and what lies below them
OPENAI_PATHS = ("/v1", "/tokenize", "/detokenize", "/apply-template", "/tokenizer_info")
#: `type` of an error by its status, as OpenAI names them; of others below 500 the first
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def answer(resp: falcon.Response, error: WorkerError, path: str = "") -> None:
    """Make `resp` the HTTP answer of `error`: its status, its details as JSON in the shape that `path` has, Retry-After
    where it helps."""
    resp.status = error.status
    resp.stream = None
    resp.content_type = falcon.MEDIA_JSON
    resp.data = msgspec.json.encode(openai_details(error) if is_openai(path) else error.details(), enc_hook=str)
    if isinstance(error, QueueFull):
        seconds = error.fields.get("retry_after")
        resp.set_header("Retry-After", str(max(1, math.ceil(seconds)) if isinstance(seconds, int | float) else 1))
    elif isinstance(error, NotReady):
        resp.set_header("Retry-After", str(RETRY_LOADING_SEC))
    elif isinstance(error, Unauthorized):
        resp.set_header("WWW-Authenticate", "Bearer")


def is_openai(path: str) -> bool:
    """Whether a path is one whose errors have OpenAI's shape, or would be below one."""
    return any(path == known or path.startswith(f"{known}/") for known in OPENAI_PATHS)


def openai_details(error: WorkerError) -> dict[str, object]:
    """The error in OpenAI's shape. `code` is the worker's own but for two that clients look for."""
    kind = _TYPES.get(error.status, _TYPES[400] if error.status < 500 else "server_error")
    code = getattr(error, "openai_code", error.code)
    param = error.fields.get("field")
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


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
