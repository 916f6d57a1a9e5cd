"""A system that gives no more threads: loading fails by name and leaves nothing, whichever thread is not to be had."""

from __future__ import annotations

import _thread
import gc
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.fake_engine import FakeEngine
from helpers.loop_rig import Rig

from worker_orcd import LLM, SamplingParams
from worker_orcd.errors import InternalError
from worker_orcd.gguf import digests
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.runtime import devices, progress


class Limit:
    """Thread starts that work, and how many there were."""

    def __init__(self, monkeypatch, n: int, forever: bool) -> None:
        self.n_started = 0

        def limited(start):
            def start_or_not(*args):
                self.n_started += 1
                if self.n_started == n or (forever and self.n_started > n):
                    raise RuntimeError("can't start new thread")
                return start(*args)

            return start_or_not

        monkeypatch.setattr(_thread, "start_new_thread", limited(_thread.start_new_thread))
        monkeypatch.setattr(threading.Thread, "start", limited(threading.Thread.start))


def present() -> tuple[list[str], int]:
    gc.collect()
    return sorted(t.name for t in threading.enumerate()), len(os.listdir("/proc/self/fd"))


def settled(before) -> bool:
    until = time.monotonic() + 5
    while present() != before and time.monotonic() < until:
        time.sleep(0.005)
    return present() == before


@pytest.fixture
def engines(monkeypatch):
    made: list[FakeEngine] = []

    def open_engine(device, model_file, plan, config, *, progress, **_):
        progress(model_file.size)
        made.append(FakeEngine(config, plan.kv_groups, plan.n_vocab))
        return made[-1]

    monkeypatch.setattr(devices, "open_engine", open_engine)
    return made


@pytest.mark.parametrize("forever", [False, True])
def test_whichever_thread_is_not_to_be_had(goldens_dir, engines, monkeypatch, forever):
    path = goldens_dir / "llama-Q4_0.gguf"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    LLM(path, device="cpu", progress=False).close()
    before = present()
    for n in range(1, 20):
        with monkeypatch.context() as patch:
            limit = Limit(patch, n, forever)
            try:
                model = LLM(path, device="cpu", progress=False, expect_sha256=digest)
            except InternalError as error:
                assert "the system gives no thread" in error.message and "can't start new thread" in error.message
                assert settled(before), (n, present(), before)
                continue
        assert limit.n_started < n, "every start was needed"
        assert model.generate([[1]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids
        model.close()
        break
    assert 5 <= n <= 10, "the starter of the deputy, the deputy, those of the load, the two of the loop"
    assert all(e.closed for e in engines)


def test_digests_without_threads(goldens_dir, monkeypatch):
    with ModelFile(goldens_dir / "llama-Q4_0.gguf") as file:
        ranges = [(0, 1000), (1000, 5000), (5000, file.size)]
        good = digests.range_digests(file, ranges, n_threads=2)
        before = present()
        for n in (1, 2):
            with monkeypatch.context() as patch:
                Limit(patch, n, True)
                with pytest.raises(InternalError, match="no thread to hash the file in"):
                    digests.range_digests(file, ranges, n_threads=2)
            assert settled(before)
        assert digests.range_digests(file, ranges, n_threads=2) == good


def test_an_interrupt_of_a_start_is_an_interrupt(goldens_dir, monkeypatch):
    """What `Thread.start` waits in can make a RuntimeError of it."""

    def interrupted(thread):
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()

    before = present()
    with ModelFile(goldens_dir / "llama-Q4_0.gguf") as file, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(RuntimeError, match="release unlocked lock"):
            pool.submit(print)
        with pytest.raises(KeyboardInterrupt):
            digests.range_digests(file, [(0, 1000), (1000, file.size)], n_threads=2)
        with pytest.raises(KeyboardInterrupt):
            progress.submit(pool, print)
        with pytest.raises(KeyboardInterrupt):
            Rig()
    monkeypatch.undo()
    assert settled(before)


def test_a_bar_needs_no_thread(monkeypatch, capsys):
    Limit(monkeypatch, 1, True)
    before = present()
    shown = progress.bar(total=10, desc="it")
    shown.update(10)
    shown.close()
    assert list(progress.bar([1, 2])) == [1, 2] and "it" in capsys.readouterr().err
    assert present() == before


def test_native_threads_that_cannot_be_started(goldens_dir):
    """With little address space the stack of a thread has no room, which the system answers like too many threads."""
    script = f"""
        import gc, os, resource, sys, threading, time
        from worker_orcd import LLM, SamplingParams
        from worker_orcd.errors import WorkerError

        path = {str(goldens_dir / "llama-Q4_0.gguf")!r}
        with LLM(path, device="cpu", progress=False, n_threads=2, kv_cache_bytes=1 << 20) as model:
            ids = model.generate([[1, 2]], SamplingParams(max_tokens=5, seed=1))[0].token_ids
        before = len(os.listdir("/proc/self/task"))
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (160 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        threading.stack_size(1 << 20)  # of Python's threads, which there shall be
        try:
            LLM(path, device="cpu", progress=False, n_threads=200, kv_cache_bytes=1 << 20)
        except WorkerError as error:
            print(error.message)
        gc.collect()
        until = time.monotonic() + 5  # a thread that was joined may still be on its way out of the system's list
        while len(os.listdir("/proc/self/task")) > before and time.monotonic() < until:
            time.sleep(0.005)
        print(len(os.listdir("/proc/self/task")) <= before)
        with LLM(path, device="cpu", progress=False, n_threads=2, kv_cache_bytes=1 << 20) as model:
            print(model.generate([[1, 2]], SamplingParams(max_tokens=5, seed=1))[0].token_ids == ids)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    message, *rest = done.stdout.splitlines()
    assert message == "the system gives no 200 threads for the CPU engine: Resource temporarily unavailable"
    assert rest == ["True", "True"]
