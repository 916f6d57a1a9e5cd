"""The watchdog with a clock of the test's own, and a loop whose engine hangs."""

from __future__ import annotations

import threading
import time

import pytest
from helpers.fake_engine import FakeEngine
from helpers.loop_rig import Rig, read, wait_for

from worker_orcd.errors import EngineHangs, InferenceTimeout, NotReady
from worker_orcd.serving.watchdog import Watchdog


class Clock:
    """A watchdog's sleep: each one runs what the test planned for the tick, in virtual time."""

    def __init__(self, ticks):
        self.ticks = iter(ticks)
        self.seconds = 0.0
        self.steps = 0
        self.works = True
        self.hung: list[float] = []

    def wait(self, seconds):
        self.seconds += seconds
        happens = next(self.ticks, None)
        if happens is None:
            return True  # closed
        happens(self)
        return False

    def run(self, limit):
        Watchdog(limit, lambda: self.steps, lambda: self.works, self.hung.append, self.wait).run()
        return self.hung


def nothing(clock):
    pass


def a_step(clock):
    clock.steps += 1


def idle(clock):
    clock.works = False


def work(clock):
    clock.works = True


def test_an_engine_that_hangs_is_noticed_after_the_limit_and_once():
    clock = Clock([a_step] * 50 + [nothing] * 1000)
    assert clock.run(30.0) == [30.0]
    assert 50 + 30 <= clock.seconds <= 50 + 32


def test_a_short_limit_is_kept_in_proportion():
    clock = Clock([nothing] * 1000)
    assert clock.run(0.2) == [0.2]
    assert 0.2 <= clock.seconds < 0.25


def test_a_step_in_time_is_enough():
    assert Clock(([nothing] * 29 + [a_step]) * 40).run(30.0) == []


def test_an_idle_engine_hangs_nowhere():
    assert Clock([idle] + [nothing] * 500).run(30.0) == []
    # the time begins with the work, not with the last step
    clock = Clock([idle] + [nothing] * 500 + [work] + [nothing] * 500)
    assert clock.run(30.0) == [30.0] and clock.seconds > 530


def test_a_process_that_was_stopped_hangs_nowhere():
    """It sleeps through an hour in one tick, however long that took by the clock on the wall."""

    def an_hour(clock):
        clock.seconds += 3600

    assert Clock([a_step, nothing, an_hour, nothing, a_step] * 100).run(30.0) == []


class Hangs(FakeEngine):
    """Never comes back from its fifth call, until the test lets it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.let_go = threading.Event()

    def _begin(self, call, n_rows):
        super()._begin(call, n_rows)
        if len(self.calls) >= 5:
            self.let_go.wait()


def test_a_loop_whose_engine_hangs_dies_with_all_its_jobs():
    rig = Rig(never_stop=True, engine_class=Hangs, watchdog_sec=0.4)
    began = time.monotonic()
    jobs = [rig.submit(max_tokens=100, job_id=f"j{n}") for n in range(7)]  # four run, three wait
    for job in jobs:
        error = read(job)[1]
        assert isinstance(error, EngineHangs) and "0.4 s" in error.message and error.sticky
    assert 0.4 <= time.monotonic() - began < 3
    wait_for(lambda: rig.fatal)
    assert rig.loop.error is rig.fatal[0] and len(rig.fatal) == 1
    with pytest.raises(NotReady, match="has failed"):
        rig.submit()
    assert not rig.loop.close(), "the engine may not be freed while a thread is in it"
    rig.engine.let_go.set()
    wait_for(lambda: not any(t.is_alive() for t in rig.loop._threads))
    assert len(rig.fatal) == 1


def test_an_engine_that_hangs_is_noticed_though_nobody_waits_for_it_any_more():
    rig = Rig(never_stop=True, engine_class=Hangs, watchdog_sec=0.4)
    job = rig.submit(max_tokens=100, deadline=time.monotonic() + 0.1)
    assert isinstance(read(job)[1], InferenceTimeout)
    wait_for(lambda: rig.fatal)
    rig.engine.let_go.set()
    rig.loop.close()


def test_an_engine_that_hangs_at_the_start_of_a_job_is_noticed():
    """Which is no step, and the job is not waited for any more."""
    begun, go_on = threading.Event(), threading.Event()

    class HangsAtStart(FakeEngine):
        def set_slot(self, slot, sampling, *edits):
            begun.set()
            go_on.wait()
            super().set_slot(slot, sampling, *edits)

    rig = Rig(never_stop=True, engine_class=HangsAtStart, watchdog_sec=0.4)
    job = rig.submit(max_tokens=100)
    assert begun.wait(5)
    job.cancel()
    wait_for(lambda: rig.fatal)
    go_on.set()
    assert rig.loop.close()


def test_slow_steps_and_an_idle_loop_are_left_alone():
    with Rig(never_stop=True, step_seconds=0.15, watchdog_sec=0.6) as rig:
        assert rig.submit(max_tokens=8).completion().finish_reason == "length"  # a decode run of 1 s without Python
        time.sleep(0.8)
        assert rig.submit(max_tokens=2).completion().finish_reason == "length"
        assert rig.fatal == []


def test_the_end_of_a_loop_does_not_wait_for_a_tick():
    with Rig(watchdog_sec=30.0) as rig:
        began = time.monotonic()
        rig.submit(max_tokens=3).completion()
    assert time.monotonic() - began < 0.5
