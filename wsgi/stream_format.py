"""StreamFormat: the bytes that the client of a stream gets, apart from how they travel.

A stream carries one or several generations (choices). Most pieces of text differ from each other in their text alone,
so a format gives a template for them, which whoever carries the stream fills in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from worker_orcd.errors import WorkerError
from worker_orcd.serving.job import Finished, TextPiece

#: a comment, which clients of server-sent events skip
PING = b": ping\n\n"

_UNICODE_LINE_BREAKS = tuple((chr(c).encode(), b"\\u%04x" % c) for c in (0x85, 0x2028, 0x2029))


def json_line(data: Any) -> bytes:
    """JSON as one line for everybody: the line breaks of Unicode, at which many clients cut lines too, are escaped."""
    text = msgspec.json.encode(data, enc_hook=str)
    if not text.isascii():
        for line_break, escape in _UNICODE_LINE_BREAKS:
            text = text.replace(line_break, escape)
    return text


def encode_event(name: str, data: Mapping[str, object]) -> bytes:
    """One server-sent event with a name."""
    return b"event: " + name.encode("ascii") + b"\ndata: " + json_line(data) + b"\n\n"


@dataclass(frozen=True)
class PieceTemplate:
    """A piece of text as bytes: `before`, the text as the inside of a JSON string, `after`; where `end` is given also
    the piece's index in digits, and `end`."""

    before: bytes
    after: bytes
    end: bytes | None = None

    def encode(self, text: str, index: int) -> bytes:
        """The bytes of one piece."""
        filled = self.before + json_line(text)[1:-1] + self.after
        return filled if self.end is None else filled + b"%d" % index + self.end


class StreamFormat(Protocol):
    """What the client of one stream gets. `choice` counts the generations of the stream from 0."""

    #: goes out when nothing else did for a while
    ping: bytes

    def opening(self) -> bytes:
        """What comes before any text, at once."""

    def template(self, choice: int) -> PieceTemplate | None:
        """How the pieces of a choice are made from their text; None: `pieces` makes them."""

    def pieces(self, choice: int, pieces: Sequence[TextPiece]) -> bytes:
        """The next pieces of a choice. Called only where it has no template."""

    def finished(self, choice: int, end: Finished) -> bytes:
        """The end of a choice, after its pieces."""

    def closing(self) -> bytes:
        """The end of the stream, once all choices have finished."""

    def failed(self, error: WorkerError) -> bytes:
        """The end of the stream in the place of all the above: an error ends all its choices."""
