"""The threads of requests: few for short calls, as many as are needed for others; one that cannot be started is its
request's error."""

from __future__ import annotations

import threading
import time

import pytest

from worker_orcd.wsgi.thread_pool import SHORT_CALLS, SHORT_SEC, ThreadPool

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def gate():
    event = threading.Event()
    yield event
    event.set()


def refuse(thread):
    raise RuntimeError("can't start new thread")


def test_calls_run_at_once_up_to_the_number_and_the_others_wait(gate):
    pool, running = ThreadPool(3), []

    def call(n):
        running.append(n)
        gate.wait(10)
        return n

    futures = [pool.submit(call, n) for n in range(5)]
    time.sleep(5 * SHORT_SEC)
    assert running == [0], "one at a time, as long as nobody asks whether it is short"
    for n in (1, 2):
        assert pool.relieve(), "a call that was no short one makes room"
        time.sleep(0.1)
        assert running == list(range(n + 1))
    assert pool.relieve(), "there are three threads, and two calls wait"
    time.sleep(0.1)
    assert running == [0, 1, 2] and not pool.wait_until_idle(0.05)
    gate.set()
    assert [f.result(5) for f in futures] == [0, 1, 2, 3, 4] and pool.wait_until_idle(5)
    assert not pool.relieve()
    pool.shutdown()


def test_calls_that_hang_hold_up_no_others_for_long(gate):
    """However many there are: each gets a thread once those before it have turned out not to be short."""
    pool, calls = ThreadPool(100), []
    hanging = [pool.submit(gate.wait, 10) for _ in range(20)]
    short = [pool.submit(calls.append, n) for n in range(5)]
    end = time.monotonic() + 5
    while pool.relieve() and time.monotonic() < end:
        time.sleep(SHORT_SEC / 4)
    assert all(call.exception(5) is None for call in short) and sorted(calls) == list(range(5))
    assert not any(call.done() for call in hanging)
    gate.set()
    assert all(call.result(5) for call in hanging)
    # and of what is short one runs at a time again, though there are many threads now
    assert pool.wait_until_idle(5)
    running, most = [], []

    def short_one():
        running.append(1)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()

    assert all(call.exception(5) is None for call in [pool.submit(short_one) for _ in range(100)])
    assert max(most) <= SHORT_CALLS
    pool.shutdown()


def test_a_crowd_of_short_calls_takes_few_threads_beside_long_ones(gate):
    pool, running = ThreadPool(500), []

    def call(long):
        if long:
            pool.take_long()
        running.append(long)
        gate.wait(10)

    futures = [pool.submit(call, n < 20) for n in range(100)]
    end = time.monotonic() + 5
    while len(running) < 20 + SHORT_CALLS and time.monotonic() < end:
        time.sleep(0.01)
        if len(running) >= SHORT_CALLS:
            futures.append(pool.submit(call, False))  # a call looks for a thread when it comes
    assert running.count(True) == 20 and running.count(False) <= SHORT_CALLS + 1
    gate.set()
    assert all(f.exception(5) is None for f in futures)
    pool.shutdown()


def test_what_comes_first_overtakes_what_waits(gate):
    pool, calls = ThreadPool(SHORT_CALLS), []
    for _ in range(SHORT_CALLS):
        pool.submit(gate.wait, 10)
    for n in range(3):
        pool.submit(calls.append, n)
    first = pool.submit_first(lambda n: calls.append(n) or time.sleep(0.1), -1)
    gate.set()
    assert first.exception(5) is None and pool.wait_until_idle(5) and calls.index(-1) <= 1
    pool.shutdown()


def test_a_flood_of_what_comes_first_leaves_every_second_turn_to_the_others(gate):
    pool, calls = ThreadPool(1), []
    pool.submit(gate.wait, 10)
    for _ in range(50):
        pool.submit_first(calls.append, "first")
    for n in range(5):
        pool.submit(calls.append, n)
    gate.set()
    assert pool.wait_until_idle(5) and calls[:10] == [x for n in range(5) for x in ("first", n)]
    assert calls[10:] == ["first"] * 45
    pool.shutdown()


