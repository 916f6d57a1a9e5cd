"""Deputy: whose work it does, in which order, and what an interrupt, a fork and a missing thread leave of it."""

from __future__ import annotations

import _thread
import gc
import os
import signal
import threading
import weakref

import pytest

from worker_orcd.errors import EngineGone, InternalError
from worker_orcd.serving.deputy import Deputy


@pytest.fixture
def deputy():
    made = Deputy("a-deputy")
    made.start()
    yield made
    made.finish(lambda: None)
    assert not any(t.name == "a-deputy" for t in threading.enumerate())


def here() -> str:
    return threading.current_thread().name


def test_it_works_for_the_main_thread_alone(deputy):
    assert deputy.call(here) == "a-deputy" and deputy.stands_in
    seen = []
    other = threading.Thread(target=lambda: seen.append((deputy.call(here), deputy.stands_in)), name="other")
    other.start()
    other.join()
    assert seen == [("other", False)]
    assert deputy.call(lambda: deputy.call(here)) == "a-deputy", "it does not wait for itself"


def test_errors_come_back(deputy):
    with pytest.raises(ZeroDivisionError):
        deputy.call(lambda: 1 / 0)
    with pytest.raises(SystemExit):
        deputy.call(lambda: exec("raise SystemExit(3)"))
    deputy.post(lambda: 1 / 0)
    assert deputy.call(here) == "a-deputy"


def test_an_error_holds_nothing_once_it_is_dropped(deputy):
    class Big:
        pass

    seen = []

    def work() -> None:
        big = Big()
        seen.append(weakref.ref(big))
        raise ZeroDivisionError

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            deputy.call(work)
        deputy.call(lambda: None)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_errands_keep_their_order(deputy):
    done = []
    for i in range(50):
        deputy.post(lambda i=i: done.append(i))
    deputy.call(lambda: done.append(50))
    assert done == list(range(51))


def test_before_and_after_its_life_all_is_done_at_once():
    deputy = Deputy()
    assert not deputy.stands_in and deputy.call(here) == here()
    deputy.start()
    done = []
    deputy.finish(lambda: done.append(here()))
    deputy.finish(lambda: done.append(here()))
    assert done == ["orcd-deputy", here()]
    assert deputy.call(here) == here()
    deputy.post(lambda: done.append(3))
    assert done[-1] == 3


def test_any_thread_may_finish_it_and_a_failing_last_work_ends_it_too():
    deputy = Deputy("b-deputy")
    deputy.start()
    seen = []
    other = threading.Thread(target=lambda: deputy.finish(lambda: seen.append(here())))
    other.start()
    other.join()
    assert seen == ["b-deputy"]
    failing = Deputy("c-deputy")
    failing.start()
    with pytest.raises(ZeroDivisionError):
        failing.finish(lambda: 1 / 0)
    failing._thread.join(5)
    assert not failing._thread.is_alive()


def test_an_interrupt_ends_the_waiting_and_not_the_work(deputy):
    done, going, go_on = [], threading.Event(), threading.Event()

    def work() -> None:
        going.set()
        go_on.wait(10)
        done.append(1)

    def interrupt() -> None:
        going.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        deputy.call(work)
    assert not done
    go_on.set()
    assert deputy.call(lambda: list(done)) == [1], "the next errand comes behind it"


def test_its_own_thread_may_finish_or_dismiss_it():
    for end in (lambda d: d.finish(lambda: None), lambda d: d.dismiss()):
        deputy = Deputy()
        deputy.start()
        deputy.call(lambda end=end, deputy=deputy: end(deputy))
        deputy._thread.join(5)
        assert not deputy._thread.is_alive() and deputy.call(here) == here()


@pytest.mark.parametrize("which", ["starter", "deputy"])
def test_no_thread_to_be_had(monkeypatch, which):
    def none(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(*((_thread, "start_new_thread") if which == "starter" else (threading.Thread, "start")), none)
    deputy = Deputy()
    with pytest.raises(InternalError, match=r"the system gives no thread to load the model in: can't start new thread"):
        deputy.start()
    assert deputy.call(here) == here()
    done = []
    deputy.finish(lambda: done.append(1))
    assert done == [1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_is_told(deputy):
    assert not deputy.forked
    deputy.check_process()
    pid = os.fork()
    if pid == 0:
        try:
            deputy.check_process()
        except EngineGone as error:
            os._exit(0 if str(os.getppid()) in error.message and "spawn" in error.message and deputy.forked else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
