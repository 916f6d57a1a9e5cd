"""Provenance: which bytes a model is made of. SHA-256 of the file, of its parts, of its chunks, each in its own thread.

The bytes of a model are those of its file, or of all parts of a split model one after another; every range here is one
of these bytes. What digests are good is `trusted_models.py`'s matter.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from worker_orcd.errors import ModelLoadError, no_thread
from worker_orcd.machine import usable_cores

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

#: bytes of a chunk that has its own digest
CHUNK_BYTES = 64 << 20
#: bytes read and hashed at once: they stay in the cache between the two, and both release the GIL
_PIECE = 1 << 20
_MAX_THREADS = 16
#: seconds between two calls of `progress`
_TICK = 0.05

#: called with the bytes hashed so far; what it raises ends the hashing
Progress = Callable[[int], object]


def file_sha256(model_file: ModelFile, progress: Progress = lambda done: None) -> str:
    """SHA-256 of the model's bytes: what `cat` of all parts into `sha256sum` says.

    Raises:
        ModelLoadError: a part cannot be read, or was cut or written to meanwhile.
    """
    return range_digests(model_file, [(0, model_file.size)], progress)[0]


def part_digests(model_file: ModelFile, progress: Progress = lambda done: None) -> tuple[str, tuple[str, ...]]:
    """(SHA-256 of the model's bytes, SHA-256 of each part), what `file_sha256` raises."""
    if len(model_file.parts) == 1:
        whole = file_sha256(model_file, progress)
        return whole, (whole,)
    ranges, at = [(0, model_file.size)], 0
    for part in model_file.parts:
        ranges.append((at, at + part.size))
        at += part.size
    whole, *parts = range_digests(model_file, ranges, progress)
    return whole, tuple(parts)


def chunk_ranges(size: int, chunk_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
    """(start, end) of every chunk of `size` bytes; the last may be shorter."""
    return [(at, min(at + chunk_bytes, size)) for at in range(0, size, chunk_bytes)]


def range_digests(
    model_file: ModelFile, ranges: Sequence[tuple[int, int]], progress: Progress = lambda done: None, n_threads: int = 0
) -> list[str]:
    """SHA-256 of each range (start, end) of the model's bytes, several at once.

    Args:
        progress: called from this thread with how far it is, 0 to `model_file.size` whatever the ranges.
        n_threads: 0: one for each core that the process may use, at most 16.

    Raises:
        ModelLoadError: a part cannot be read, or was cut or written to meanwhile.
        InternalError: the system gives no thread.
    """
    total = sum(end - start for start, end in ranges)
    if total == 0:
        return [hashlib.sha256().hexdigest()] * len(ranges)
    n_threads = min(n_threads or usable_cores(), _MAX_THREADS, len(ranges))
    reader = _Reader(model_file)
    try:
        if n_threads == 1:
            digests = _one_by_one(reader, ranges, lambda done: progress(model_file.size * done // total))
        else:
            digests = _together(reader, ranges, n_threads, lambda done: progress(model_file.size * done // total))
        model_file.check_unchanged(same_path=False)
        return digests
    finally:
        reader.close()


def _one_by_one(reader: _Reader, ranges: Sequence[tuple[int, int]], report: Progress) -> list[str]:
    digests, before = [], 0
    for start, end in ranges:
        sha = hashlib.sha256()
        for at in reader.feed(sha.update, start, end):
            report(before + at - start)
        before += end - start
        digests.append(sha.hexdigest())
    return digests


def _together(reader: _Reader, ranges: Sequence[tuple[int, int]], n_threads: int, report: Progress) -> list[str]:
    stop = threading.Event()
    done = [0] * len(ranges)

    def digest(i: int) -> str:
        sha, (start, end) = hashlib.sha256(), ranges[i]
        for at in reader.feed(sha.update, start, end):
            done[i] = at - start
            if stop.is_set():
                break
        return sha.hexdigest()

    with ThreadPoolExecutor(n_threads, "sha256") as pool:
        try:
            futures = _submit(pool, digest, len(ranges))
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, _TICK, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                report(sum(done))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _submit(pool: ThreadPoolExecutor, digest: Callable[[int], str], n: int) -> list[Future[str]]:
    try:
        return [pool.submit(digest, i) for i in range(n)]
    except RuntimeError as error:
        raise no_thread("to hash the file in", error) from error


class _Reader:
    """Positioned reads of a model's bytes over all parts, from any thread.

    It has file descriptors of its own: the model may be closed while somebody still hashes.
    """

    def __init__(self, model_file: ModelFile) -> None:
        self._parts: list[tuple[int, int, str, int]] = []  # start, end, path, descriptor
        at = 0
        try:
            for part in model_file.parts:
                self._parts.append((at, at + part.size, part.path, os.dup(part.fileno())))
                at += part.size
        except BaseException:
            self.close()
            raise

    def feed(self, take: Callable[[memoryview], object], start: int, end: int) -> Iterator[int]:
        """Give the bytes start .. end-1 to `take`, piece by piece; yields after each the position it has come to."""
        buffer = memoryview(bytearray(min(_PIECE, end - start)))
        while start < end:
            n = self._read(buffer[: end - start], start)
            take(buffer[:n])
            start += n
            yield start

    def _read(self, buffer: memoryview, at: int) -> int:
        """Read bytes from `at` on, at least one, none past the end of their part. Returns how many."""
        first, end, path, fd = next(p for p in self._parts if at < p[1])
        try:
            n = os.preadv(fd, [buffer[: end - at]], at - first)
        except OSError as e:
            raise ModelLoadError(f"cannot be read: {e.strerror}", path, at - first) from None
        if n == 0:
            raise ModelLoadError("was cut while it was read", path, at - first)
        return n

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        while self._parts:
            os.close(self._parts.pop()[3])
