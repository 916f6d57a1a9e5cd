"""RequestBuffer: collects the bytes of one request and knows when a parser can take them without waiting for more.

It knows where a head ends and how a body is framed (RFC 9112), nothing else. What a request means, whether it is right,
and where the next one begins, the parser decides. Where framing breaks a rule the request is ready at once, so that the
parser refuses it. No socket is known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

#: bytes of a request's head; of the trailers behind a chunked body; of all that frames its chunks
MAX_HEAD_BYTES = MAX_TRAILER_BYTES = MAX_FRAME_BYTES = 1 << 16
#: bytes of the request line, and of the line before a chunk
MAX_LINE_BYTES = 8190
_BARE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_LINE = re.compile(rb"0*([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_CODINGS = frozenset((b"identity", b"gzip", b"deflate", b"compress"))


class State(Enum):
    """How far a request has come. Past the first two, nothing more needs to arrive."""

    HEAD = "its head is not whole"
    BODY = "its body is not whole"
    WHOLE = "it is whole"
    MALFORMED = "its framing breaks a rule"
    HEAD_TOO_LARGE = "its head is too large"
    BODY_TOO_LARGE = "its body is too large"


class RequestBuffer:
    """The bytes of one request, and what has already arrived behind it.

    Args:
        max_body_bytes: a body with more, announced or arrived, is too large.

    Attributes:
        data: all bytes so far.
        state: how far they go.
        wants_continue: the client waits for `100 Continue` before it sends its body.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self.data = bytearray()
        self.state = State.HEAD
        self.wants_continue = False
        self._max_body_bytes = max_body_bytes
        self._scanned = 0  # what is looked for does not begin before here
        self._body_at = 0
        self._end = 0  # of the body; of what is known of a chunked one
        self._chunk_bytes = 0
        self._step: Callable[[], bool] = self._find_head

    @property
    def ready(self) -> bool:
        """Whether a parser can take it."""
        return self.state is not State.HEAD and self.state is not State.BODY

    def feed(self, data: bytes) -> None:
        """Add what has arrived. What comes behind the request's end is kept and not looked at."""
        self.data += data
        while not self.ready and self._step():
            pass

    def _find_head(self) -> bool:
        data = self.data
        first = 2 if data.startswith(b"\r\n") else 0  # one empty line before a request is ignored (RFC 9112, 2.2)
        end = data.find(b"\r\n\r\n", max(first, self._scanned))
        if (end if end >= 0 else len(data)) - first > MAX_HEAD_BYTES:
            self.state = State.HEAD_TOO_LARGE
        elif end >= 0:
            self._body_at = self._scanned = self._end = end + 4
            self._read_head(bytes(data[first:end]))
            return True
        elif (
            _BARE_LF.search(data, self._scanned) is not None
            or (len(data) > first and data[first] != 0x0D and not 0x21 <= data[first] <= 0x7E)
            or (len(data) - first > MAX_LINE_BYTES and data.find(b"\r\n", first, first + MAX_LINE_BYTES) < 0)
        ):
            self.state = State.MALFORMED  # no line of HTTP begins so
        self._scanned = max(0, len(data) - 3)
        return False

    def _read_head(self, head: bytes) -> None:
        """Set state and step by the headers that frame the body. What is doubtful is malformed."""
        length: int | None = None
        codings: list[bytes] = []
        expects = False
        request_line, *lines = head.split(b"\r\n")
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.lower(), value.strip(b" \t").lower()
            if name == b"content-length":
                if length is not None or not _LENGTH.fullmatch(value):
                    self.state = State.MALFORMED
                    return
                length = int(value)
            elif name == b"transfer-encoding":
                codings += [coding.strip(b" \t") for coding in value.split(b",")]
            elif name == b"expect":
                if value != b"100-continue":
                    self.state = State.MALFORMED
                    return
                expects = not request_line.endswith(b"HTTP/1.0")
        if codings:
            if length is not None or codings[-1] != b"chunked" or not _CODINGS.issuperset(codings[:-1]):
                self.state = State.MALFORMED
                return
            self._step = self._chunk_line
        elif length is not None and length > self._max_body_bytes:
            self.state = State.BODY_TOO_LARGE
            return
        else:
            self._end += length or 0
            self._step = self._whole_length
        self.state = State.BODY
        some_to_come = bool(codings) or self._end > self._body_at
        self.wants_continue = expects and some_to_come and len(self.data) == self._body_at

    def _whole_length(self) -> bool:
        if len(self.data) >= self._end:
            self.state = State.WHOLE
        return False

    def _chunk_line(self) -> bool:
        end = self.data.find(b"\r\n", self._scanned)
        if (end if end >= 0 else len(self.data)) - self._end > MAX_LINE_BYTES:
            self.state = State.MALFORMED
        if end < 0:
            if self.data.find(b"\n", self._scanned) >= 0:
                self.state = State.MALFORMED  # a line ends with both characters, and no line holds one of them
            self._scanned = max(self._end, len(self.data) - 1)
            return False
        line = _CHUNK_LINE.fullmatch(self.data, self._end, end)
        if line is None:
            self.state = State.MALFORMED
            return False
        size = int(line.group(1), 16)
        self._scanned = self._end = end + 2
        if self._end - self._body_at - self._chunk_bytes > MAX_FRAME_BYTES:
            self.state = State.BODY_TOO_LARGE
        self._chunk_bytes += size
        if self._chunk_bytes > self._max_body_bytes:
            self.state = State.BODY_TOO_LARGE
        self._end += size
        self._step = self._chunk_end if size else self._trailers
        return True

    def _chunk_end(self) -> bool:
        behind = self.data[self._end : self._end + 2]
        if not b"\r\n".startswith(behind):
            self.state = State.MALFORMED
        if len(behind) < 2:
            return False
        self._end += 2
        self._scanned = self._end
        self._step = self._chunk_line
        return True

    def _trailers(self) -> bool:
        data, start = self.data, self._end
        if data.startswith(b"\r\n", start) or data.find(b"\r\n\r\n", self._scanned) >= 0:
            self.state = State.WHOLE
        elif len(data) - start > MAX_TRAILER_BYTES or _BARE_LF.search(data, self._scanned) is not None:
            self.state = State.MALFORMED
        self._scanned = max(start, len(data) - 3)
        return False
