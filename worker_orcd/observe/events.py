"""The narration log: what the worker did, one event a line, for people and for machines.

An event is a name and flat fields. It never carries a prompt or generated text: `text_facts` gives what may be said of
one (length and SHA-256).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import threading
from datetime import UTC, datetime
from typing import TextIO

from worker_orcd.errors import escaped

_ENCODER = json.JSONEncoder(default=str, separators=(",", ":"))
#: an unexpectedly long field (a path, a driver's message) is cut here so that a line stays a line
MAX_FIELD_CHARS = 2000


def text_facts(name: str, text: str) -> dict[str, object]:
    """What the log may say of a text: ``{name}_chars`` and ``{name}_sha256`` (of its UTF-8)."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return {f"{name}_chars": len(text), f"{name}_sha256": digest}


class EventLog:
    """Writes events to a stream, one whole line each, from any thread.

    Args:
        stream: where lines go; standard error when None, and nowhere where there is none.
        fmt: ``"json"`` (one object a line) or ``"text"`` (for people).
        base_fields: fields of every event, for example worker_id and model_ref.

    A stream that fails (a closed pipe) never stops the worker: its lines are lost. One that waits for its reader makes
    `emit` wait, so a server puts an `unblocked.UnblockedText` in the place of standard error.
    """

    def __init__(self, stream: TextIO | None = None, fmt: str = "json", **base_fields: object) -> None:
        if fmt not in ("json", "text"):
            raise ValueError(f"log format {fmt!r} is neither json nor text")
        self._stream = stream
        self._fmt = fmt
        self._base = {k: v for k, v in base_fields.items() if v is not None}
        self._told = frozenset(self._base)  # the same in every line, so text for people leaves them out
        self._lock = threading.RLock()

    def bind(self, **fields: object) -> EventLog:
        """A log that adds `fields` to every event and shares this one's stream and lock."""
        child = EventLog(self._stream, self._fmt, **{**self._base, **fields})
        child._lock = self._lock
        child._told = self._told
        return child

    def emit(self, event: str, level: str = "info", /, **fields: object) -> None:
        """Write one event; `level` is debug, info, warning or error. Fields of value None are left out."""
        line = self.line(event, level, **fields)
        with self._lock:
            try:
                stream = self._stream if self._stream is not None else sys.stderr
                if stream is not None:  # None: the process has no standard error
                    stream.write(line)
                    stream.flush()
            except (OSError, ValueError):
                pass

    def line(self, event: str, level: str = "info", /, **fields: object) -> str:
        """The line that `emit` writes, with its line end."""
        record: dict[str, object] = {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": level,
            "event": event,
            **self._base,
            **{k: _plain(v) for k, v in fields.items() if v is not None},
        }
        return (_as_json(record) if self._fmt == "json" else self._as_text(record)) + "\n"

    def _as_text(self, record: dict[str, object]) -> str:
        clock = str(record["ts"])[11:23]
        shown = {k: v for k, v in record.items() if k not in ("ts", "level", "event") and k not in self._told}
        level = "" if record["level"] == "info" else f" {str(record['level']).upper()}"
        return f"{clock}{level} {record['event']}" + "".join(f" {k}={_text_value(v)}" for k, v in shown.items())


def _plain(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    if isinstance(value, str) and len(value) > MAX_FIELD_CHARS:
        return value[:MAX_FIELD_CHARS] + "..."
    return value


def _as_json(value: object) -> str:
    # ASCII only: a path that is no UTF-8, or a line separator of Unicode, must not break the line
    return _ENCODER.encode(value)


def _text_value(value: object) -> str:
    text = escaped(value if isinstance(value, str) else _as_json(value))
    return '"' + text.replace('"', '\\"') + '"' if not text or any(c in text for c in ' ="') else text
