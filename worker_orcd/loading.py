"""Progress of a load over several passes through the model's bytes. Knows no file, no engine and no request."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

#: called with (bytes done, bytes in all)
Progress = Callable[[int, int], object]


class LoadProgress:
    """One progress over several passes through the file, to a callable or to a bar."""

    def __init__(self, progress: bool | Progress, size: int, verb: str = "loading") -> None:
        self._size = size
        self._n_phases, self._phase = 1, -1
        self._bar: Any = None
        self._report: Progress | None = progress if callable(progress) else None
        if progress is True and sys.stderr.isatty():
            from tqdm import tqdm
            self._bar = tqdm(total=size, desc=verb, unit="B", unit_scale=True, leave=False)
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
