"""What a load does side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from worker_orcd.runtime.progress import LazyFuture


def test_a_later_call_begins_once_when_told_or_asked():
    calls = []

    def call(value: int) -> int:
        calls.append(value)
        if value < 0:
            raise ValueError(value)
        return value

    with ThreadPoolExecutor(1) as pool:
        _never, told, asked, bad = (LazyFuture(pool, call, value) for value in (1, 2, 3, -4))
        told.start()
        told.start()
        assert told.result() == told.result() == 2 and asked.result() == 3
        with pytest.raises(ValueError, match="-4"):
            bad.result()
    assert calls == [2, 3, -4]
