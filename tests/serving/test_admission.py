"""Who gets a slot: order, passing with its limit, what is set aside, and that nobody starves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.models.plan import KvGroup
from worker_orcd.serving import admission
from worker_orcd.serving.admission import MAX_PASSED, MAX_SKIPPED, Admission
from worker_orcd.serving.work import SequenceState

FULL = KvGroup(0, (0,))


def sequence(seq_id: int, n_blocks: int) -> SequenceState:
    """One that needs `n_blocks` of a group without a window."""
    return SequenceState(seq_id, np.zeros(64 * n_blocks, np.int32), 1)


def queue(n_blocks: int, max_seqs: int, *needs: int, groups=(FULL,)) -> Admission:
    made = Admission(groups, (n_blocks,) * len(groups), max_seqs)
    for i, need in enumerate(needs):
        made.add(sequence(i, need))
    return made


def ids(seqs) -> list[int]:
    return [seq.seq_id for seq in seqs]


def test_in_order_where_all_fit():
    queued = queue(10, 4, 3, 1, 2, 3, 1)
    first = queued.admit()
    assert ids(first) == [0, 1, 2, 3] and queued.unreserved == [1] and queued.n_free_slots == 0
    assert [seq.reserved for seq in first] == [[3], [1], [2], [3]]
    assert sorted(seq.slot for seq in first) == [0, 1, 2, 3]
    queued.give_back(first[2])
    assert ids(queued.admit()) == [4]


def test_small_ones_pass_and_the_large_one_is_next_when_it_fits():
    queued = queue(4, 8, 3, 4, 1, 2, 1)
    running = queued.admit()
    assert ids(running) == [0, 2] and ids(queued.waiting.values()) == [1, 3, 4]
    assert [queued.waiting[i].n_passed for i in (1, 3, 4)] == [1, 0, 0]
    for seq in running:
        queued.give_back(seq)
    assert ids(queued.admit()) == [1]


def test_nobody_passes_where_no_slot_is_free():
    queued = queue(4, 1, 3, 4, 1)
    assert ids(queued.admit()) == [0]
    assert queued.outlook([sequence(9, 1)]) == (False, 1)
    assert [seq.n_passed for seq in queued.waiting.values()] == [0, 0]


def test_every_group_counts():
    """A window sets aside no more than it can hold; one group short is not enough."""
    groups = (FULL, KvGroup(24, (1,)))
    queued = Admission(groups, (10, 3), 4)
    queued.add(sequence(1, 9))
    queued.add(sequence(2, 1))
    assert ids(queued.admit()) == [1] and queued.unreserved == [1, 0]


def test_a_steady_stream_of_small_ones_does_not_starve_a_large_one():
    """Two small ones run at any time, so that the large one never fits by chance; it is admitted all the same."""
    queued = queue(4, 8, 1, 1)
    running = queued.admit()
    queued.add(sequence(-1, 4))
    next_id, passed = 100, 0
    while True:
        queued.add(sequence(next_id, 1))
        admitted = queued.admit()
        if -1 in ids(admitted):
            break
        passed += len(admitted)
        running += admitted
        next_id += 1
        if running:
            queued.give_back(running.pop(0))
        assert next_id < 1000
    assert passed == MAX_PASSED and not running
    assert queued.outlook([sequence(5, 1)])[0] is False, "it holds the whole cache"


def test_a_bar_goes_with_the_one_that_set_it():
    queued = queue(4, 8, 3, 2, 1)
    queued.waiting[1].n_passed = MAX_PASSED
    assert ids(queued.admit()) == [0]
    assert queued.outlook([sequence(9, 1)]) == (False, 1), "nothing passes"
    queued.withdraw(1)
    assert ids(queued.admit()) == [2]
    assert queued.withdraw(1) is None


def test_a_look_goes_past_no_more_than_it_may():
    queued = queue(4, 8, 3, *[2] * MAX_SKIPPED, 1)
    assert ids(queued.admit()) == [0]
    assert queued.outlook([sequence(999, 1)]) == (False, 1)
    queued.withdraw(1)
    assert ids(queued.admit()) == [MAX_SKIPPED + 1]


def test_nothing_is_looked_at_where_nothing_has_changed(monkeypatch):
    queued = queue(4, 8, 3, 2)
    seq = queued.admit()[0]
    monkeypatch.setattr(queued, "_need", lambda seq: pytest.fail("looked at the queue"))
    assert queued.admit() == []
    monkeypatch.undo()
    queued.give_back(seq)
    assert ids(queued.admit()) == [1]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 6)),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("withdraw"), st.integers(0, 20)),
        st.tuples(st.just("admit"), st.just(0)),
        st.tuples(st.just("ask"), st.integers(1, 6)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(6, 9), st.integers(1, 5), st.sampled_from([0, 1, 2, 4, 64]), st.sampled_from([1, 2, 5, 64]), EVENTS)
def test_whatever_happens_nobody_is_passed_too_often_and_all_get_their_turn(
    n_blocks, max_seqs, max_passed, max_skipped, events
):
    limits = admission.MAX_PASSED, admission.MAX_SKIPPED
    admission.MAX_PASSED, admission.MAX_SKIPPED = max_passed, max_skipped
    try:
        queued, running, order = Admission((FULL,), (n_blocks,), max_seqs), [], []
        withdrawn: set[int] = set()
        n_added = 0

        def admit():
            admitted = queued.admit()
            running.extend(admitted)
            order.extend(ids(admitted))
            assert queued.unreserved[0] == n_blocks - sum(seq.reserved[0] for seq in running) >= 0
            assert queued.n_free_slots == max_seqs - len(running) >= 0
            # the one that waits longest waits for something
            oldest = next(iter(queued.waiting.values()), None)
            assert oldest is None or not queued.n_free_slots or queued._need(oldest)[0] > queued.unreserved[0]

        for what, n in events:
            if what == "add":
                queued.add(sequence(n_added, n))
                n_added += 1
            elif what == "end" and running:
                queued.give_back(running.pop(n % len(running)))
            elif what == "withdraw" and queued.waiting:
                gone = queued.withdraw(list(queued.waiting)[n % len(queued.waiting)])
                withdrawn.add(gone.seq_id)
            elif what == "admit":
                admit()
            elif what == "ask":
                admit()
                arriving = [sequence(n_added, n), sequence(n_added + 1, 7 - n)]
                told = queued.outlook(arriving)
                for seq in arriving:
                    queued.add(seq)
                n_added += 2
                admit()
                started = [seq.seq_id in order for seq in arriving]
                if max_passed == max_skipped == 64:
                    assert told == (started[-1], started.count(False))
                assert told[0] or not started[-1], "what starts at once is never missed"
        for _ in range(10 * n_added + 1):
            admit()
            if running:
                queued.give_back(running.pop(0))
        assert not queued.waiting and not running, "all had their turn"
        assert sorted([*order, *withdrawn]) == list(range(n_added))
        for i, seq_id in enumerate(order):
            assert sum(later > seq_id for later in order[:i]) <= max_passed
    finally:
        admission.MAX_PASSED, admission.MAX_SKIPPED = limits
