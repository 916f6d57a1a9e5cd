"""How many prompt tokens a step gets: streams keep an even pace while prompts are read, whatever steps take and however
wrongly that was measured. Times are made up, and nothing waits."""

from __future__ import annotations

import itertools
import random

import pytest
from helpers.paced import GPT_OSS, PHI3, Paced, percentile, step_seconds

from worker_orcd.serving.pace import (
    CONFIRM_AFTER,
    EVEN_SECONDS,
    FIRST_PREFILL_TOKENS,
    MEASURE_EVERY,
    MIN_MIXED_TOKENS,
    MIN_PREFILL_TOKENS,
    STEP_SECONDS,
    STRETCH,
    Pace,
    StepTimes,
)

TABLES = {"Phi-3": PHI3, "gpt-oss": GPT_OSS}
#: prompt tokens a second that are read beside streams at least, (model, streams): alone they are 51,000 and 41,000
LEAST_READ = {
    ("Phi-3", 1): 25_000, ("Phi-3", 8): 25_000, ("Phi-3", 32): 28_000, ("Phi-3", 64): 28_000, ("Phi-3", 200): 30_000,
    ("gpt-oss", 1): 11_000, ("gpt-oss", 8): 7_000, ("gpt-oss", 32): 15_000, ("gpt-oss", 64): 16_500,
    ("gpt-oss", 200): 28_000,
}  # fmt: skip


def on(table):
    return lambda rows: step_seconds(table, rows)


# -- the curve


def test_times_are_straight_between_what_was_measured():
    times = StepTimes()
    assert times.rows_within(1.0) is None
    times.took(64, 4.0)
    assert [times.rows_within(s) for s in (1.0, 4.0, 6.0, 100.0)] == [16, 64, 96, 128], "twice as many rows at most"
    times.took(512, 12.0)
    assert [times.rows_within(s) for s in (2.0, 8.0, 12.0, 14.0, 100.0)] == [0, 288, 512, 624, 1024]


def test_rows_of_one_tile_take_the_same_time():
    times = StepTimes()
    times.took(65, 4.0)
    assert times.rows_within(4.0) == 128


def test_a_longer_step_takes_no_less_and_no_more_than_in_proportion():
    times = StepTimes()
    times.took(64, 40.0)
    times.took(16, 1.0)
    assert times.rows_within(4.0) == 64, "what the small one takes bounds the large one"
    times = StepTimes()
    times.took(16, 8.0)
    times.took(64, 4.0)  # the bound of a step not seen before
    assert times.rows_within(8.0) >= 64


