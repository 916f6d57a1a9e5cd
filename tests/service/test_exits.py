"""When the server was told to end; the timer that ends the process, whose earliest time counts."""

from __future__ import annotations

import os
import threading
import time

import pytest

from worker_orcd.wsgi.exits import ExitTimer, ProcessEnd, StopTime

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


def test_a_child_tells_its_parent_when_it_was_told_and_the_first_time_counts():
    told = StopTime()
    assert told.seconds_ago() == 0
    child = os.fork()
    if child == 0:
        told.note()
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.1)
    first = told.seconds_ago()
    told.note()
    assert 0.1 <= first <= told.seconds_ago() < 5


def test_a_process_ends_once_whoever_ends_it(monkeypatch):
    """Both the main thread and the timer may want to; what is done at the end is not made for two."""
    flushes, exits, hang, began = [], [], threading.Event(), threading.Event()

    def exit_slowly(code):
        exits.append(code)
        began.set()
        hang.wait(10)

    monkeypatch.setattr(os, "_exit", exit_slowly)
    end = ProcessEnd(lambda: flushes.append(threading.current_thread().name))
    for code in (0, 1, 1):
        threading.Thread(target=end, args=(code,), name=f"ends with {code}", daemon=True).start()
        assert began.wait(5)
    time.sleep(0.1)
    assert exits == [0] and flushes == ["ends with 0"]
    hang.set()


def test_a_process_ends_although_its_last_act_fails(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def fail():
        raise OSError("nobody reads")

    with pytest.raises(OSError, match="nobody"):
        ProcessEnd(fail)(70)
    assert codes == [70]
