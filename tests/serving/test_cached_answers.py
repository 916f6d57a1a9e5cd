"""What was generated is there for the next turn: which tokens of an answer are found again, and which never are.

A token is in the cache where its KV was written: not the newest of an answer, and none that an engine drew past its
end.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers.scheduled import (
    BOTH,
    FULL,
    SLIDING,
    Control,
    Ring,
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
    sequence,
    words,
)

from worker_orcd.engine.protocol import BLOCK_SIZE
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.prefix_cache import MIN_PART
from worker_orcd.serving.work import DecodeWork

GROUPS = pytest.mark.parametrize("groups", [(FULL,), BOTH, SLIDING, (FULL, KvGroup(1, (1,)))])


def generate(scheduler, engine, seq, n_out: int) -> list[int]:
    """Run a sequence, token by token, until it has drawn `n_out`. Returns the new ones."""
    ids: dict[int, list[int]] = {seq.seq_id: []}
    if seq.slot < 0:
        scheduler.add(seq)
    seq.want_logits = True  # it is stepped, and does not decode to its end at once
    while seq.n_out < n_out:
        run(scheduler, engine, ids)
    return ids[seq.seq_id]


# -- turns


@GROUPS
@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("n_answer", [1, 20, 38, 39, 70, 200])
def test_a_chat_computes_what_is_new_in_each_turn(groups, parts, n_answer):
    """All tokens of the turns before are there, but for the last one of the answer."""
    scheduler, engine = make(groups=groups, n_blocks=(60,) * len(groups), context=1024, never_stop=True, parts=parts)
    history, n_known = words(1, 90), 0
    for turn in range(4):
        seq = of(turn, history, max_tokens=n_answer)
        answer = finish(scheduler, engine, seq)[0]
        assert answer == alone(seq, groups)
        assert seq.n_cached == n_known and n_computed(engine) == len(history) - n_known
        n_known = len(history) + n_answer - 1
        if not parts or n_known % BLOCK_SIZE < MIN_PART:
            n_known -= n_known % BLOCK_SIZE
        history = [*history, *answer, *words(turn, 7)]
    check_empty(scheduler)


@GROUPS
def test_a_turn_that_comes_while_the_answer_is_still_generated(groups):
    """Full blocks are shared with the sequence that goes on behind them, and the end of its prompt is copied."""
    scheduler, engine = make(groups=groups, n_blocks=(40,) * len(groups), context=1024, never_stop=True)
    first = of(1, words(1, 90), max_tokens=200)
    answer = generate(scheduler, engine, first, 60)  # positions to 149
    n_computed(engine)
    second, third = of(2, words(1, 90), answer, words(2, 9)), of(3, words(1, 90), words(3, 9))
    assert finish(scheduler, engine, second, third) == [alone(second, groups), alone(third, groups)]
    assert (second.n_cached, third.n_cached, first.ended) == (128, 90, None)
    wanted = alone(first, groups)
    assert finish(scheduler, engine, of(4, words(5, 9)))[0] and first.n_out > 60
    ids = {1: list(answer)}
    while first.ended is None:
        run(scheduler, engine, ids)
    assert first.last_token == wanted[-1]
    whole = of(5, words(1, 90), wanted, words(4, 9))
    assert finish(scheduler, engine, whole) == [alone(whole, groups)] and whole.n_cached == 289
    check_empty(scheduler)


def test_a_block_is_in_the_tree_once_however_it_was_filled():
    """The end of the prompt, then a full block and the end of the answer: each takes the place of the one before."""
    scheduler, engine = make(never_stop=True)
    seq = of(1, words(1, 90), max_tokens=70)
    ids = generate(scheduler, engine, seq, 1)
    cache, pool = scheduler._blocks._cache, scheduler.pools[0]
    assert [len(n.tokens) // 4 for n in cache._nodes.values()] == [64, 26] and pool.n_kept == 2
    ids += generate(scheduler, engine, seq, 39)
    assert [len(n.tokens) // 4 for n in cache._nodes.values()] == [64, 64] and pool.n_kept == 2
    drain(scheduler, engine)
    assert [len(n.tokens) // 4 for n in cache._nodes.values()] == [64, 64, 31] and pool.n_kept == 3


@GROUPS
def test_sequences_that_draw_the_same_keep_one_copy(groups):
    """The same prompt and seed side by side: full blocks of the second become those of the first."""
    scheduler, engine = make(groups=groups, n_blocks=(40,) * len(groups), context=1024, never_stop=True)
    seqs = [of(i, words(1, 90), max_tokens=150) for i in (1, 2, 3)]
    wanted = alone(seqs[0], groups)
    assert finish(scheduler, engine, *seqs) == [wanted] * 3
    assert [pool.n_kept for pool in scheduler.pools] == [4] * len(groups)
    turn = of(9, words(1, 90), wanted, words(2, 5))
    assert finish(scheduler, engine, turn) == [alone(turn, groups)] and turn.n_cached == 239
    check_empty(scheduler)


def test_a_teacher_forced_text_and_an_answer_are_one():
    """Whichever comes first leaves its blocks, and of the other nothing stays but the end of its prompt."""
    for forced_first in (True, False):
        scheduler, engine = make(never_stop=True)
        seq = of(1, words(1, 90), max_tokens=115)
        wanted = alone(seq)
        forced = of(2, words(1, 90), wanted[:114], max_tokens=0)
        for each in (forced, seq) if forced_first else (seq, forced):
            finish(scheduler, engine, each)
        assert scheduler.pools[0].n_kept == 4 + forced_first
        assert n_computed(engine) == 204 + (1 if forced_first else 90)
        turn = of(3, words(1, 90), wanted)
        assert finish(scheduler, engine, turn) == [alone(turn)] and turn.n_cached == 204


# -- what an answer was, and what it was not


@pytest.mark.parametrize("n_shown", [0, 1, 20, 38, 39, 70, 89, 90])
@GROUPS
def test_an_answer_that_was_cut_is_found_up_to_where_it_was_cut(groups, n_shown):
    """A stop string ends an answer some tokens after it has begun, and a cancel after what a client has seen."""
    scheduler, engine = make(groups=groups, n_blocks=(40,) * len(groups), context=1024, never_stop=True)
    seq = of(1, words(1, 90), max_tokens=200)
    answer = generate(scheduler, engine, seq, 90)
    scheduler.drop(1)
    check_cache(scheduler, engine)
    check_empty(scheduler)
    n_common = 90 + min(n_shown, 89)
    turn = of(2, words(1, 90), answer[:n_shown], [0], words(2, 20))
    wanted = alone(turn, groups)
    assert finish(scheduler, engine, turn) == [wanted]
    assert turn.n_cached == n_common - (n_common % BLOCK_SIZE if n_common % BLOCK_SIZE < MIN_PART else 0)
    again = of(3, words(1, 90), answer[:n_shown], [0], words(2, 20))
    assert finish(scheduler, engine, again) == [wanted]


@pytest.mark.parametrize("n_past_end", [0, 1, 2, 70])
@GROUPS
def test_tokens_drawn_past_the_end_are_not_found(groups, n_past_end):
    """The engine goes on for some steps behind the token that ends a sequence: their KV is in its blocks, and the text
    of the next turn is what was drawn there. None of it is taken for computed."""
    scheduler, engine = make(groups=groups, n_blocks=(40,) * len(groups), context=1024, never_stop=True)
    draws = alone(of(1, words(1, 90), max_tokens=140), groups)
    end = next(i for i in range(40, 140) if draws.index(draws[i]) == i)  # the first time that this token is drawn
    seq = of(1, words(1, 90), max_tokens=140, stop_token_ids=(draws[end],))
    engine.steps_past_end = n_past_end
    finish(scheduler, engine, seq)
    assert seq.ended == "stop" and seq.n_out == end + 1
    check_cache(scheduler, engine)
    turn = of(2, words(1, 90), draws)
    assert finish(scheduler, engine, turn) == [alone(turn, groups)]
    n_written = 90 + end  # all before the token that has ended it
    assert turn.n_cached == n_written - (n_written % BLOCK_SIZE if n_written % BLOCK_SIZE < MIN_PART else 0)


@GROUPS
def test_a_decode_run_that_was_given_up_leaves_nothing(groups):
    """The engine has written the blocks of all of it; who goes on, or drops it, has no more than before."""
    scheduler, engine = make(groups=groups, n_blocks=(40,) * len(groups), context=1024, never_stop=True)
    seq = of(1, words(1, 90), max_tokens=150)
    ids = generate(scheduler, engine, seq, 20)
    seq.want_logits = False
    work = scheduler.next_work()
    assert isinstance(work, DecodeWork)
    drawn = engine.decode(
        work.slots, work.seq_ids, work.tokens, work.positions, work.n_steps, work.stop_ids, work.stop_offsets, Ring(),
        Control(),
    )[:, 0].tolist()  # fmt: skip
    assert len(drawn) >= BLOCK_SIZE
    check_cache(scheduler, engine)
    scheduler.drop(1)
    check_cache(scheduler, engine)
    turn = of(2, words(1, 90), ids, drawn)
    assert finish(scheduler, engine, turn) == [alone(turn, groups)] and turn.n_cached == 109
    check_empty(scheduler)


@GROUPS
@pytest.mark.parametrize("n_answer", [5, 30, 150])
def test_an_answer_that_ends_without_a_distribution_is_taken_out(groups, n_answer):
    """With all that leads to it, also where a window has passed that; others begin anew."""
    scheduler, engine = make(groups=groups, n_blocks=(40,) * len(groups), context=1024, never_stop=True)
    seq = of(1, words(1, 90), max_tokens=200)
    ids = generate(scheduler, engine, seq, n_answer)
    seq.want_logits = False
    work = scheduler.next_work()
    assert scheduler.done_decode(work, np.array([[7], [-1], [8]], np.int32)) == [seq] and seq.ended == "failed"
    check_cache(scheduler, engine)
    check_empty(scheduler)
    assert [pool.n_kept for pool in scheduler.pools] == [0] * len(groups)
    turn = of(2, words(1, 90), ids)
    assert finish(scheduler, engine, turn) == [alone(turn, groups)] and turn.n_cached == 0


def test_a_call_that_failed_leaves_nothing_of_an_answer():
    scheduler, engine = make(never_stop=True)
    seq = of(1, words(1, 90), max_tokens=150)
    ids = generate(scheduler, engine, seq, 60)
    assert scheduler.next_work() is not None
    scheduler.forget_prefixes()
    scheduler.drop(1)
    assert scheduler.pools[0].n_kept == 0
    turn = of(2, words(1, 90), ids)
    assert finish(scheduler, engine, turn) == [alone(turn)] and turn.n_cached == 0
    check_empty(scheduler)


# -- windows, tables, room


@pytest.mark.parametrize("groups", [BOTH, SLIDING])
def test_blocks_of_an_answer_that_the_window_has_passed(groups):
    """They are there for who needs them, as long as nobody has used them for something else."""
    scheduler, engine = make(groups=groups, n_blocks=(40,) * len(groups), context=1024, never_stop=True)
    seq = of(1, words(1, 30), max_tokens=500)
    answer = finish(scheduler, engine, seq)[0]
    assert len(seq.blocks) == 0 and scheduler.pools[-1].n_kept == 9
    for cut in (480, 300, 110):
        turn = of(2, words(1, 30), answer[:cut], words(cut, 20), max_tokens=1)
        assert finish(scheduler, engine, turn) == [alone(turn, groups)] and turn.n_cached == 30 + cut
    small, engine = make(groups=groups, n_blocks=(40, 4)[-len(groups) :], context=1024, never_stop=True)
    finish(small, engine, of(1, words(1, 30), max_tokens=500))
    late, early = (of(i, words(1, 30), answer[:cut], words(2, 20)) for i, cut in ((2, 480), (3, 200)))
    assert finish(small, engine, late) == [alone(late, groups)] and late.n_cached == 510
    assert finish(small, engine, early) == [alone(early, groups)] and early.n_cached == 0


def test_an_answer_belongs_to_the_table_that_it_was_computed_under():
    """One that grows past the limit leaves what it had under the table before, and all of it under the next."""
    limits = (150,)
    scheduler, engine = make(never_stop=True, rope_limits=limits)
    seq = of(1, words(1, 90), max_tokens=100)
    wanted = alone(seq, rope_limits=limits)
    answer = finish(scheduler, engine, seq)[0]
    assert answer == wanted
    short, long = of(2, words(1, 90), answer[:50], max_tokens=3), of(3, words(1, 90), answer[:80])
    for turn, n in ((short, 139), (long, 169)):
        assert finish(scheduler, engine, turn) == [alone(turn, rope_limits=limits)] and turn.n_cached == n
    check_empty(scheduler)


def test_an_answer_to_the_end_of_the_context():
    scheduler, engine = make(context=192, n_blocks=(8,), never_stop=True)
    seq = of(1, words(1, 90), max_tokens=102)
    scheduler.check(seq.n_prompt, seq.max_tokens)
    answer = finish(scheduler, engine, seq)[0]
    assert seq.ended == "length" and scheduler.pools[0].n_kept == 3
    turn = of(2, words(1, 90), answer[:101], max_tokens=1)
    assert finish(scheduler, engine, turn) == [alone(turn)] and turn.n_cached == 190


def test_who_waits_for_room_starts_when_an_answer_has_filled_what_they_share():
    """Of a pool of 6 blocks one sequence has 5 set aside; the other needs 4, of which the first will have filled 3."""
    scheduler, engine = make(n_blocks=(6,), never_stop=True)
    first = of(1, words(1, 20), max_tokens=300)
    draws = alone(first)
    answer = generate(scheduler, engine, first, 100)
    second = of(2, words(1, 20), draws[:180], max_tokens=40)
    scheduler.add(second)
    answer += generate(scheduler, engine, first, 170)
    assert second.slot < 0, "there are two full blocks that they share"
    answer += generate(scheduler, engine, first, 175)
    assert second.n_cached >= 192 and answer == draws[:175]
    assert finish(scheduler, engine, sequence(3, 5, 1))[0] is not None
    drain(scheduler, engine)
    assert first.ended == second.ended == "length"


def test_answers_make_room_the_oldest_first():
    """What was generated is as good as free to whoever allocates; a sequence that ends leaves its start for longest."""
    scheduler, engine = make(n_blocks=(6,), never_stop=True, parts=False)
    texts = []
    for i in range(3):
        seq = of(i, words(i, 20), max_tokens=110)  # 129 positions: 2 full blocks
        texts.append([*words(i, 20), *finish(scheduler, engine, seq)[0]])
    assert scheduler.pools[0].n_kept == 5 and scheduler.cache_stats().n_evicted_blocks == 1
    for i, n in ((2, 128), (1, 128), (0, 64)):
        admitted = of(10 + i, texts[i], max_tokens=1)
        scheduler.add(admitted)
        admit(scheduler, engine)
        assert admitted.n_cached == n
        scheduler.drop(admitted.seq_id)
        check_ownership(scheduler)
    check_empty(scheduler)
