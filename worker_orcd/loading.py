"""Steps of loading a model that need no engine: how large the KV cache gets, whether the digest is right, progress.

Knows the file, the plan and the device's room; no engine, no thread and no request.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from worker_orcd import devices, kv_pool
from worker_orcd.engine import EngineConfig
from worker_orcd.errors import InsufficientVram, InvalidRequest, ModelLoadError
from worker_orcd.plan import Plan

if TYPE_CHECKING:
    from worker_orcd.model_file import ModelFile

#: called with (bytes done, bytes in all)
Progress = Callable[[int, int], object]
_HASH_CHUNK = 8 << 20


class LoadProgress:
    """One progress over several passes through the file, to a callable or to a bar."""

    def __init__(self, progress: bool | Progress, size: int) -> None:
        self._size = size
        self._n_phases, self._phase = 1, -1
        self._bar: Any = None
        self._report: Progress | None = progress if callable(progress) else None
        if progress is True and sys.stderr.isatty():
            from tqdm import tqdm
            self._bar = tqdm(total=size, desc="loading", unit="B", unit_scale=True, leave=False)
            self._report = self._move_bar

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, *phases: bool) -> None:
        """How many passes there will be."""
        self._n_phases = max(sum(phases), 1)
        self._tell(0)

    def next(self) -> Callable[[int], None]:
        """Begin the next pass; the result takes the bytes of it that are done."""
        self._phase += 1
        base = self._phase * self._size
        return lambda done: self._tell((base + min(done, self._size)) // self._n_phases)

    def done(self) -> None:
        """Everything is loaded."""
        self._tell(self._size)

    def _tell(self, done: int) -> None:
        if self._report is not None:
            self._report(done, self._size)

    def _move_bar(self, done: int, total: int) -> None:
        self._bar.update(done - self._bar.n)


def no_progress(done: int) -> None:
    """For a pass that nobody watches."""


def engine_config(device: str, plan: Plan, asked: int | None, kv_cache_bytes: int | None, max_seqs: int,
                  max_rows: int) -> EngineConfig:
    """Context and KV blocks: as many as asked for or refused, else as many as fit.

    Args:
        asked: the context length that the caller wants, or None.
        kv_cache_bytes: what the caller allows, or None.

    Raises:
        InvalidRequest: more positions than the model was made for.
        InsufficientVram: the KV cache holds no block, or not one sequence of the context asked for.
    """
    limit = min(plan.context_length, plan.max_positions or plan.context_length)
    if asked is not None and asked > limit:
        raise InvalidRequest(f"context_length {asked} is past the {limit} positions the model was made for",
                             field="context_length")
    context = asked or limit
    sizes = kv_pool.block_bytes(plan)
    one_sequence = sum(kv_pool.reservation(g, context) * s for g, s in zip(plan.kv_groups, sizes, strict=True))
    budget = kv_cache_bytes
    if budget is None:
        room = devices.kv_budget(device, plan, max_seqs, max_rows)
        budget = room.default if asked is None else max(room.default, min(one_sequence, room.most))
    n_blocks = kv_pool.blocks_within(plan, budget, max_seqs, max_rows, context)
    if min(n_blocks) == 0:
        raise InsufficientVram(f"the KV cache may take {budget} bytes; one block of {kv_pool.BLOCK_SIZE} positions "
                               f"needs {sum(sizes)}", sum(sizes), budget, device=device)
    longest = kv_pool.longest_sequence(plan.kv_groups, n_blocks)
    if longest is not None and longest < context:
        if asked is not None:
            raise InsufficientVram(f"a context of {context} positions needs a KV cache of {one_sequence} bytes; it may "
                                   f"take {budget}", one_sequence, budget, device=device)
        context = longest
    return EngineConfig(max_seqs, max_rows, context, n_blocks)


def file_digest(model_file: ModelFile, progress: Callable[[int], None]) -> str:
    """SHA-256 of all parts' bytes, one part after another, as they are in the files that were opened.

    Args:
        progress: called with the bytes done; what it raises ends the work.

    Raises:
        ModelLoadError: a file was changed since it was opened.
    """
    digest, done = hashlib.sha256(), 0
    for part in model_file.parts:
        at = 0
        while chunk := os.pread(part.fileno(), _HASH_CHUNK, at):
            digest.update(chunk)
            at += len(chunk)
            progress(done + at)
        done += at
    model_file.check_unchanged(same_path=False)
    return digest.hexdigest()


def check_digest(model_file: ModelFile, expected: str, progress: Callable[[int], None]) -> None:
    """Raise `ModelLoadError` where `file_digest` is not `expected`."""
    found = file_digest(model_file, progress)
    if found != expected:
        raise ModelLoadError(f"SHA-256 is {found}, not {expected}", model_file.path)
