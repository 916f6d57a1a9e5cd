"""A process forked from one that has a model: every call says so at once, and its end touches nothing of the parent."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest

from worker_orcd import LLM, SamplingParams
from worker_orcd.errors import EngineGone

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
LONG = SamplingParams(max_tokens=200, seed=1, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(goldens_dir):
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, n_threads=2) as loaded:
        yield loaded


def in_child(check, limit: float = 10.0) -> None:
    """Run `check` in a forked child; what it raises fails here, and so does a child that hangs."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            check()
            os.write(write, b"fine")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    killer = threading.Timer(limit, os.kill, (pid, 9))
    killer.start()
    said = os.read(read, 4096).decode()
    os.waitpid(pid, 0)
    killer.cancel()
    os.close(read)
    assert said == "fine", said or "it hangs"


CALLS = {
    "generate": lambda m, s, j: m.generate(["a"], LONG),
    "stream": lambda m, s, j: m.stream("a", LONG),
    "chat": lambda m, s, j: m.chat(MESSAGES),
    "logits": lambda m, s, j: m.logits([1, 2]),
    "submit": lambda m, s, j: m.submit("a"),
    "job": lambda m, s, j: m.job("x"),
    "cancel": lambda m, s, j: m.cancel("x"),
    "check_residency": lambda m, s, j: m.check_residency(),
    "digest": lambda m, s, j: m.digest(),
    "shutdown": lambda m, s, j: m.shutdown(1.0),
    "next": lambda m, s, j: next(s),
    "Job.next_event": lambda m, s, j: j.next_event(),
    "Job.completion": lambda m, s, j: j.completion(),
    "Job.cancel": lambda m, s, j: j.cancel(),
}


def test_every_call_names_the_fork(model):
    stream, job = model.stream([1, 2], LONG), model.submit([1, 2], LONG)
    next(stream)

    def check() -> None:
        for name, call in CALLS.items():
            began = time.monotonic()
            try:
                call(model, stream, job)
            except EngineGone as error:
                assert f"process {os.getppid()}" in error.message and "spawn" in error.message, (name, error.message)
            else:
                raise AssertionError(f"{name} raises nothing")
            assert time.monotonic() - began < 1, name

    in_child(check)
    assert len(job.completion().token_ids) == 200, "the parent's job goes on"
    assert sum(len(p.token_ids) for p in stream) >= 100


def test_locks_that_were_held_at_the_fork_hang_nothing(model):
    stream = model.stream([1, 2], LONG)

    def check() -> None:
        for call in CALLS.values():
            with pytest.raises(EngineGone):
                call(model, stream, stream.job)
        stream.close()
        model.close()

    with model._loop._lock, stream.job._feeding, model._running._lock:
        in_child(check)
    stream.close()


def test_leaving_in_the_child_does_nothing(model):
    stream = model.stream([1, 2], LONG)

    def leave() -> None:
        with model, stream:
            pass
        stream.close()
        stream.__del__()
        model.close()
        model._finalizer()

    in_child(leave)
    assert len(model.generate([[1, 2]], LONG)[0].token_ids) == 200
    assert len(stream.job.completion().token_ids) == 200, "the child cancelled nothing"


def test_multiprocessing_by_fork_ends_with_the_error(model):
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def work() -> None:
        try:
            model.generate(["a"], LONG)
        except EngineGone as error:
            answers.put(error.message)

    child = context.Process(target=work)
    child.start()
    child.join(10)
    assert child.exitcode == 0 and "forked" in answers.get()


def test_a_child_loads_its_own(model, goldens_dir):
    want = model.generate([[1, 2]], LONG)[0].token_ids

    def check() -> None:
        with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, n_threads=2) as own:
            assert own.generate([[1, 2]], LONG)[0].token_ids == want

    in_child(check, 30)


def test_a_child_exits_in_silence(goldens_dir):
    script = f"""
        import os, sys
        from worker_orcd import LLM, SamplingParams
        llm = LLM({str(goldens_dir / "llama-Q4_0.gguf")!r}, device="cpu", progress=False, n_threads=2)
        params = SamplingParams(max_tokens=200, seed=1, ignore_eos=True)
        stream = llm.stream([1], params)
        next(stream)
        if os.fork() == 0:
            sys.exit(0)  # with everything that runs at the end of a process
        assert os.wait()[1] == 0
        print(sum(len(p.token_ids) for p in stream) > 100, len(llm.generate([[1]], params)[0].token_ids))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 200\n", "")
