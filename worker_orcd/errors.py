"""The one error tree of worker-orcd.

Every error a user can meet is a `WorkerError` with a stable wire code (`.code`), an HTTP status (`.status`) and a
message of one readable line. `details()` is what goes into JSON answers and log lines.
"""

from __future__ import annotations

from typing import Any


def escaped(text: str, keep: str = "") -> str:
    """`text` with every character that cannot be printed as its Python escape, so that it stays one harmless line.

    Args:
        text: anything; a name of a file may hold a terminal's control sequences or lone surrogates.
        keep: characters that stay though they cannot be printed.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


#: characters of a file's text that a message quotes
MAX_QUOTED = 80


def excerpt(text: str, limit: int = MAX_QUOTED) -> str:
    """The start of text that a file or a library gave, for a message: escaped, on one line, at most `limit` characters.

    Text that is longer ends in "..."; no escape is cut in two.
    """
    shown = escaped(text[: limit + 1])
    if len(text) <= limit and len(shown) <= limit:
        return shown
    kept: list[str] = []
    room = limit - len("...")
    for character in text[:limit]:
        piece = escaped(character)
        room -= len(piece)
        if room < 0:
            break
        kept.append(piece)
    return "".join(kept) + "..."


def quoted(text: str, limit: int = MAX_QUOTED) -> str:
    """`excerpt` of `text` between single quotes."""
    return f"'{excerpt(text, limit)}'"


class WorkerError(Exception):
    """Base of all errors of worker-orcd.

    Attributes:
        code: stable wire code, for example ``"MODEL_LOAD_FAILED"``.
        status: the HTTP status the code maps to.
        retriable: whether the same request may succeed later.
        message: one readable line.
        sticky: whether every later call of the engine will fail like this one, so that the process has to end.
        fields: extra facts by name (path, offset, field, device, bytes_required, bytes_available, ...).
    """

    code = "INTERNAL"
    status = 500
    retriable = False
    sticky = False

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields: dict[str, Any] = {k: v for k, v in fields.items() if v is not None}

    def details(self) -> dict[str, object]:
        """The error as a flat JSON-able dict: code, message, retriable and the extra fields."""
        return {"code": self.code, "message": self.message, "retriable": self.retriable, **self.fields}


class InvalidRequest(WorkerError):
    """A request field breaks its rule; `fields["field"]` names it."""

    code, status = "INVALID_REQUEST", 400


class ModelLoadError(WorkerError):
    """A model or tokenizer file was refused. Message form: ``path: reason (at byte offset)``.

    Args:
        reason: why, naming the key or tensor.
        path: the file.
        offset: byte offset in the file where the fault was found, if there is one.
    """

    code = "MODEL_LOAD_FAILED"

    def __init__(self, reason: str, path: str | None = None, offset: int | None = None, **fields: object) -> None:
        where = f"{path}: " if path else ""
        at = f" (at byte {offset})" if offset is not None else ""
        super().__init__(f"{where}{reason}{at}", path=path, offset=offset, reason=reason, **fields)


class InsufficientVram(WorkerError):
    """The plan needs more device memory than is free; carries `bytes_required` and `bytes_available`."""

    code, status = "INSUFFICIENT_VRAM", 503

    def __init__(self, message: str, bytes_required: int, bytes_available: int, **fields: object) -> None:
        super().__init__(message, bytes_required=bytes_required, bytes_available=bytes_available, **fields)


class InsufficientMemory(WorkerError):
    """The host gives no memory of this size; carries `bytes_required` and, where it is known, `bytes_available`."""

    code, status = "INSUFFICIENT_MEMORY", 503

    def __init__(self, message: str, bytes_required: int, bytes_available: int | None, **fields: object) -> None:
        super().__init__(message, bytes_required=bytes_required, bytes_available=bytes_available, **fields)


class VramOom(WorkerError):
    """One job can never fit the KV arena."""

    code = "VRAM_OOM"


class CudaError(WorkerError):
    """A driver call failed; `fields["call"]` names it, `fields["status_name"]` is the driver's name of the status.

    `sticky` is true when the context is poisoned and the process must end (exit code 70).
    """

    code = "CUDA_ERROR"

    def __init__(
        self,
        message: str,
        call: str | None = None,
        status_name: str | None = None,
        sticky: bool = False,
        **fields: object,
    ) -> None:
        super().__init__(message, call=call, status_name=status_name, **fields)
        self.sticky = sticky


class InferenceTimeout(WorkerError):
    """A job passed its deadline or the server's inference timeout."""

    code, status, retriable = "INFERENCE_TIMEOUT", 504, True


class Cancelled(WorkerError):
    """The job was cancelled by its client, by /cancel or by closing its iterator."""

    code, status = "CANCELLED", 499


class InternalError(WorkerError):
    """A fault of worker-orcd itself."""


def no_thread(purpose: str, error: RuntimeError) -> BaseException:
    """What to raise where a thread "`purpose`" could not be started: an `InternalError`, or the interrupt that came
    meanwhile, of which the lock that `Thread.start` waits for can make a RuntimeError."""
    if isinstance(error.__context__, KeyboardInterrupt):
        return error.__context__
    return InternalError(f"the system gives no thread {purpose}: {error}")


class EngineGone(InternalError):
    """The engine is closed, or belongs to the process that this one was forked from."""

    sticky = True


class EngineHangs(InternalError):
    """The engine answers no more: it is in a call that does not end."""

    sticky = True


class QueueFull(WorkerError):
    """The queue holds `max_queue` jobs already; try again after `retry_after` seconds."""

    code, status, retriable = "QUEUE_FULL", 429, True


class NotReady(WorkerError):
    """The worker is loading, unhealthy or shutting down."""

    code, status, retriable = "NOT_READY", 503, True


class DuplicateJob(WorkerError):
    """A job of this id is queued or running."""

    code, status = "DUPLICATE_JOB", 409

    def __init__(self, job_id: str) -> None:
        super().__init__(f"a job {job_id!r} is queued or running", job_id=job_id)
