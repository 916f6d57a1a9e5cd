"""The timer that ends the process: the earliest time counts, and no thread is needed when it comes."""

from __future__ import annotations

import threading
import time

import pytest

from worker_orcd.wsgi.exits import ExitTimer

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def left():
    """[seconds from now at which the timer came], and the timer."""
    began, times, came = time.monotonic(), [], threading.Event()

    def leave():
        times.append(time.monotonic() - began)
        came.set()

    timer = ExitTimer(leave)
    timer.start()
    return timer, times, came


@pytest.mark.parametrize("limits", [(0.2,), (30, 0.2), (0.2, 30), (30, 20, 0.2, 10)])
def test_the_earliest_time_counts(left, limits):
    timer, times, came = left
    for seconds in limits:
        timer.within(seconds)
    assert came.wait(5) and 0.15 < times[0] < 2
    time.sleep(0.05)
    assert len(times) == 1


def test_it_waits_until_a_time_is_set(left):
    timer, _, came = left
    assert not came.wait(0.2)
    timer.within(0)
    assert came.wait(5)


def test_no_thread_is_started_when_the_time_comes(left, monkeypatch):
    timer, _, came = left

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    timer.within(0.05)
    assert came.wait(5)
    with pytest.raises(RuntimeError, match="thread"):
        ExitTimer(print).start()
