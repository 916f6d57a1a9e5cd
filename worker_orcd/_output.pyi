"""Types of pyx/worker_orcd/_output.pyx: sinks of jobs, bodies of streams, the output thread's loop."""

from collections.abc import Iterable

from worker_orcd._ring import TokenRing
from worker_orcd._text import TextDecoder

#: states of a `ClientStream`: more may come, the system has all of it, the client has gone
OPEN: int
SENT: int
GONE: int
#: kinds of reports of an `OutputLoop`; see its `run`
WOKEN: int
TOKEN: int
MARK: int
STOPPED: int
PIECE: int

def watch(epoll: int, fd: int) -> None:
    """Let an epoll instance tell of the other side of `fd` closing. Raises: OSError."""

def unwatch(epoll: int, fd: int) -> None:
    """Let it tell nothing of `fd` any more. Raises: OSError."""

class ClientStream:
    """The body of one HTTP answer on its way. What the socket does not take at once waits here; nothing blocks."""

    def __init__(self, fd: int, chunked: bool, epoll: int, wake: int, limit: int) -> None: ...
    def begin(self, head: bytes, data: bytes) -> int:
        """Send the head of the answer, as it is, and the first bytes of the body with it. Returns the state: OPEN, SENT
        or GONE, as the next ones do."""

    def write(self, data: bytes) -> int:
        """Append bytes, however much waits, and send."""

    def finish(self, data: bytes = b"") -> int:
        """Append the last bytes of the body, end it, and send."""

    def writable(self) -> int:
        """The socket can be written again: send what waits."""

    def release(self) -> None:
        """Leave the socket alone from now on."""

    @property
    def overflowed(self) -> bool:
        """Whether more waited than may."""

    @property
    def lost(self) -> bool:
        """Whether a piece was dropped because of that."""

    @property
    def silent_seconds(self) -> float:
        """Seconds since the system took the last byte; 0 while some wait for the client."""

def encode_piece(before: bytes, after: bytes, end: bytes | None, text: str, index: int) -> bytes:
    """One piece by a template, as streams get it."""

class JobSink:
    """Where the tokens of one job become its text, and its pieces wait for who takes them - or are sent to a client."""

    def decode_with(
        self, decoder: TextDecoder | None, stops: Iterable[str], stop_ids: Iterable[int], n_unwatched: int = 0
    ) -> None:
        """Make pieces of the tokens that the loop brings."""

    @property
    def decodes(self) -> bool:
        """Whether it makes pieces of tokens."""

    def add_piece(self, text: str, token_ids: Iterable[int]) -> bool:
        """Take a piece made elsewhere. Returns whether somebody waits for it (see `ready`)."""

    def add_silent(self, token_ids: Iterable[int]) -> None:
        """Take tokens that gave no text to show."""

    def close(self) -> None:
        """Take nothing any more."""

    def take(self) -> tuple[str, int, tuple[int, ...]] | None:
        """The next piece as (text, index, token ids), or None."""

    def ready(self) -> bool:
        """Whether a piece is there; where it is not, `add_piece` or the loop says when the next one is."""

    def attach(self, stream: ClientStream, before: bytes, after: bytes, end: bytes | None) -> None:
        """From now on pieces are bytes of `stream`, by the template given."""

    @property
    def ended_by(self) -> tuple[str | None, int | None]:
        """(stop string, stop token) that ended its text, each None where it did not."""

    @property
    def text(self) -> str:
        """All text so far."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of all pieces so far, and the silent ones."""

    @property
    def n_tokens(self) -> int:
        """Their number."""

class OutputLoop:
    """Brings the tokens of a ring to the sinks of their jobs, for one thread."""

    def __init__(self, ring: TokenRing, failed: int) -> None: ...
    def add(self, seq_id: int, sink: JobSink) -> None:
        """Bring the tokens of a sequence to `sink`; where that does not decode, they are reported."""

    def remove(self, seq_id: int) -> None:
        """Drop the tokens of a sequence from now on."""

    def run(self, timeout: float) -> list[tuple[int, int, int]]:
        """Work until there is something to report, `timeout` seconds are over, or the ring is closed and empty."""