def test_an_idle_thread_is_used_before_another_is_started():
    pool = ThreadPool(50)
    names = set()
    for _ in range(100):
        pool.submit(lambda: names.add(threading.current_thread().name)).result(5)
        pool.wait_until_idle(5)
    assert len(names) == 1
    pool.shutdown()


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), KeyboardInterrupt()])
def test_an_error_is_the_calls_own_and_the_thread_lives_on(error):
    def fail():
        raise error

    pool = ThreadPool(1)
    assert pool.submit(fail).exception(5) is error
    assert pool.submit(lambda a, b=0: a + b, 1, b=2).result(5) == 3
    pool.shutdown()


def test_a_thread_that_cannot_be_started_is_that_calls_error_and_leaves_nothing_behind(gate, monkeypatch):
    pool, calls = ThreadPool(8), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(20):
            with pytest.raises(RuntimeError, match="thread"):
                pool.submit(calls.append, 1)
    first = pool.submit(gate.wait, 10)
    second = pool.submit(calls.append, 2)
    time.sleep(2 * SHORT_SEC)
    pool.relieve()
    assert second.result(5) is None, "a thread can be had again"
    gate.set()
    assert first.result(5) and pool.wait_until_idle(5)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pool.submit(calls.append, 3).result(5)  # by one that is idle
    assert calls == [2, 3]
    pool.shutdown()


def test_long_calls_leave_a_thread_for_short_ones_where_no_more_can_be_started(gate, monkeypatch):
    """It takes the short ones one by one, and is no thread for one more long call."""
    pool, calls = ThreadPool(8), []

    def stream():
        pool.take_long()
        calls.append("long")
        gate.wait(10)

    streams = [pool.submit(stream) for _ in range(3)]
    end = time.monotonic() + 5
    while len(calls) < 3 and time.monotonic() < end:
        time.sleep(0.002)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert isinstance(pool.submit(stream).exception(5), RuntimeError)
        short = [pool.submit(calls.append, n) for n in range(20)]
        assert all(call.exception(5) is None for call in short)
    assert calls == ["long"] * 3 + list(range(20))
    gate.set()
    assert all(call.exception(5) is None for call in streams) and pool.wait_until_idle(5)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert pool.submit(stream).exception(5) is None, "what was long has ended"
    pool.shutdown()


def test_long_calls_may_take_every_thread_where_there_may_be_no_more(gate):
    pool = ThreadPool(2)
    calls = [pool.submit(lambda: (pool.take_long(), gate.wait(10))) for _ in range(2)]
    time.sleep(0.05)
    last = pool.submit(lambda: 1)
    gate.set()
    assert last.result(5) == 1 and all(call.exception(5) is None for call in calls)
    pool.shutdown()


def test_a_cancelled_call_is_not_run(gate):
    pool, calls = ThreadPool(1), []
    pool.submit(gate.wait, 10)
    second = pool.submit(calls.append, 1)
    assert second.cancel()
    gate.set()
    pool.submit(calls.append, 2).result(5)
    assert calls == [2]
    pool.shutdown(wait=False)


def test_its_threads_keep_no_process_alive_and_end_with_it():
    before = threading.active_count()
    pool = ThreadPool(4)
    gate = threading.Event()
    for _ in range(4):
        pool.submit(gate.wait, 10)
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("request-"))
    gate.set()
    pool.shutdown()
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_call_knows_whether_it_has_said_that_it_takes_long():
    pool = ThreadPool(4)

    def call(long):
        if long:
            pool.take_long()
        return pool.is_long

    assert [pool.submit(call, long).result(5) for long in (True, False, True, False)] == [True, False, True, False]
    assert not pool.is_long
    pool.shutdown()
