"""What this process may use of the machine: cores and memory, as affinity and control groups allow; and how it gives
memory back.

Linux tells both in files. One that is absent, cannot be read or holds something else sets no limit, so that an odd
container never keeps a program from starting. `root` is the folder that stands for "/"; tests give another.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

#: heaps of glibc's allocator; a process with many threads would get up to 8 for each core, each of which keeps what is
#: free in it
HEAPS = 4
#: bytes from which on a block is a mapping of its own, which its end gives back; and that may be free at the end of a
#: heap. Both would grow with the blocks that are freed, up to 64 MiB for each heap
LARGE_BLOCK = 1 << 20
#: parameters of glibc's mallopt
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def usable_cores(root: str | os.PathLike[str] = "/") -> int:
    """Cores that this process can keep busy, at least 1: those it may run on, or fewer where a control group around it
    has a quota of processor time (version 1 and 2; rounded up)."""
    cores = len(os.sched_getaffinity(0))
    for group in _groups(Path(root), "cpu"):
        words = _words(group / "cpu.max") or [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        quota, period = _number(words[:1]), _number(words[1:2])
        if quota and period:
            cores = min(cores, -(-quota // period))
    return cores


def free_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes of memory that this process can take without swapping: what the system has, or less where a control group
    around it has a limit. None: the system does not tell."""
    base = Path(root)
    known = [n * 1024 for n in [_number(_entry(base / "proc/meminfo", "MemAvailable:"))] if n is not None]
    for group in _groups(base, "memory"):
        limit = _number(_words(group / "memory.max") or _words(group / "memory.limit_in_bytes"))
        used = _number(_words(group / "memory.current") or _words(group / "memory.usage_in_bytes"))
        if limit and used is not None:
            # pages of files are given back when memory is short
            kept = [_number(_entry(group / "memory.stat", name)) or 0 for name in ("active_file", "inactive_file")]
            known.append(max(limit - max(used - sum(kept), 0), 0))
    return min(known, default=None)


def _of_glibc(name: str) -> Callable[..., object]:
    """A function of the C library; where it has none of that name, one that does nothing."""
    try:
        found: Callable[..., object] = getattr(ctypes.CDLL(None), name)
        return found
    except (OSError, AttributeError):
        return lambda *arguments: None


_mallopt, _malloc_trim = _of_glibc("mallopt"), _of_glibc("malloc_trim")


def share_heaps() -> None:
    """Let the threads of this process share a few heaps, which keep little of what is free; no effect under another
    allocator than glibc's."""
    _mallopt(_M_ARENA_MAX, HEAPS)
    _mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
    _mallopt(_M_TRIM_THRESHOLD, LARGE_BLOCK)


def give_back_memory() -> None:
    """Give free memory back to the system, of which glibc's allocator would keep most. Takes some milliseconds, without
    the Python lock; no effect under another allocator."""
    _malloc_trim(0)


def _groups(base: Path, controller: str) -> Iterator[Path]:
    """The folders of the control groups that hold this process and have the controller, from the innermost out."""
    mounts = [line.split() for line in _lines(base / "proc/self/mountinfo")]
    for line in _lines(base / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            kind = mount[mount.index("-") + 1 :] if "-" in mount else []
            # fields: ..., 3 the folder of the hierarchy that is shown, 4 where; after "-" kind, source, options
            if len(mount) < 6 or len(kind) < 3 or kind[0] != ("cgroup" if controllers else "cgroup2"):
                continue
            if controllers and controller not in kind[2].split(","):
                continue
            top = base / mount[4].lstrip("/")
            inside = os.path.relpath(path, mount[3])
            # a container may be shown a part of the hierarchy that its own path does not lie in
            folder = top if inside.startswith("..") else top / inside
            yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _entry(path: Path, name: str) -> list[str]:
    """What follows `name` in a file of lines "name value"."""
    return next((words[1:] for line in _lines(path) if (words := line.split()) and words[0] == name), [])


def _number(words: list[str]) -> int | None:
    """The first word where it is a whole number of zero or more, else None; "max" and -1 say that there is no limit."""
    return int(words[0]) if words and words[0].isascii() and words[0].isdigit() and len(words[0]) < 20 else None
