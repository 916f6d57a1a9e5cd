"""Prefixes that sequences share: what is computed, who waits, what is set aside, and that nothing changes an id.

The fake engine draws other tokens where the KV of a prompt is not what its own tokens wrote. What was generated and
comes back is in `test_cached_answers.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fake_engine import STOP_ID
from helpers.scheduled import (
    BOTH,
    FULL,
    SLIDING,
    Fixed,
    admit,
    alone,
    check_cache,
    check_empty,
    check_ownership,
    drain,
    finish,
    make,
    n_computed,
    of,
    run,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.errors import InvalidRequest, VramOom
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.prefix_cache import MIN_PART
from worker_orcd.serving.seq_blocks import WORTH_WAITING
from worker_orcd.serving.work import DecodeWork, LogitsWork, SequenceState, StepWork

# -- hits


@pytest.mark.parametrize("groups", [(FULL,), BOTH, SLIDING, (FULL, KvGroup(1, (1,)))])
@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("n_prompt", [63, 64, 65, 128, 129, 200])
def test_a_second_prompt_computes_only_its_last_block(groups, parts, n_prompt):
    """With copies only its last token; and the next one, of other draws, is no different."""
    scheduler, engine = make(groups=groups, n_blocks=(32,) * len(groups), never_stop=True, parts=parts)
    prompt = words(1, n_prompt)
    first = of(1, prompt)
    assert finish(scheduler, engine, first) == [alone(first, groups)]
    assert n_computed(engine) == n_prompt and first.n_cached == 0
    for seq in (of(2, prompt), of(3, prompt, seed=9)):
        assert finish(scheduler, engine, seq) == [alone(seq, groups)]
        blocks = (n_prompt - 1) // BLOCK_SIZE * BLOCK_SIZE
        left = 1 if parts and n_prompt - 1 - blocks >= MIN_PART else n_prompt - blocks
        assert n_computed(engine) == left and seq.n_cached == n_prompt - left
    check_empty(scheduler)


@pytest.mark.parametrize("n_common", [0, MIN_PART - 1, MIN_PART, 40, 63, 64, 64 + MIN_PART - 1, 100, 128])
@pytest.mark.parametrize("groups", [(FULL,), BOTH, SLIDING])
def test_prompts_share_what_they_have_in_common_and_no_more(groups, n_common):
    scheduler, engine = make(groups=groups, n_blocks=(32,) * len(groups), never_stop=True)
    common = words(1, n_common)
    first, second = of(1, common, [1, *words(2, 99)]), of(2, common, [2, *words(3, 99)])
    assert finish(scheduler, engine, first) == [alone(first, groups)]
    n_computed(engine)
    assert finish(scheduler, engine, second) == [alone(second, groups)]
    shared = n_common if n_common % BLOCK_SIZE >= MIN_PART else n_common // BLOCK_SIZE * BLOCK_SIZE
    assert (second.n_cached, n_computed(engine)) == (shared, second.n_prompt - shared)


def test_the_longest_start_is_copied():
    scheduler, engine = make(never_stop=True)
    common = words(1, 60)
    for i, n in enumerate((20, 50, 30)):
        finish(scheduler, engine, of(i, common[:n], [i + 1] * 60))
    seq = of(9, common)
    assert finish(scheduler, engine, seq) == [alone(seq)]
    assert seq.n_cached == 50 and engine.n_copied == 2 * 1 + 1


def test_a_teacher_forced_sequence_takes_nothing_and_leaves_its_blocks():
    scheduler, engine = make(never_stop=True)
    prompt = words(1, 150)
    for i in range(2):
        finish(scheduler, engine, of(i, prompt, max_tokens=0))
        assert n_computed(engine) == 150
    assert scheduler.pools[0].n_kept == 3, "the second has left no copies"
    seq = of(5, prompt)
    assert finish(scheduler, engine, seq) == [alone(seq)] and seq.n_cached == 149
    stats = scheduler.cache_stats()
    assert (stats.query_tokens, stats.hit_tokens) == (150, 149)


def test_a_chunk_of_one_token_is_a_prompt_row():
    scheduler, engine = make(max_batch_tokens=8, never_stop=True)
    scheduler.pace = Fixed(1)
    seq, later = of(1, words(1, 70)), of(2, words(1, 70))
    assert finish(scheduler, engine, seq) == [alone(seq)]
    assert finish(scheduler, engine, later) == [alone(later)] and later.n_cached == 64


def test_no_cache_computes_everything():
    scheduler, engine = make(never_stop=True, prefix_cache=False)
    for i in range(3):
        seq = of(i, words(1, 150))
        assert finish(scheduler, engine, seq) == [alone(seq)]
        assert n_computed(engine) == 150 and seq.n_cached == 0
    assert scheduler.cache_stats().n_cached_blocks == scheduler.cache_stats().query_tokens == 0


# -- windows: a hit needs what is still read, and leaves what is not


def test_a_windowed_group_needs_only_what_its_window_reads():
    """The start of the prompt is gone from the windowed pool; its end, and all of the full group, is a hit."""
    scheduler, engine = make(groups=BOTH, n_blocks=(32, 4), never_stop=True, parts=False)
    prompt = words(1, 400)
    finish(scheduler, engine, of(1, prompt))
    assert engine.n_copied == 0 and scheduler.pools[1].n_kept == 3 < 400 // BLOCK_SIZE
    n_computed(engine)
    seq = of(2, prompt, words(3, 30))
    assert finish(scheduler, engine, seq) == [alone(seq, BOTH)]
    assert seq.n_cached == 384 and n_computed(engine) == 430 - 384
    early = of(3, prompt[:200], words(4, 30))  # what a query at 192 reads is there no more
    assert finish(scheduler, engine, early) == [alone(early, BOTH)]
    assert early.n_cached == 0


def test_blocks_that_the_window_has_passed_are_there_for_others():
    scheduler, engine = make(groups=BOTH, n_blocks=(32, 16), never_stop=True)
    seq = of(1, words(1, 300), max_tokens=50)
    scheduler.add(seq)
    while seq.n_out == 0:
        run(scheduler, engine)
    assert sorted(seq.blocks[1]) == [3, 4] and scheduler.pools[1].n_kept == 5
    other = of(2, words(1, 140))
    assert finish(scheduler, engine, other)[0] == alone(other, BOTH) and other.n_cached == 139
    drain(scheduler, engine)


# -- frequency tables by length


@pytest.mark.parametrize("n_common", [BLOCK_SIZE + 60, 2 * BLOCK_SIZE - 2])
def test_a_copied_part_frees_what_the_window_has_passed(n_common):
    """A sequence that has all that the pool holds set aside takes no block beyond it."""
    groups, n_blocks = SLIDING, 3  # what one sequence needs
    first, second = of(1, words(1, n_common), words(2, 30)), of(2, words(1, n_common), words(3, 300))
    scheduler, engine = make(groups=groups, n_blocks=(n_blocks,), max_batch_tokens=400, never_stop=True)
    finish(scheduler, engine, first)
    expected = alone(second, groups)
    assert finish(scheduler, engine, second) == [expected]
    assert second.n_cached == n_common, "a whole block and a part"
    check_empty(scheduler)


def test_sequences_of_other_frequency_tables_share_nothing():
    scheduler, engine = make(never_stop=True, rope_limits=(150,))
    short, long = of(1, words(1, 140)), of(2, words(1, 140), words(2, 40))
    for seq in (short, long, of(3, words(1, 149)), of(4, words(1, 140), words(3, 40))):
        wanted = alone(seq, rope_limits=(150,))
        assert finish(scheduler, engine, seq) == [wanted]
        assert seq.n_cached == {1: 0, 2: 0, 3: 140, 4: 140}[seq.seq_id]


def test_a_recomputed_sequence_finds_and_leaves_blocks_of_its_new_table():
    scheduler, engine = make(never_stop=True, rope_limits=(150,))
    seq = of(1, words(1, 130), max_tokens=60)
    wanted = alone(seq, rope_limits=(150,))
    ids = finish(scheduler, engine, seq)[0]
    assert ids == wanted and seq.n_cached == 0
    n_computed(engine)
    again = of(2, words(1, 130), max_tokens=60)
    assert finish(scheduler, engine, again)[0] == ids and again.n_cached == 128
    assert n_computed(engine) == 2 + 1, "the end of the prompt, and the last token of what is recomputed"
    turn = of(3, words(1, 130), ids)
    assert finish(scheduler, engine, turn)[0] == alone(turn, rope_limits=(150,))
    assert turn.n_cached == 189, "all but the last token of the answer"


# -- prompts that arrive together


@pytest.mark.parametrize("groups", [(FULL,), BOTH, SLIDING])
@pytest.mark.parametrize("rows", [16, 64, 100, 1000])
def test_what_prompts_have_in_common_is_computed_once_also_at_the_same_time(groups, rows):
    """Each row of the common start once, and the leader gets the rows that it gets alone."""
    common = words(1, 364)
    seqs = [of(i, common, [i + 1] * 10) for i in range(8)]
    leader_alone, engine = make(groups=groups, n_blocks=(70,) * len(groups), context=1024, max_batch_tokens=rows)
    finish(leader_alone, engine, of(1, common, [1] * 10))
    n_steps = engine.calls.index("decode") if "decode" in engine.calls else len(engine.calls)

    scheduler, engine = make(8, max(rows, 8), 1024, (70,) * len(groups), groups, never_stop=True)
    for seq in seqs:
        scheduler.add(seq)
    for _ in range(n_steps):
        run(scheduler, engine)
    assert seqs[0].n_out == 1, "the leader is as fast as alone"
    ids = finish(scheduler, engine)
    drain(scheduler, engine)
    assert not ids and n_computed(engine) == 374 + 7 * 10
    assert [s.n_cached for s in seqs] == [0] + [364] * 7


@pytest.mark.parametrize("n_common", [WORTH_WAITING, 64, 100, 364])
@pytest.mark.parametrize("parts", [True, False])
def test_who_has_waited_does_not_wait_for_another_that_has(n_common, parts):
    """After the step in which the first computes what they have in common all others run together."""
    scheduler, engine = make(12, 2000, 1024, (100,), never_stop=True, parts=parts)
    seqs = [of(i, words(1, n_common), [i + 1] * 20) for i in range(12)]
    for seq in seqs:
        scheduler.add(seq)
    n_first = len(run(scheduler, engine)[0].outputs)
    assert n_first == (1 if parts or n_common >= 64 else 12)
    work, _ = run(scheduler, engine)
    assert len(work.outputs) == 12 if n_first == 1 else isinstance(work, DecodeWork)
    drain(scheduler, engine)


def test_prompts_with_little_in_common_run_side_by_side():
    scheduler, engine = make(12, 2000, 1024, (100,), never_stop=True)
    for i in range(12):
        scheduler.add(of(i, words(1, WORTH_WAITING - 1), [i + 1] * 20))
    assert len(run(scheduler, engine)[0].outputs) == 12
    drain(scheduler, engine)


def test_ids_of_prompts_that_arrive_together():
    scheduler, engine = make(8, 64, 1024, (80,), never_stop=True)
    common = words(1, 150)
    seqs = [of(i, common[: 30 * i], words(i, 40), seed=i) for i in range(1, 8)]
    assert finish(scheduler, engine, *seqs) == [alone(s) for s in seqs]


@pytest.mark.parametrize("end", ["drop", "fail", "last token"])
def test_who_waits_goes_on_when_the_one_before_is_gone(end):
    scheduler, engine = make(never_stop=True)
    scheduler.pace = Fixed(20)
    prompt = words(1, 200)
    leader, second, third = of(1, prompt[:150], max_tokens=1), of(2, prompt), of(3, prompt)
    ids = {2: [], 3: []}
    for seq in (leader, second, third):
        scheduler.add(seq)
    for _ in range(4):
        work, _ = run(scheduler, engine, ids)
        assert [(s.seq_id, n) for s, n in work.chunks] == [(1, 20)]
    assert second.n_past == third.n_past == 0
    if end == "drop":
        scheduler.drop(1)
    elif end == "fail":
        work = scheduler.next_work()
        work.outputs.append(leader)
        leader.n_past = leader.n_prompt - 20
        assert scheduler.done_step(work, [-1])[0] is leader and leader.ended == "failed"
    while second.ended is None or third.ended is None:
        assert run(scheduler, engine, ids)[0] is not None
        check_ownership(scheduler)
    assert list(ids.values()) == [alone(second), alone(third)]
    drain(scheduler, engine)


def test_nobody_waits_for_a_block_that_it_could_not_use():
    """Prompts that differ within the first tokens of a block run side by side."""
    scheduler, engine = make(max_batch_tokens=64, never_stop=True)
    scheduler.pace = Fixed(40)
    seqs = [of(1, [1, *words(1, 29)]), of(2, [2, *words(1, 29)]), of(3, [1, *words(1, 9)])]
    for seq in seqs:
        scheduler.add(seq)
    work, _ = run(scheduler, engine)
    assert [(s.seq_id, n) for s, n in work.chunks] == [(1, 30), (2, 10)]
    work, _ = run(scheduler, engine)
    assert [(s.seq_id, n) for s, n in work.chunks] == [(1, 1), (2, 20), (3, 1)]
    drain(scheduler, engine)


# -- work that is given up


@pytest.mark.parametrize("groups", [(FULL,), BOTH, SLIDING])
def test_work_that_was_given_up_leaves_no_block_behind(groups):
    """What was taken from the cache stays taken; blocks that were to be written are free, borrowed ones too."""
    scheduler, engine = make(8, 300, 1024, (12,) * len(groups), groups, never_stop=True)
    seq = of(1, words(1, 80), words(2, 300))
    twin = of(2, words(1, 80), words(2, 300), max_tokens=9)
    wanted = [alone(s, groups) for s in (seq, twin)]
    finish(scheduler, engine, of(9, words(1, 80)))
    scheduler.add(seq)
    admit(scheduler, engine)
    for _ in range(3):
        work = scheduler.next_work()
        assert seq.n_past == seq.n_cached == 80 and len(work.batch.tokens) == 300
        check_ownership(scheduler)
    scheduler.add(twin)  # admitted beside blocks that the work given up had borrowed
    ids = {1: [], 2: []}
    while seq.ended is None or twin.ended is None:
        run(scheduler, engine, ids)
    assert list(ids.values()) == wanted
    check_empty(scheduler)


@pytest.mark.parametrize("groups", [(FULL,), BOTH, SLIDING])
def test_blocks_of_work_that_was_given_up_are_there_for_others(groups):
    """A teacher-forced sequence has its turn next: it finds free what the step had borrowed, and computes what the
    other then takes in the place of its own blocks."""
    scheduler, engine = make(8, 300, 1024, (10,) * len(groups), groups, never_stop=True)
    prompt = words(1, 200)
    seq, forced = of(1, prompt, words(2, 100)), of(2, prompt, max_tokens=0)
    wanted = alone(seq, groups)
    scheduler.add(seq)
    admit(scheduler, engine)
    work = scheduler.next_work()
    assert isinstance(work, StepWork) and [len(owned) for owned in seq.blocks] == [5] * len(groups)
    scheduler.add(forced)
    while forced.ended is None:
        admit(scheduler, engine)
        work = scheduler.next_work()
        check_ownership(scheduler)
        if isinstance(work, LogitsWork):
            engine.forward(work.batch)
            scheduler.done_logits(work)
            check_ownership(scheduler)
    ids = {1: []}
    while seq.ended is None:
        run(scheduler, engine, ids)
    assert ids[1] == wanted and seq.n_cached >= 192
    check_empty(scheduler)


def test_a_decode_run_that_was_given_up_is_asked_for_again():
    scheduler, engine = make(never_stop=True)
    seq = of(1, words(1, 60), max_tokens=100)
    scheduler.add(seq)
    while not seq.n_out:
        run(scheduler, engine)
    first = scheduler.next_work()
    again = scheduler.next_work()
    assert isinstance(again, DecodeWork) and again.positions.tolist() == first.positions.tolist()
    check_ownership(scheduler)
    drain(scheduler, engine)
    assert seq.ended == "length"


# -- what must not enter, or not stay


def test_an_answer_without_a_distribution_takes_its_prompt_out_of_the_cache():
    scheduler, engine = make(never_stop=True)
    good, bad = of(1, words(1, 100)), of(2, words(1, 64), words(2, 100))
    finish(scheduler, engine, good)
    scheduler.add(bad)
    run(scheduler, engine)
    while bad.ended is None:
        work = scheduler.next_work()
        engine.step(work.batch)
        scheduler.done_step(work, [-1] * len(work.outputs))
    assert bad.ended == "failed" and bad.n_cached == 64
    check_cache(scheduler, engine)
    check_ownership(scheduler)
    seq = of(3, words(1, 64), words(2, 100))
    assert finish(scheduler, engine, seq) == [alone(seq)] and seq.n_cached == 0


def test_a_cancelled_prompt_leaves_what_was_computed_of_it():
    scheduler, engine = make(max_batch_tokens=50, never_stop=True)
    seq = of(1, words(1, 300))
    scheduler.add(seq)
    for _ in range(3):
        run(scheduler, engine)
    assert seq.n_past == 150 and scheduler.drop(1)
    check_cache(scheduler, engine)
    twin = of(2, words(1, 300))
    assert finish(scheduler, engine, twin) == [alone(twin)] and twin.n_cached == 150


def test_a_step_that_failed_leaves_nothing():
    """Its rows may have been written or not; all that is cached is forgotten, and what runs leaves nothing any more."""
    scheduler, engine = make(never_stop=True)
    finish(scheduler, engine, of(1, words(1, 100)))
    seq = of(2, words(1, 200), max_tokens=2)
    scheduler.add(seq)
    scheduler.admit()
    assert scheduler.next_work() is not None
    scheduler.forget_prefixes()
    check_cache(scheduler, engine)
    assert scheduler.pools[0].n_kept == 0
    scheduler.drop(2)
    check_empty(scheduler)
    again = of(3, words(1, 100))
    assert finish(scheduler, engine, again) == [alone(again)] and again.n_cached == 0


def test_sequences_go_on_when_the_cache_is_emptied():
    scheduler, engine = make(never_stop=True)
    seqs = [of(i, words(1, 200), words(i, 20)) for i in (1, 2)]
    ids = {1: [], 2: []}
    for seq in seqs:
        scheduler.add(seq)
    for _ in range(4):
        run(scheduler, engine, ids)
    scheduler.forget_prefixes()
    while any(s.ended is None for s in seqs):
        run(scheduler, engine, ids)
    assert list(ids.values()) == [alone(s) for s in seqs]
    assert scheduler.pools[0].n_kept == 0
    check_empty(scheduler)


# -- what is set aside


def test_a_shared_block_is_set_aside_once():
    """Four sequences of 5 blocks each in a pool of 9: they have 4 of them in common."""
    scheduler, engine = make(n_blocks=(9,), never_stop=True)
    common = words(1, 256)
    seqs = [of(i, common, [i] * 10, max_tokens=30) for i in range(1, 5)]
    for seq in seqs:
        scheduler.add(seq)
    run(scheduler, engine)
    assert len(scheduler.running) == 1 and scheduler.n_waiting == 3
    while seqs[0].n_out == 0:
        run(scheduler, engine)
    run(scheduler, engine)
    assert len(scheduler.running) == 4, "what the first has computed needs no room any more"
    assert [s.n_cached >= 256 for s in seqs] == [False, True, True, True]
    drain(scheduler, engine)
    check_empty(scheduler)


def test_what_the_first_leaves_behind_stays_set_aside_for_the_others():
    """The one that brought a shared block ends first; what it gives back is only what nobody uses."""
    scheduler, engine = make(n_blocks=(8,), never_stop=True)
    first, second = of(1, words(1, 192), [1], max_tokens=3), of(2, words(1, 192), [2], max_tokens=100)
    scheduler.add(first)
    run(scheduler, engine)
    scheduler.add(second)
    while first.ended is None:
        run(scheduler, engine)
    assert scheduler._admission.unreserved == [8 - len(blocks_of_all(second))]
    third = of(3, words(5, 200), max_tokens=1)
    scheduler.add(third)
    drain(scheduler, engine)
    assert third.ended == second.ended == "length"


def blocks_of_all(seq: SequenceState) -> range:
    return range(seq.reserved[0])


def test_blocks_that_nobody_uses_make_room_the_longest_unused_first():
    scheduler, engine = make(n_blocks=(8,), never_stop=True, parts=False)
    prompts = [words(i, 190) for i in range(3)]  # 3 blocks each, 2 of them cached
    for i in (0, 1, 0):
        finish(scheduler, engine, of(i, prompts[i], max_tokens=1))
    assert scheduler.cache_stats().n_evicted_blocks == 0
    finish(scheduler, engine, of(2, words(7, 300), max_tokens=1))  # 5 blocks, of which 4 are free
    assert scheduler.cache_stats().n_evicted_blocks == 1
    for i, n in ((0, 128), (1, 64)):  # of the one used longest ago the end is gone, not the start
        seq = of(10 + i, prompts[i], max_tokens=1)
        scheduler.add(seq)
        scheduler.admit()
        assert seq.n_cached == n
        scheduler.drop(seq.seq_id)
    check_empty(scheduler)


def test_a_copy_counts_as_a_use():
    scheduler, engine = make(n_blocks=(4,), never_stop=True)
    prompts = [words(i, 40) for i in range(3)]
    for prompt in prompts:
        finish(scheduler, engine, of(1, prompt, max_tokens=1))
    finish(
        scheduler, engine, of(2, prompts[0][:30], [1] * 10, max_tokens=1)
    )  # copies from the first, into the last free
    assert scheduler.cache_stats().n_evicted_blocks == 0
    finish(scheduler, engine, of(3, words(9, 40), max_tokens=1))  # makes room
    assert scheduler.cache_stats().n_evicted_blocks == 1
    seq = of(4, prompts[0], max_tokens=1)
    finish(scheduler, engine, seq)
    assert seq.n_cached == 39


def test_a_block_is_copied_where_nothing_but_its_source_is_free():
    scheduler, engine = make(n_blocks=(1,), context=64, never_stop=True)
    first, second = of(1, words(1, 40), max_tokens=4), of(2, words(1, 30), words(2, 9), max_tokens=4)
    finish(scheduler, engine, first)
    assert finish(scheduler, engine, second) == [alone(second)]
    assert second.n_cached == 30 and engine.n_copied == 0


# -- whatever happens

PROMPTS = st.tuples(st.integers(0, 2), st.integers(0, 200), st.integers(1, 70), st.integers(0, 2))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PROMPTS, st.integers(0, 90), st.booleans()),
        st.tuples(st.just("run"), st.integers(1, 8)),
        st.tuples(st.just("drop"), st.integers(0, 30)),
        st.tuples(st.just("rows"), st.integers(1, 300)),
        st.tuples(st.just("fail"), st.booleans()),
        st.tuples(st.just("abandon"), st.integers(1, 2)),
        st.tuples(
            st.just("answer"),
            st.integers(0, 30),
            st.just(0) | st.integers(0, 60),
            st.integers(1, 20),
            st.integers(1, 90),
        ),
    ),
    max_size=30,
)
GROUPS = st.sampled_from(
    [(FULL,), (FULL,), BOTH, SLIDING, (KvGroup(1, (0,)), KvGroup(100, (1,))), (FULL, KvGroup(64, (1,)))]
)


@settings(max_examples=80, deadline=None)
@given(GROUPS, st.integers(1, 5), st.integers(5, 300), st.integers(3, 14), st.sampled_from([(), (), (100,), (64, 150)]),
       st.booleans(), st.integers(0, 2), ACTIONS)  # fmt: skip
def test_whatever_happens_each_gets_what_it_would_get_alone(
    groups, max_seqs, max_batch_tokens, n_blocks, rope_limits, parts, steps_past_end, actions
):
    """Prompts with common starts, answers that come back, cancels, failures, small pools: the helpers of `run` check
    owners, what is set aside, what is written and what is cached between any two pieces of work."""
    scheduler, engine = make(
        max_seqs, max_batch_tokens, 320, (n_blocks,) * len(groups), groups, rope_limits=rope_limits, parts=parts
    )
    engine.steps_past_end = steps_past_end
    seqs: list[SequenceState] = []
    prompts: dict[int, np.ndarray] = {}
    ids: dict[int, list[int]] = {}

    def add(prompt: list[int], max_tokens: int, stops: bool) -> None:
        seq = of(len(seqs) + 1, prompt, max_tokens=max_tokens, stops=stops, seed=len(seqs) % 3)
        try:
            scheduler.check(seq.n_prompt, seq.max_tokens)
        except (InvalidRequest, VramOom):
            return
        seqs.append(seq)
        prompts[seq.seq_id], ids[seq.seq_id] = seq.prompt, []
        scheduler.add(seq)

    for what, *args in actions:
        if what == "add":
            family, n_common, n_own, own = args[0]
            add([*words(family, 200)[:n_common], *words(10 + own, n_own)], *args[1:])
        elif what == "run":
            for _ in range(args[0]):
                run(scheduler, engine, ids)
        elif what == "drop" and seqs:
            scheduler.drop(seqs[args[0] % len(seqs)].seq_id)
            check_cache(scheduler, engine)
        elif what == "rows":
            scheduler.pace = Fixed(args[0])
        elif what == "answer" and seqs:  # the next turn of a chat, with some of the end of the answer or all of it
            seq = seqs[args[0] % len(seqs)]
            if seq.sampling is not None:
                answer = ids[seq.seq_id]
                add(
                    [*prompts[seq.seq_id].tolist(), *answer[: max(len(answer) - args[1], 0)], *words(args[2], args[2])],
                    args[3],
                    True,
                )
        elif what == "abandon":  # a step that is given up, and whose rows may be written or not
            for _ in range(args[0]):
                admit(scheduler, engine)
                if scheduler.next_work() is not None:
                    check_ownership(scheduler)
        elif what == "fail":
            admit(scheduler, engine)
            work = scheduler.next_work()
            if args[0]:  # the engine call raises
                scheduler.forget_prefixes()
                for seq in scheduler.running:
                    scheduler.drop(seq.seq_id)
            elif isinstance(work, StepWork):  # it draws nothing
                engine.step(work.batch)
                scheduler.done_step(work, [-1] * len(work.outputs))
            elif isinstance(work, DecodeWork):
                scheduler.done_decode(work, np.full((1, len(work.seqs)), -1, np.int32))
            elif isinstance(work, LogitsWork):
                scheduler.drop(work.seq.seq_id)
            check_cache(scheduler, engine)
        check_ownership(scheduler)
    for _ in range(3000):
        if run(scheduler, engine, ids)[0] is None:
            break
    check_empty(scheduler)
    for seq in seqs:
        if seq.sampling is not None and ids[seq.seq_id]:
            original = of(seq.seq_id, prompts[seq.seq_id].tolist(), max_tokens=seq.max_tokens, stops=seq.stops)
            original.sampling = seq.sampling
            wanted = alone(original, groups, rope_limits, never_stop=False)
            got = ids[seq.seq_id]
            if seq.ended in ("stop", "length"):
                assert STOP_ID in got[:-1] or got == wanted
            assert got[: len(wanted)] == wanted[: len(got)]
