"""The standard streams of a process, which need not be there.

A GUI program has none (`sys.stderr` is None), a shell can close them (`2>&-`), editors and notebooks put objects of
their own in their place. A library that only wants to show a bar asks `is_terminal`; a program that prints runs inside
`usable` and need not ask.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, Final, TextIO

_NAMES: Final = ("stdin", "stdout", "stderr")


def is_terminal(stream: object) -> bool:
    """Whether a person looks at `stream`; False of None, of a closed stream and of an object that cannot tell."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except Exception:  # half an object, or one whose window is gone: each raises something else
        return False


def file_number(stream: object) -> int | None:
    """The file descriptor behind `stream`, None where there is none."""
    try:
        return int(stream.fileno())  # type: ignore[attr-defined]
    except Exception:  # as in `is_terminal`
        return None


def open_missing() -> None:
    """Open the null device as every descriptor of 0, 1 and 2 that is closed, once, when a program begins.

    The next file opened would get such a number, and what C libraries write to "standard error" would go into it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest that is free
        os.set_inheritable(fd, True)
    os.close(fd)


@contextlib.contextmanager
def usable() -> Iterator[None]:
    """Inside, every standard stream can be read or written: the null device stands for one that is None or closed.

    An object that has no more than `write` is written to.
    """
    before = {name: getattr(sys, name) for name in _NAMES}
    opened = []
    try:
        for name, stream in before.items():
            needed = _needed(stream, "readline" if name == "stdin" else "write")
            if needed is None:
                needed = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
                opened.append(needed)
            setattr(sys, name, needed)
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)
        for file in opened:
            file.close()


def settle() -> None:
    """Write what the standard streams still hold, and give up what cannot be written; just before the process ends.

    Python would complain of it on its way out, and end with exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            fd = file_number(stream)
            if fd is not None:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, fd)
                os.close(null)


def _needed(stream: Any, method: str) -> Any:
    """`stream`, or what stands for it; None where it is of no use."""
    if stream is None or getattr(stream, "closed", False) or not hasattr(stream, method):
        return None
    if method == "write" and not hasattr(stream, "flush"):
        return _Written(stream)
    return stream


class _Written(io.TextIOBase):
    """A whole text stream around an object of which only `write` is sure."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.write(text)
        return len(text)
