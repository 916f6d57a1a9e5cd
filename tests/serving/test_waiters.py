"""Waiters: who waits is woken, and leaves nothing behind, also after a time that ran out."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from worker_orcd.serving.waiters import Waiters


def test_everyone_is_woken_once_it_is_so():
    waiters, said, seen = Waiters(), threading.Event(), []
    threads = [threading.Thread(target=lambda: seen.append(waiters.wait_for(said.is_set))) for _ in range(8)]
    for thread in threads:
        thread.start()
    waiters.notify_all()  # for nothing: they go on waiting
    time.sleep(0.02)
    assert not seen
    said.set()
    waiters.notify_all()
    for thread in threads:
        thread.join(5)
    assert seen == [True] * 8 and not waiters._asleep


def test_what_is_so_already_needs_no_waiting():
    assert Waiters().wait_for(lambda: True, 0) and Waiters().wait_for(lambda: True)


def test_the_time_runs_out():
    waiters = Waiters()
    began = time.monotonic()
    assert not waiters.wait_for(lambda: False, 0.05)
    assert 0.05 <= time.monotonic() - began < 2
    assert not waiters.wait_for(lambda: False, 0) and not waiters.wait_for(lambda: False, -1)
    assert not waiters._asleep, "nothing is kept of those who went"


def test_what_becomes_so_while_one_lies_down_wakes_it():
    waiters, answers = Waiters(), iter([False, True, True])
    assert waiters.wait_for(lambda: next(answers)) and not waiters._asleep


def test_the_main_thread_sees_a_signal_that_did_not_wake_it():
    """A signal that another thread gets stands in for one that comes right before the sleep."""

    class Hit(Exception):
        pass

    def hit(*_):
        raise Hit

    before = signal.signal(signal.SIGUSR1, hit)
    said = threading.Event()

    def signal_itself() -> None:
        time.sleep(0.05)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    other = threading.Thread(target=signal_itself)
    other.start()
    began = time.monotonic()
    waiters = Waiters()
    try:
        with pytest.raises(Hit):
            waiters.wait_for(said.is_set, 20)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - began < 5 and not waiters._asleep
    other.join()


def test_many_threads_that_tell_and_wait():
    waiters, counts = Waiters(), [0] * 4

    def tell(i: int) -> None:
        for _ in range(300):
            counts[i] += 1
            waiters.notify_all()

    def wait() -> None:
        for n in range(1, 301):
            assert waiters.wait_for(lambda n=n: min(counts) >= n, 10)

    threads = [threading.Thread(target=tell, args=(i,)) for i in range(4)] + [
        threading.Thread(target=wait) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(t.is_alive() for t in threads)
