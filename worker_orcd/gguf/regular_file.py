"""Small files that users point to, read whole: never a FIFO or a device, never more than a limit."""

from __future__ import annotations

import os
import stat

from worker_orcd.errors import ModelLoadError


def read_regular_file(path: str, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        ModelLoadError: it cannot be read, is no regular file (a FIFO would block), or is larger.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ModelLoadError("is not a regular file", path)
        if status.st_size > limit:
            raise ModelLoadError(f"has {status.st_size} bytes, limit {limit}", path)
        with open(path, "rb") as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise ModelLoadError(f"cannot be read: {e.strerror}", path) from None
    if len(data) > limit:  # it grew since
        raise ModelLoadError(f"has more than {limit} bytes", path)
    return data
