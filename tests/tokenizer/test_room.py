"""Long texts are tokenized few at a time, and what they took goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from helpers.patience import SANITIZED, patient

from worker_orcd.tokenizer import library
from worker_orcd.tokenizer.room import FREE, Room
from worker_orcd.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(patient(60))


def in_threads(n, work):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_only_so_much_at_once_and_every_text_gets_its_turn():
    room, inside, most, done = Room(10 * FREE), [], [], []

    def take(i):
        size = (2 * FREE, 5 * FREE, 100 * FREE)[i % 3]
        with room.for_text(size):
            inside.append(min(size, 10 * FREE))
            most.append(sum(inside))
            time.sleep(0.002)
            inside.remove(min(size, 10 * FREE))
        done.append(i)

    in_threads(60, take)
    assert len(done) == 60 and 5 * FREE < max(most) <= 10 * FREE


def test_short_texts_wait_for_nothing_and_a_failure_leaves_the_room():
    room = Room(2 * FREE)
    with pytest.raises(KeyError), room.for_text(3 * FREE):
        raise KeyError
    outcome = []

    def fail(i):
        try:
            with room.for_text(3 * FREE):
                outcome.append(i)
                raise KeyError
        except KeyError:
            pass

    in_threads(3, fail)
    assert sorted(outcome) == [0, 1, 2]
    holds, go = threading.Event(), threading.Event()

    def hold(_):
        with room.for_text(3 * FREE):
            holds.set()
            go.wait(patient(10))

    holder = threading.Thread(target=hold, args=(0,))
    holder.start()
    assert holds.wait(patient(5))
    in_threads(1, lambda _: [outcome.append(n) for n in (7,) if room.for_text(FREE).__enter__() is None])
    with room.for_text(3 * FREE):  # of the main thread, which could be interrupted in the block
        assert outcome[-1] == 7
    go.set()
    holder.join()


MEMORY = """
import sys, threading
from worker_orcd.tokenizer.tokenizer import Tokenizer

def mib(field):
    (line,) = (one for one in open("/proc/self/status") if one.startswith(field))
    return int(line.split()[1]) / 1024

tokenizer = Tokenizer.from_file(sys.argv[1])
text, ids = "1 " * 200_000, []
tokenizer.encode(text)
before = mib("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak is that from now on
threads = [threading.Thread(target=lambda: ids.append(len(tokenizer.encode(text)))) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert ids == [200_001] * 8, ids
print(mib("VmHWM:") - before, mib("VmRSS:") - before)
"""


def test_long_texts_of_many_threads_take_the_memory_of_one(goldens_dir):
    command = [sys.executable, "-c", MEMORY, str(goldens_dir / "tokenizers" / "gpt-2.gguf")]
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(50), check=False, env=env)
    assert done.returncode == 0, done.stderr
    peak, kept = map(float, done.stdout.split())
    assert SANITIZED or peak < 300, "one takes 90 MiB, eight at once would take 700"
    assert SANITIZED or kept < 60, "it goes back"


def test_no_shorter_text_waits_for_a_long_one(goldens_dir):
    tokenizer, n_ids = Tokenizer.from_file(goldens_dir / "tokenizers" / "gpt-2.gguf"), []
    holds, go = threading.Event(), threading.Event()

    def hold():
        with library._LONG_ROOM.for_text(1 << 20):
            holds.set()
            go.wait(patient(10))

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(patient(5))
    in_threads(3, lambda _: n_ids.append(len(tokenizer.encode("1 " * 20_000))))
    long = threading.Thread(target=lambda: n_ids.append(len(tokenizer.encode("1 " * 40_000))))
    long.start()
    time.sleep(0.1)
    assert n_ids == [20_001] * 3, "and another long one waits"
    go.set()
    long.join()
    holder.join()
    assert n_ids[3] == 40_001