@pytest.mark.parametrize("stalled", [16, 64, 512])
def test_one_stalled_step_changes_little(stalled):
    times = StepTimes()
    for rows in (16, 64, 512):
        times.took(rows, 1 + rows / 64)
    before = [times.rows_within(s) for s in (1.5, 2.5, 6.0)]
    times.took(stalled, 1000.0)
    after = [times.rows_within(s) for s in (1.5, 2.5, 6.0)]
    assert all(0.4 * b <= a <= b for b, a in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("first", [0.1, 1e3])
def test_a_first_measurement_may_be_wrong_by_far(first):
    times = StepTimes()
    times.took(64, first * 2.0)
    for _ in range(120):
        rows = min(max(times.rows_within(4.2) // 8 * 8, 8), 512)
        rows -= rows % 64 if rows > 64 else 0
        times.took(rows, 1.0 + rows / 64)
    assert times.rows_within(4.2) // 64 in (2, 3)


# -- the choice


def paced(decode, steps=((64, 0.004), (512, 0.012), (2048, 0.04)), most=2048):
    pace = Pace(most)
    for rows, seconds in steps:
        pace.step_took(rows, seconds)
    for n, seconds in decode:
        pace.decode_took(n, seconds)
    return pace


def test_alone_a_step_is_as_long_as_it_may_be():
    assert Pace(2048).prompt_tokens(0) == FIRST_PREFILL_TOKENS and Pace(32).prompt_tokens(0) == 32
    assert paced([]).prompt_tokens(0) == 2048
    assert paced([], [(64, 0.04)]).prompt_tokens(0) == 128
    assert paced([], [(64, 60.0)]).prompt_tokens(0) == MIN_PREFILL_TOKENS
    assert paced([], [(4, 60.0)], most=4).prompt_tokens(0) == 4, "never more than a step may have"
    assert paced([], [(64, 0.0)], most=100).prompt_tokens(0) == 100


@pytest.mark.parametrize("n_decode", [1, 8, 40, 64, 200, 250])
def test_beside_others_a_step_is_bounded_by_theirs(n_decode):
    decode = 0.002 + 2e-5 * n_decode
    n = paced([(n_decode, decode)]).prompt_tokens(n_decode)
    rows = n + n_decode
    assert rows % (64 if rows > 64 else 8) == 0 or n % 8 == 0
    took = 0.004 + max(rows - 64, 0) * 0.008 / 448
    assert took <= max(STRETCH * decode, EVEN_SECONDS), (n, took / decode)


def test_a_crowd_leaves_room_for_itself():
    for n_decode in range(1, 256):
        for decode in (1e-4, 0.01, 0.05, 1.0):
            n = paced([(n_decode, decode)], most=256).prompt_tokens(n_decode)
            assert 1 <= n <= 256 - n_decode


def test_prompts_get_on_beside_the_fastest_and_the_slowest():
    slow = [(64, 1.0), (2048, 32.0)]
    assert {paced([(n, 1e-6)], slow).prompt_tokens(n) for n in (1, 2, 4, 5, 8, 64)} == {MIN_MIXED_TOKENS}
    crowd_on_a_cpu = paced([(64, 0.17)], [(72, 0.19), (128, 0.34)])
    assert crowd_on_a_cpu.prompt_tokens(64) >= MIN_MIXED_TOKENS
    assert paced([(4, 0.035)], [(64, 0.06), (128, 0.1)]).prompt_tokens(4) * 100 / 128 < 1e3 * STEP_SECONDS


def test_decode_steps_are_measured_by_themselves_and_again():
    pace = paced([])
    assert pace.prompt_tokens(4) == 0
    pace.decode_took(4, 0.002)

    def until_asked(n_decode):
        for n in itertools.count():
            if not pace.prompt_tokens(n_decode):
                return n
            pace.step_took(64, 0.004)

    assert until_asked(4) == CONFIRM_AFTER
    pace.decode_took(4, 0.002)
    assert until_asked(4) == MEASURE_EVERY
    pace.decode_took(4, 0.002)
    assert pace.prompt_tokens(6) and not pace.prompt_tokens(9) and not pace.prompt_tokens(2), "of about as many"


def test_a_disturbed_measurement_of_a_decode_step_does_not_count():
    pace = paced([(8, 0.0014), (8, 0.0014)])
    n = pace.prompt_tokens(8)
    pace.decode_took(8, 1.0)
    assert pace.prompt_tokens(8) == n


def test_mixed_steps_do_not_make_the_next_one_longer():
    """Prompts never end: the only decode steps are those that are asked for."""
    pace, chunks = paced([]), []
    for _ in range(5000):
        n = pace.prompt_tokens(8)
        if n:
            chunks.append(n)
            pace.step_took(8 + n, step_seconds(PHI3, 8 + n))
        else:
            pace.decode_took(8, step_seconds(PHI3, 8))
    assert percentile(chunks[:500], 0.5) == percentile(chunks[-500:], 0.5) == 248
    assert percentile(chunks, 0.99) <= 256


def test_steps_of_scored_texts_have_times_of_their_own():
    pace = paced([])
    pace.forward_took(64, 0.32)
    assert pace.prompt_tokens(0) == 2048 and pace.prompt_tokens(0, forced=True) == MIN_PREFILL_TOKENS


# -- streams and prompts, by a clock


@pytest.mark.parametrize("rest", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("model", "n_streams"), sorted(LEAST_READ))
def test_streams_keep_their_pace_while_prompts_arrive(model, n_streams, rest, monkeypatch):
    paced = Paced(monkeypatch, on(TABLES[model]))
    paced.start(n_streams)
    read, took = paced.arrivals(8.0, rest)
    p50, p99 = percentile(paced.gaps, 0.5), percentile(paced.gaps, 0.99)
    decode, rate = step_seconds(TABLES[model], n_streams), read / sum(took)
    print(
        f"{model}, {n_streams} streams, rest {rest:g}: gap p50 {1e3 * p50:.2f}, p99 {1e3 * p99:.2f} ms, "
        f"{p99 / p50:.2f} of it and {p99 / decode:.2f} of a decode step; {rate:.0f} prompt tokens/s"
    )
    assert p99 < max(3 * min(p50, decode), 1.2 * EVEN_SECONDS)
    assert rest or p99 < 1.5 * p50
    assert rate > LEAST_READ[model, n_streams]


@pytest.mark.parametrize("model", TABLES)
def test_a_prompt_alone_is_read_as_fast_as_before(model, monkeypatch):
    paced = Paced(monkeypatch, on(TABLES[model]))
    paced.pace.step_took(2048, step_seconds(TABLES[model], 2048))  # the warm-up's
    _, took = paced.arrivals(0.1, 1.0)
    assert took[0] == pytest.approx(step_seconds(TABLES[model], 2000))
    paced.start(1)
    paced.arrivals(2.0, 0.0)
    for seq in paced.scheduler.running:
        paced.scheduler.drop(seq.seq_id)
    _, took = paced.arrivals(0.1, 1.0)
    assert took[0] <= 1.3 * step_seconds(TABLES[model], 2000), "after a time of small steps too"


def disturbances():
    rng = random.Random(1)
    return {
        "noise": lambda n, s: s * rng.uniform(0.9, 1.1),
        "a slow first step": lambda n, s: s + (n < 1),
        "slow first steps": lambda n, s: s * (20 if n < 4 else 1),
        "stalls": lambda n, s: s + 0.05 * (n % 211 == 0),
        "throttled for a time": lambda n, s: s * (5 if 300 < n < 450 else 1),
    }


@pytest.mark.parametrize("name", disturbances())
@pytest.mark.parametrize(("model", "n_streams"), [("Phi-3", 8), ("gpt-oss", 1), ("gpt-oss", 32)])
def test_what_was_measured_wrongly_is_soon_forgotten(model, n_streams, name, monkeypatch):
    disturb = disturbances()[name]
    paced = Paced(monkeypatch, on(TABLES[model]), disturb=disturb)
    paced.start(n_streams)
    paced.arrivals(20.0, 0.0)
    paced.gaps.clear()
    read, took = paced.arrivals(20.0, 0.0)
    usual = [g for g in paced.gaps if g < 0.05]  # but for the stalls themselves
    decode = step_seconds(TABLES[model], n_streams)
    p99, rate = percentile(usual, 0.99), read / sum(took)
    print(f"{name}: p99 {p99 / decode:.2f} of a decode step, {rate:.0f} prompt tokens/s")
    assert p99 < max(3.3 * decode, 1.3 * EVEN_SECONDS)
    assert rate > 0.6 * LEAST_READ[model, n_streams]


def test_the_pace_follows_the_device(monkeypatch):
    """Contexts grow, and with them the decode steps: a step may take longer then."""
    slower = 1.0
    paced = Paced(monkeypatch, lambda rows: slower * step_seconds(PHI3, rows))
    paced.start(32)
    paced.arrivals(1.0, 0.0)
    for slower in (4.0, 1.0):
        paced.arrivals(2.0, 0.0)
        paced.gaps.clear()
        read, took = paced.arrivals(2.0, 0.0)
        assert percentile(paced.gaps, 0.99) < max(3 * slower * step_seconds(PHI3, 32), 1.2 * EVEN_SECONDS)
        assert read / sum(took) > LEAST_READ["Phi-3", 32] / slower * 0.7
