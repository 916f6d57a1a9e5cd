"""The token ring and the control flag: order, waiting, closing, many threads."""

import threading
import time

import pytest
from helpers.patience import patient, turns_of_another_thread

from worker_orcd._ring import Control, TokenRing


def test_order_and_emptiness():
    ring = TokenRing(8)
    for i in range(5):
        ring.put(i, -i)
    assert len(ring) == 5
    assert ring.pop(0) == [(i, -i) for i in range(5)]
    assert ring.pop(0) == [] and len(ring) == 0


def test_wraps_around():
    ring = TokenRing(3)
    for i in range(10):
        ring.put(i, i)
        ring.put(i + 100, i)
        assert ring.pop(0) == [(i, i), (i + 100, i)]


def test_extreme_numbers():
    ring = TokenRing(2)
    ring.put(2**63 - 1, 2**31 - 1)
    ring.put(-(2**63), -(2**31))
    assert ring.pop(0) == [(2**63 - 1, 2**31 - 1), (-(2**63), -(2**31))]
    for bad in ((2**63, 0), (0, 2**31)):
        with pytest.raises(OverflowError):
            ring.put(*bad)


def test_many_at_once():
    ring = TokenRing(4)
    ring.put_many([1, 2, 3], [10, 20, -5])
    ring.put_many([], [])
    assert ring.pop(0) == [(1, 10), (2, 20), (3, -5)]
    with pytest.raises(ValueError, match="2 sequences, but 1 tokens"):
        ring.put_many([1, 2], [3])
    # more than there is room for: in parts, as they are taken out
    pusher = threading.Thread(target=ring.put_many, args=(range(10), range(10)))
    pusher.start()
    taken = []
    while len(taken) < 10:
        taken += ring.pop(patient(5))
    pusher.join()
    assert taken == [(n, n) for n in range(10)]
    ring.close()
    with pytest.raises(RuntimeError, match="closed"):
        ring.put_many([1], [1])


@pytest.mark.parametrize("capacity", [0, -1, 2**24 + 1])
def test_bad_capacity(capacity):
    with pytest.raises(ValueError):
        TokenRing(capacity)


def test_pop_times_out_and_releases_the_gil():
    ring = TokenRing()
    start = time.monotonic()
    assert ring.pop(0.15) == []
    assert time.monotonic() - start >= 0.14
    assert turns_of_another_thread(lambda: ring.pop(0.05), enough=5) >= 5
    assert ring.pop(-1) == []
    with pytest.raises(ValueError):
        ring.pop(float("nan"))


def test_full_ring_blocks_the_pusher():
    ring = TokenRing(2)
    ring.put(0, 0)
    ring.put(1, 1)
    t = threading.Thread(target=ring.put, args=(2, 2))
    t.start()
    t.join(0.05)
    assert t.is_alive()
    assert ring.pop(1) == [(0, 0), (1, 1)]
    t.join(patient(5))
    assert not t.is_alive() and ring.pop(1) == [(2, 2)]


def test_close_wakes_everybody():
    ring = TokenRing(1)
    ring.put(7, 7)
    outcomes = []

    def pusher():
        try:
            ring.put(8, 8)
        except RuntimeError as e:
            outcomes.append(str(e))

    threads = [threading.Thread(target=pusher) for _ in range(3)]
    for t in threads:
        t.start()
    time.sleep(0.05)
    ring.close()
    ring.close()
    for t in threads:
        t.join(patient(5))
    assert outcomes == ["the token ring is closed"] * 3 and ring.closed
    assert ring.pop(10) == [(7, 7)]
    start = time.monotonic()
    assert ring.pop(patient(10)) == [] and time.monotonic() - start < patient(1)


def test_close_wakes_a_popper():
    ring = TokenRing()
    got = []
    t = threading.Thread(target=lambda: got.append(ring.pop(60)))
    t.start()
    time.sleep(0.02)
    ring.close()
    t.join(patient(5))
    assert got == [[]]


def test_many_pushers_and_poppers_lose_nothing():
    ring = TokenRing(64)
    n_pushers, n_each = 4, 3000
    got: list[tuple[int, int]] = []
    lock = threading.Lock()

    def push(seq):
        for i in range(n_each):
            ring.put(seq, i)

    def pop():
        while True:
            entries = ring.pop(0.5)
            if not entries and ring.closed:
                return
            with lock:
                got.extend(entries)

    pushers = [threading.Thread(target=push, args=(s,)) for s in range(n_pushers)]
    poppers = [threading.Thread(target=pop) for _ in range(2)]
    for t in pushers + poppers:
        t.start()
    for t in pushers:
        t.join()
    ring.close()
    for t in poppers:
        t.join(patient(5))
    assert sorted(got) == [(s, i) for s in range(n_pushers) for i in range(n_each)]


def test_one_popper_sees_each_sequence_in_order():
    ring = TokenRing(16)
    threads = [threading.Thread(target=lambda s=s: [ring.put(s, i) for i in range(1000)]) for s in range(3)]
    for t in threads:
        t.start()
    seen = {0: [], 1: [], 2: []}
    while sum(map(len, seen.values())) < 3000:
        for seq, token in ring.pop(patient(5)):
            seen[seq].append(token)
    for t in threads:
        t.join()
    assert all(v == list(range(1000)) for v in seen.values())


@pytest.mark.parametrize("capacity", [100, 65536])
def test_steps_of_256_sequences_come_out_in_order(capacity):
    """Also through a ring that does not hold a whole step, and more of them than one look takes out."""
    n_seqs, n_steps = 256, 60
    ring = TokenRing(capacity)

    def push():
        for step in range(n_steps):
            ring.put_many(range(n_seqs), [step * n_seqs + seq for seq in range(n_seqs)])

    pusher = threading.Thread(target=push)
    pusher.start()
    seen: list[tuple[int, int]] = []
    while len(seen) < n_seqs * n_steps:
        found = ring.pop(patient(5))
        assert 0 < len(found) <= 4096
        seen += found
    pusher.join()
    assert seen == [(n % n_seqs, n) for n in range(n_seqs * n_steps)] and len(ring) == 0


def test_control():
    control = Control()
    assert control.interrupted is False
    t = threading.Thread(target=control.interrupt)
    t.start()
    t.join()
    assert control.interrupted is True
    control.clear()
    assert control.interrupted is False


def test_an_abort_is_an_interrupt_that_only_clear_takes_back():
    control = Control()
    control.interrupt()
    assert not control.aborted
    control.abort()
    control.interrupt()
    assert control.interrupted and control.aborted
    control.clear()
    assert not control.interrupted and not control.aborted


def test_steps_are_counted():
    control = Control()
    assert control.n_steps == 0
    control.step_done()
    control.interrupt()
    control.clear()
    control.step_done()
    assert control.n_steps == 2
