"""The scheduler against made-up tokens: order, budgets, ownership of blocks, and that nothing is ever left over."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.fake_engine import STOP_ID
from helpers.scheduled import FULL, Fixed, check_empty, check_ownership, drain, make, run, sampling, sequence
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker_orcd.engine.kv_blocks import blocks_needed, blocks_of, blocks_within, window_blocks
from worker_orcd.errors import InvalidRequest, VramOom
from worker_orcd.models.plan import KvGroup, Plan
from worker_orcd.serving import admission
from worker_orcd.serving.work import DecodeWork, SequenceState, StepWork


def test_a_prompt_is_chunked_and_decoded_in_one_run():
    scheduler, engine = make(never_stop=True)
    seq = sequence(1, 70, 9)
    scheduler.add(seq)
    rows = []
    while (work := run(scheduler, engine)[0]) is not None:
        rows.append(work.n_steps if isinstance(work, DecodeWork) else len(work.batch.tokens))
    assert rows == [32, 32, 6, 8]  # the last prompt row brings the first token, 8 steps the rest
    assert seq.ended == "length" and seq.n_out == 9
    check_empty(scheduler)


def test_running_sequences_go_first_and_prompts_fill_the_rest():
    scheduler, engine = make(max_batch_tokens=16, never_stop=True)
    scheduler.add(sequence(1, 4, 40))
    run(scheduler, engine)
    scheduler.add(sequence(2, 40, 4))
    scheduler.add(sequence(3, 3, 4))
    for n_second, n_third in ((15, 0), (15, 0), (10, 3)):
        work, _ = run(scheduler, engine)
        assert work.batch.n_decode == 1 and work.chunks[0][0].seq_id == 1
        assert [n for _, n in work.chunks[1:]] == [n for n in (n_second, n_third) if n]
    assert [s.seq_id for s in work.outputs] == [1, 2, 3]


def test_prefill_limit_keeps_steps_short():
    scheduler, engine = make(max_batch_tokens=32)
    scheduler.pace = Fixed(5)
    scheduler.add(sequence(1, 12))
    assert len(run(scheduler, engine)[0].batch.tokens) == 5


def test_a_small_sequence_passes_a_large_one_that_does_not_fit_yet():
    scheduler, engine = make(n_blocks=(4,), never_stop=True)
    scheduler.add(sequence(1, 100, 28))  # 2 of 4 blocks
    scheduler.add(sequence(2, 150, 42))  # 3 blocks: waits
    scheduler.add(sequence(3, 10, 4))  # 1 block
    assert [s.seq_id for s in scheduler.admit()] == [1, 3]
    for seq in scheduler.running:
        engine.set_slot(seq.slot, sampling())
    assert [s.seq_id for s in drain(scheduler, engine)] == [3, 1, 2]


@pytest.mark.parametrize("groups", [(FULL,), (FULL, KvGroup(24, (1,)))])
@pytest.mark.parametrize("n_prompt", [1, 63, 64, 65, 100])
@pytest.mark.parametrize("max_tokens", [0, 1, 2, 29, 64, 65])
def test_what_is_reserved_is_what_is_used(groups, n_prompt, max_tokens):
    """The last token takes no place in the cache, and a limit of one block less would not do."""
    scheduler, engine = make(never_stop=True, groups=groups, n_blocks=(32,) * len(groups))
    seq = sequence(1, n_prompt, max_tokens)
    scheduler.add(seq)
    most, reserved = [0] * len(groups), []
    next_work = scheduler.next_work

    def watched():
        nonlocal most, reserved
        work = next_work()
        if work is not None:
            reserved, most = seq.reserved, [max(m, len(b)) for m, b in zip(most, seq.blocks, strict=True)]
        return work

    scheduler.next_work = watched
    drain(scheduler, engine)
    assert reserved[0] == most[0] == blocks_of(n_prompt + max(max_tokens - 1, 0))
    assert all(m <= r for m, r in zip(most, reserved, strict=True))


def test_ids_do_not_depend_on_who_passes_whom(monkeypatch):
    """The same sequences with and without passing, in several orders: each gets the same ids."""

    def ids_of(order, max_passed):
        monkeypatch.setattr(admission, "MAX_PASSED", max_passed)
        scheduler, engine = make(max_seqs=3, n_blocks=(5,), never_stop=True)
        ids = {i: [] for i in order}
        for i in order:
            scheduler.add(sequence(i, 20 + 61 * (i % 4), 9))
        started = []
        while scheduler.running or scheduler.n_waiting:
            before = {s.seq_id for s in scheduler.running}
            run(scheduler, engine, ids)
            started += [i for i in (s.seq_id for s in scheduler.running) if i not in before | set(started)]
        return ids, started

    wanted, in_order = ids_of(range(1, 13), 0)
    assert in_order == sorted(in_order) and all(len(ids) == 9 for ids in wanted.values())
    n_passed = 0
    for order in (range(1, 13), range(12, 0, -1), (4, 3, 8, 7, 12, 11, 1, 2, 5, 6, 9, 10)):
        ids, started = ids_of(order, 64)
        assert ids == wanted
        n_passed += started != list(order)
    assert n_passed, "or nothing was tested"


@pytest.mark.parametrize("groups", [(FULL,), (FULL, KvGroup(24, (1,)))])
def test_256_together_get_the_ids_that_each_gets_alone(groups):
    """In one step all of them decode; prompts come in chunks, and 44 of them when others have ended."""

    def ids_of(numbers, max_seqs):
        scheduler, engine = make(max_seqs, 320, n_blocks=(800,) * len(groups), groups=groups, never_stop=True)
        ids = {i: [] for i in numbers}
        for i in numbers:
            scheduler.add(sequence(i, 5 + 37 * i % 90, 90 + i % 40))
        most = 0
        while scheduler.running or scheduler.n_waiting:
            work, _ = run(scheduler, engine, ids)
            most = max(most, work.batch.n_decode if isinstance(work, StepWork) else len(work.seqs))
        return ids, most

    crowd, most = ids_of(range(1, 301), 256)
    assert most == 256 and all(len(crowd[i]) == 90 + i % 40 for i in crowd)
    for i in range(1, 301, 43):
        assert ids_of([i], 1)[0][i] == crowd[i]


def test_a_sequence_that_can_never_run_is_refused_with_numbers():
    scheduler, _ = make(context=256, n_blocks=(3,))
    scheduler.check(190, 3)
    with pytest.raises(VramOom, match="need 4 KV blocks of 64 positions; the KV cache has 3"):
        scheduler.check(190, 4)
    with pytest.raises(InvalidRequest, match="need 257 positions; the context has 256") as caught:
        scheduler.check(190, 67)
    assert caught.value.fields["field"] == "max_tokens"
    with pytest.raises(InvalidRequest) as caught:
        scheduler.check(256, 1)
    assert caught.value.fields["field"] == "prompt"
    scheduler.check(100, 93)
    assert scheduler.room_for(100) == 93


def test_logits_wanted_steps_one_token_at_a_time():
    scheduler, engine = make(never_stop=True)
    scheduler.add(sequence(1, 3, 4, want_logits=True))
    scheduler.add(sequence(2, 3, 4))
    works = []
    while (work := run(scheduler, engine)[0]) is not None:
        works.append(work)
    assert [type(w) for w in works] == [StepWork] * 4 and all(w.want_logits for w in works)


def test_forward_takes_turns_with_sampled_sequences():
    scheduler, engine = make(max_batch_tokens=16, never_stop=True)
    scheduler.add(sequence(1, 4, 20))
    scheduler.add(sequence(2, 40, 0))
    kinds = []
    while (work := run(scheduler, engine)[0]) is not None:
        kinds.append(type(work).__name__[0])
    assert "".join(kinds[:6]) == "SLSLSL" and kinds[-1] == "D"
    check_empty(scheduler)


def test_an_early_return_of_decode_changes_nothing():
    scheduler, engine = make()
    scheduler.add(sequence(1, 4, 20, stops=False))
    run(scheduler, engine)
    work = scheduler.next_work()
    assert scheduler.done_decode(work, np.empty((0, 1), np.int32)) == []
    assert scheduler.next_work().positions.tolist() == work.positions.tolist()


def test_tokens_past_the_end_do_not_count():
    """An engine that runs ahead may return steps after a stop id, or after a step that drew no token."""
    scheduler, engine = make(never_stop=True)
    seqs = [sequence(1, 4, 20), sequence(2, 4, 20), sequence(3, 4, 20, stops=False), sequence(4, 4, 20)]
    for seq in seqs:
        scheduler.add(seq)
    run(scheduler, engine)
    work = scheduler.next_work()
    ended = scheduler.done_decode(work, np.array([[5, STOP_ID, STOP_ID, 5], [6, 9, 9, -1], [7, 9, 9, 9]], np.int32))
    assert [(s.seq_id, s.ended, s.n_out) for s in ended] == [(2, "stop", 2), (4, "failed", 3)]
    assert [(s.n_past, s.n_out, s.last_token) for s in (seqs[0], seqs[2])] == [(7, 4, 7), (7, 4, 9)]
    check_ownership(scheduler)


def test_each_sequence_ends_at_its_own_tokens():
    scheduler, engine = make(never_stop=True)
    asked = [{}, {"stop_token_ids": (9, 7)}, {"stops": False, "stop_token_ids": (7,)}, {"stops": False}]
    seqs = [sequence(i + 1, 4, 20, **kw) for i, kw in enumerate(asked)]
    for seq in seqs:
        scheduler.add(seq)
    run(scheduler, engine)
    work = scheduler.next_work()
    lists = [work.stop_ids[a:b].tolist() for a, b in itertools.pairwise(work.stop_offsets.tolist())]
    assert lists == [[STOP_ID], [STOP_ID, 9, 7], [7], []]
    assert work.stop_ids.dtype == work.stop_offsets.dtype == np.int32
    ended = scheduler.done_decode(work, np.array([[7, 5, STOP_ID, 7], [9, 7, 9, 9], [STOP_ID, 9, 7, 9]], np.int32))
    assert [(s.seq_id, s.ended, s.n_out, s.last_token) for s in ended] == [
        (1, "stop", 4, STOP_ID),
        (2, "stop", 3, 7),
        (3, "stop", 4, 7),
    ]
    for token, ends in ((7, True), (STOP_ID, False), (9, False)):
        scheduler, engine = make()
        seq = sequence(1, 4, 20, stops=False, stop_token_ids=(7,))
        scheduler.add(seq)
        scheduler.admit()
        assert bool(scheduler.done_step(scheduler.next_work(), [token])) is ends, "the first token may be the last"
        assert seq.ended == ("stop" if ends else None)


@pytest.mark.parametrize("window", [1, 2, 24, 64, 65, 128, 300])
def test_windowed_group_returns_what_fell_out_of_the_window(window):
    group = KvGroup(window, (0,))
    need = window_blocks(window)
    scheduler, engine = make(
        max_batch_tokens=96, context=1024, n_blocks=(need, 16), groups=(group, FULL), never_stop=True
    )
    seq = sequence(1, 500, 400)
    assert blocks_needed(group, seq.n_positions) == need
    scheduler.add(seq)
    most = 0
    while run(scheduler, engine)[0] is not None:
        most = max(most, len(seq.blocks[0]) if seq.blocks else 0)
    assert seq.ended == "length" and most <= need
    check_empty(scheduler)


def test_a_chunk_borrows_spare_blocks_of_a_windowed_group():
    group = KvGroup(24, (0,))
    scheduler, engine = make(max_batch_tokens=256, context=1024, n_blocks=(8,), groups=(group,), never_stop=True)
    scheduler.add(sequence(1, 600, 2))
    assert len(run(scheduler, engine)[0].batch.tokens) == 256
    scheduler, engine = make(max_batch_tokens=256, context=1024, n_blocks=(3,), groups=(group,), never_stop=True)
    scheduler.add(sequence(1, 600, 2))
    assert len(run(scheduler, engine)[0].batch.tokens) == 192


GROUPS = st.lists(st.sampled_from([0, 1, 24, 64, 100]), min_size=1, max_size=2).map(
    lambda ws: tuple(KvGroup(w, (i,)) for i, w in enumerate(ws))
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 200), st.integers(0, 90), st.booleans()),
        st.tuples(st.just("run"), st.integers(1, 6)),
        st.tuples(st.just("drop"), st.integers(0, 30)),
        st.tuples(st.just("rows"), st.integers(1, 64)),
    ),
    max_size=25,
)


@settings(max_examples=120, deadline=None)
@example((KvGroup(0, (0,)),), 1, 5, [1, 1], [("add", 6, 0, False), ("rows", 6)])  # scored, more than a step has
@given(GROUPS, st.integers(1, 5), st.integers(5, 64), st.lists(st.integers(1, 12), min_size=2, max_size=2), ACTIONS)
def test_whatever_happens_nothing_is_lost(groups, max_seqs, max_batch_tokens, n_blocks, actions):
    """Any mix of submissions, runs and cancels: ownership holds, budgets hold, all is freed, all end."""
    scheduler, engine = make(max_seqs, max_batch_tokens, 256, tuple(n_blocks[: len(groups)]), groups)
    all_seqs: list[SequenceState] = []
    admitted_order = []

    admit = scheduler.admit

    def noting_admit():
        admitted = admit()
        admitted_order.extend(s.seq_id for s in admitted)
        return admitted

    scheduler.admit = noting_admit
    for action in actions:
        if action[0] == "add":
            seq = sequence(len(all_seqs) + 1, *action[1:3], stops=action[3])
            try:
                scheduler.check(seq.n_prompt, seq.max_tokens)
            except (InvalidRequest, VramOom):
                continue
            all_seqs.append(seq)
            scheduler.add(seq)
        elif action[0] == "run":
            for _ in range(action[1]):
                run(scheduler, engine)
        elif action[0] == "drop" and all_seqs:
            seq = all_seqs[action[1] % len(all_seqs)]
            alive = seq.ended is None
            assert scheduler.drop(seq.seq_id) == alive
            check_ownership(scheduler)
        elif action[0] == "rows":
            scheduler.pace = Fixed(action[1])
    drain(scheduler, engine)
    assert len(admitted_order) == len(set(admitted_order))
    assert engine.n_rows_seen <= max_batch_tokens
    for seq in all_seqs:
        assert seq.ended in ("stop", "length", "dropped")
        if seq.ended == "length":
            assert seq.n_out == seq.max_tokens
        if seq.ended == "stop":
            assert seq.stops and seq.last_token == STOP_ID


def plan_of(*groups: KvGroup) -> Plan:
    n_layer = sum(len(g.layers) for g in groups)
    return Plan("x", 10, 8, n_layer, 2, 32, 1024, None, {}, {}, (), groups, ())


def test_blocks_within_a_budget():
    size = 64 * 2 * 2 * 32 * 2  # one layer
    plan = plan_of(FULL)
    assert blocks_within(plan, 10 * size, 4, 64, 1024) == (10,)
    assert blocks_within(plan, 10 * size - 1, 4, 64, 1024) == (9,)
    assert blocks_within(plan, 10**9, 4, 64, 1024) == (64,)  # 4 sequences of 16 blocks use no more
    assert blocks_within(plan, size - 1, 4, 64, 1024) == (0,)
    two = plan_of(KvGroup(0, (0,)), KvGroup(24, (1, 2)))
    assert blocks_within(two, 10**9, 4, 128, 1024) == (64, 4 * window_blocks(24) + 2)
    full, windowed = blocks_within(two, 30 * size, 4, 128, 1024)
    assert full * size + windowed * 2 * size <= 30 * size and full >= windowed > 0


@given(st.integers(1, 400), st.integers(0, 2000))
def test_window_blocks_cover_every_alignment(window, n_past):
    first = max(n_past - window + 1, 0) // 64
    assert blocks_of(n_past + 64) - first <= window_blocks(window)


# -- frequency tables by length: sequences that grow past a limit


def drawn(prompt, max_tokens, rope_limits, groups=(FULL,), n_blocks=(64,), others=0):
    """The ids that a sequence gets beside `others`; the engine checks at each step what every row sees."""
    scheduler, engine = make(max_seqs=8, groups=groups, n_blocks=n_blocks, never_stop=True, rope_limits=rope_limits)
    seq = SequenceState(100, np.array(prompt, np.int32), max_tokens, sampling())
    for i in range(others):
        scheduler.add(sequence(i, 20 + 30 * i, 60))
    scheduler.add(seq)
    ids = []
    while seq.ended is None:
        run(scheduler, engine, {100: ids})
        assert all(s.rope_table == engine.rope_tables[s.slot] for s in scheduler.running)
    assert seq.ended == "length" and seq.n_out == len(ids) == max_tokens
    while scheduler.running or scheduler.n_waiting:
        run(scheduler, engine)
    check_empty(scheduler)
    return ids


@pytest.mark.parametrize("others", [0, 4])
@pytest.mark.parametrize("groups", [(FULL,), (KvGroup(48, (0,)),), (FULL, KvGroup(48, (1,)))])
def test_a_sequence_that_grows_past_a_limit_is_recomputed_under_the_next_table(groups, others):
    """Until then it is as without a limit, afterwards what a prompt of the same tokens is; neighbours see nothing."""
    n_blocks, prompt, limits = (64,) * len(groups), [3, 1, 4, 1, 5] * 14, (100,)
    ids = drawn(prompt, 80, limits, groups, n_blocks, others)
    n_before = limits[0] - len(prompt) + 1
    assert ids[:n_before] == drawn(prompt, n_before, (), groups, n_blocks)
    assert ids[n_before:] == drawn(prompt + ids[:n_before], 80 - n_before, limits, groups, n_blocks)
    assert ids[n_before:] != drawn(prompt + ids[:n_before], 80 - n_before, (), groups, n_blocks)


@pytest.mark.parametrize("limits", [(80, 120), (99, 100), (64, 128)])
def test_a_sequence_can_grow_past_several_limits(limits):
    prompt = [3, 1, 4, 1, 5] * 12
    ids = drawn(prompt, 90, limits)
    for low, high in ((0, limits[0]), limits, (limits[1], 150)):
        known = max(low + 1 - len(prompt), 0)
        until = min(high + 1 - len(prompt), 90)
        assert ids[known:until] == drawn(prompt + ids[:known], until - known, limits)


@pytest.mark.parametrize("n_prompt", [98, 99, 100, 101, 102])
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_what_a_sequence_gets_does_not_depend_on_how_long_it_might_become(n_prompt, max_tokens):
    prompt = [i % 48 + 1 for i in range(n_prompt)]
    assert drawn(prompt, max_tokens, (100,)) == drawn(prompt, 30, (100,))[:max_tokens]


def test_a_teacher_forced_sequence_takes_the_table_of_its_length():
    scheduler, engine = make(rope_limits=(100,))
    for seq_id, n in ((1, 100), (2, 101)):
        scheduler.add(sequence(seq_id, n, 0))
    scheduler.admit()
    assert [(s.seq_id, s.rope_table) for s in scheduler.running] == [(1, 0), (2, 1)]
    while scheduler.running:
        run(scheduler, engine)
