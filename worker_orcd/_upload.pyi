"""Types of pyx/worker_orcd/_upload.pyx: from files to device memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from worker_orcd._driver import Context, DeviceMemory, Stream
from worker_orcd._gguf import GgufFile

#: readers where the caller names no number
MAX_READERS: int
#: alignment of a range in the staging area
ALIGN: int
#: most page-locked memory of a load
MAX_PINNED: int

@dataclass(frozen=True)
class FileRange:
    """A run of bytes of a file."""

    file: GgufFile
    offset: int
    nbytes: int
    to: int | None = None
    tag: object = None
    rule: tuple[int, str, tuple[int, ...]] | None = None
    name: str = ""

@dataclass(frozen=True)
class UploadStats:
    """What a load was: bytes, seconds, reader threads."""

    nbytes: int
    seconds: float
    n_readers: int

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second."""

class Consumer:
    """What is done with the ranges in staging, without the lock of Python."""

def upload(
    context: Context,
    ranges: Iterable[FileRange],
    *,
    consume: Consumer | Callable[[object, int, int], object] | None = None,
    stream: Stream | None = None,
    staging: DeviceMemory | None = None,
    chunk_bytes: int = 1 << 20,
    n_readers: int = 0,
    progress: Callable[[int], object] | None = None,
) -> UploadStats:
    """Bring bytes of files to the device, and wait until they are there."""
