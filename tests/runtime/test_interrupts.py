"""Ctrl-C at any moment of a load and of calls: nothing hangs, and nothing is left of what was interrupted.

A signal of a timer stands in for Ctrl-C, since it can be aimed: its handler raises in the main thread like the one of
SIGINT. It runs in a process of its own, whose threads, descriptors and children are counted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest
from helpers.gguf_forge import STR, tiny_llama

#: interrupts of each kind; the script takes any number
N_INTERRUPTS = 200
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"

SCRIPT = """
    import faulthandler, gc, os, random, signal, sys, threading, time
    from worker_orcd import LLM, SamplingParams

    path, n, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    sys.unraisablehook = lambda _: None  # an interrupt inside of __del__ is lost, says Python

    def interrupted(call, after):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, after)
                call()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            return True
        return False

    def present():
        children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
        return (threading.active_count(), len(os.listdir("/proc/self/task")),
                len(os.listdir("/proc/self/fd")), len(children))

    def settle(before, what):
        faulthandler.cancel_dump_traceback_later()  # it has a thread
        until = time.monotonic() + 10
        while any(now > then for now, then in zip(present(), before)):
            gc.collect()
            assert time.monotonic() < until, (what, present(), before)
            time.sleep(0.005)

    def run(name, call, check=lambda: None):
        call()
        began = time.perf_counter()
        call()
        span = time.perf_counter() - began
        before, n_hit = present(), 0
        while n_hit < n:
            faulthandler.dump_traceback_later(30, exit=True)  # what hangs shows where
            n_hit += interrupted(call, max(1e-6, draw.random() * span))
            if n_hit % 50 == 49:
                check()
        check()
        settle(before, name)
        print(name, n_hit, flush=True)

    def load():
        with LLM(path, device="cpu", progress=False, n_threads=2):
            pass

    load()
    run("load", load)
    model = LLM(path, device="cpu", progress=False, n_threads=2)
    ids = model.generate(["abba"], params)[0].token_ids
    logits = model.logits([1, 2, 3])

    def check():
        assert model.generate(["abba"], params)[0].token_ids == ids
        assert (model.logits([1, 2, 3]) == logits).all()

    def chat():
        n = draw.randrange(1, 20)  # an answer to the question before would have another length
        assert model.chat([{"role": "user", "content": "a" * n}], params).tokens_in == n

    run("generate", lambda: model.generate(["abba", [1, 2]], params), check)
    run("stream", lambda: list(model.stream("abba", params)), check)
    run("chat", chat, check)
    run("logits", lambda: model.logits([1, 2, 3]), check)
    until = time.monotonic() + 10
    while model._loop._entries or model._loop._jobs or model._scheduler.running:
        assert time.monotonic() < until, "a job is left"
        time.sleep(0.005)
    assert model._scheduler.n_free_slots == model._scheduler.config.max_seqs
    model.close()

    def close_in_pieces():
        model = LLM(path, device="cpu", progress=False, n_threads=2)
        try:
            model.close()
        finally:
            model.close()  # what an interrupt left of it

    run("close", close_in_pieces)
"""


def interrupts(path, n: int, seed: int) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(SCRIPT)
    return subprocess.run(
        [sys.executable, "-c", script, str(path), str(n), str(seed)],
        capture_output=True, text=True, timeout=120 + n, check=False,
    )  # fmt: skip


@pytest.mark.timeout(120)
def test_interrupts_at_any_moment(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_llama().put("tokenizer.chat_template", STR, TEMPLATE).build())
    done = interrupts(path, N_INTERRUPTS, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"\w+", done.stdout) == [
        word for name in ("load", "generate", "stream", "chat", "logits", "close") for word in (name, str(N_INTERRUPTS))
    ]
