"""Drawing tokens on the CPU: the rule of csrc/params/sampling.h against a plain reference, bounds, and frequencies."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.cpu_engines import sampling
from helpers.sampling_reference import draw, philox

from worker_orcd._cpu import sample_token
from worker_orcd.engine.token_edits import TokenEdits, token_edits
from worker_orcd.errors import InvalidRequest


def token(logits, position=0, sampled=(), bad_words=(), stop_ids=(), **kw):
    """`bad_words`: the tokens of each; `stop_ids`: those that end the sequence."""
    params = sampling(**kw)
    edits = token_edits(params, bad_words, stop_ids)
    return sample_token(np.asarray(logits, np.float32), position, params, sampled, edits)


def test_philox_known_answers():
    """Vectors of the authors' Random123 distribution."""
    ones = 0xFFFFFFFF
    assert philox([0] * 4, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox(pi, 0xA4093822, 0x299F31D0) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_greedy():
    assert token([0, 3, 1, 3]) == 1, "the lowest id on a tie"
    assert token([-5, -2, -math.inf]) == 1
    assert token([0.0, -0.0]) == 0
    assert token([7]) == 0
    assert token([1, 2, 3], temperature=1e-6, seed=9) == 2, "a temperature below 1e-5 counts as 0"


@pytest.mark.parametrize("kw", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_distribution(kw, bad):
    for at in (0, 1, 40, 99):
        logits = np.zeros(100, np.float32)
        logits[at] = bad
        assert token(logits, sampled=[3], **kw) == -1
    assert token(np.full(100, -np.inf), **kw) == -1


def test_penalty_over_sampled_tokens():
    assert token([2.0, 1.9, -1.0], sampled=[0], repetition_penalty=1.1) == 1, "positive logits are divided"
    assert token([-1.0, -1.1, -9.0], sampled=[0], repetition_penalty=2.0) == 1, "negative ones multiplied"
    assert token([1.0, 1.9], sampled=[0], repetition_penalty=0.5) == 0, "below 1 it encourages"
    assert token([2.0, 1.0], sampled=[0, 0, 0], repetition_penalty=1.5) == 0, "each token counts once"
    assert token([0.0, -1.0], sampled=[0, 1], repetition_penalty=2.0) == 0
    bounded = token([1.0, 2.0], sampled=[0, 1], repetition_penalty=1e-37, temperature=2e-5)
    assert bounded in (0, 1), "what overflows is the largest float"


def test_presence_and_frequency_penalty():
    assert token([2.0, 1.6], sampled=[0], presence_penalty=0.5) == 1
    assert token([2.0, 1.4], sampled=[0], presence_penalty=0.5) == 0
    assert token([2.0, 1.4], sampled=[0, 0, 0], presence_penalty=0.5) == 0, "a token counts once"
    assert token([2.0, 1.4], sampled=[0], frequency_penalty=0.5) == 0
    assert token([2.0, 1.4], sampled=[0, 0], frequency_penalty=0.5) == 1, "each time counts"
    assert token([2.0, 0.1], sampled=[0, 0], frequency_penalty=0.5, presence_penalty=1.0) == 1
    assert token([1.0, 1.9], sampled=[0], presence_penalty=-1.0) == 0, "below 0 it encourages"
    assert token([-2.0, -2.3], sampled=[0], presence_penalty=0.5) == 1
    # divided by r first, then less: 4 / 2 - 1 = 1
    assert token([4.0, 1.1], sampled=[0], presence_penalty=1.0, repetition_penalty=2.0) == 1
    assert token([4.0, 0.9], sampled=[0], presence_penalty=1.0, repetition_penalty=2.0) == 0


def test_penalties_are_of_logits_and_not_of_what_the_temperature_makes_of_them():
    """As vLLM and OpenAI have it: (logit - penalty) / T."""
    rng = np.random.default_rng(3)
    for temperature in (0.25, 0.5, 2.0):
        logits = rng.integers(-16, 16, 40) / 4
        n = [i % 4 for i in range(40)]
        less = [x - (0.5 * c + 0.25 * (c > 0)) for x, c in zip(logits, n, strict=True)]
        sampled = [i for i, c in enumerate(n) for _ in range(c)]
        for position in range(50):
            ours = token(logits, position, sampled, temperature=temperature, frequency_penalty=0.5,
                         presence_penalty=0.25, seed=1)  # fmt: skip
            assert ours == token(less, position, temperature=temperature, seed=1)


def test_a_bias_is_added_before_all_else():
    assert token([1.0, 2.0, 3.0], logit_bias={0: 2.5}) == 0
    assert token([1.0, 2.0, 3.0], logit_bias={2: -100}) == 1
    assert token([1.0, 2.0, -math.inf], logit_bias={2: 100}) == 1
    assert token([1.0, 2.0], logit_bias={0: 1}) == 0, "the lowest id on a tie"
    logits = np.linspace(0, 3, 20)
    for position in range(50):
        shifted = logits.copy()
        shifted[[3, 5]] += [1.5, -2]
        kw = {"temperature": 0.5, "top_p": 0.9, "seed": 2}
        assert token(logits, position, logit_bias={5: -2, 3: 1.5}, **kw) == token(shifted, position, **kw)


def test_stop_ids_are_banned_until_there_are_enough_tokens():
    for n in range(6):
        for kw in ({}, {"temperature": 1e-3, "seed": 1}):
            got = token([1, 9, 8, 7], sampled=[0] * n, min_tokens=3, stop_ids=(1, 2), **kw)
            assert got == (3 if n < 3 else 1), n
    assert token([1, 9], min_tokens=3, stop_ids=(0, 1)) == -1, "nothing is left"
    assert token([1, 9], min_tokens=3) == 1, "nothing ends the sequence"


def test_the_last_token_of_a_bad_word_is_banned_after_the_others():
    logits = [5, 4, 3, 2, 1]
    word = (1, 2, 0)
    for sampled, banned in (([1, 2], True), ([3, 1, 2], True), ([2, 1], False), ([2], False), ([], False),
                            ([1, 2, 3], False), ([1, 1, 2], True)):  # fmt: skip
        assert token(logits, sampled=sampled, bad_words=[word]) == (1 if banned else 0), sampled
    assert token(logits, bad_words=[(0,), (1,)]) == 2, "a word of one token always"
    assert token(logits, sampled=[1, 2], bad_words=[word, (2, 1), (1, 2)]) == 2, "two words may end at once"
    assert token(logits, bad_words=[(i,) for i in range(5)]) == -1
    long = [*range(1, 5)] * 8  # of 32 tokens, the last of which is 4
    for n in (30, 31, 32, 33, 100):
        sampled = ([0] * 100 + long[:31])[-n:]
        want = 1 if n >= 31 else 0
        assert token([1, 1, 1, 1, 9], sampled=sampled, bad_words=[long]) == (0 if want else 4), n
    assert token([9, 1], sampled=[1] * 1000 + [0] * 5, bad_words=[(1, *[0] * 5)]) == 0
    assert token([9, 1], sampled=[1] * 1000 + [0] * 5, bad_words=[(1, *[0] * 6)]) == 1


def test_a_banned_token_stays_banned_whatever_the_penalties_do():
    kw = {"repetition_penalty": 1e-46, "presence_penalty": -2.0, "frequency_penalty": -2.0}
    assert token([9, 1], sampled=[0, 0], bad_words=[(0,)], logit_bias={0: 100}, **kw) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_ban_does_not_hide_what_is_no_number(bad):
    assert token([bad, 1, 2], bad_words=[(0,)]) == -1
    assert token([bad, 1, 2], logit_bias={0: -100}) == -1
    assert token([-math.inf] * 3, logit_bias={0: 100}) == -1


def random_logits(rng, n):
    """Spread, peaked or full of ties."""
    x = rng.standard_normal(n) * rng.choice([0.1, 2, 10])
    return (np.round(x * 2) / 2 if rng.random() < 0.3 else x).astype(np.float32)


def random_edits(rng, n, sampled):
    """The fields that change logits of single tokens, some of them off; bad words of which some end now."""
    few = lambda most: rng.integers(0, n, rng.integers(0, most)).tolist()  # noqa: E731
    words = [[*few(4), int(rng.integers(0, n))] for _ in range(rng.integers(0, 5))]
    words += [[*sampled[len(sampled) - k :], int(rng.integers(0, n))] for k in range(1, len(sampled))]
    return {"presence_penalty": float(rng.choice([0, 0.7, -2])), "frequency_penalty": float(rng.choice([0, 0.3, -1.1])),
            "logit_bias": {i: float(rng.uniform(-9, 9)) for i in few(20)}, "min_tokens": int(rng.integers(0, 6)),
            "bad_words": words, "stop_ids": few(4)}  # fmt: skip


def test_random_cases_equal_the_reference():
    rng = np.random.default_rng(0)
    seen, failed = set(), 0
    for i in range(1200):
        n = int(rng.choice([1, 2, 17, 100, 1000]))
        logits = random_logits(rng, n)
        if rng.random() < 0.2:
            logits[rng.integers(0, n, n // 3)] = -np.inf
            logits[0] = 0
        kw = {"temperature": float(rng.choice([0, 0.3, 1, 2])), "top_k": int(rng.choice([0, 1, 5, n, 5000])),
              "top_p": float(rng.choice([1, 0.95, 0.5, 0])), "min_p": float(rng.choice([0, 0.05, 1])),
              "repetition_penalty": float(rng.choice([1, 1.3, 0.7])),
              "seed": int(rng.integers(0, 2**64, dtype=np.uint64))}  # fmt: skip
        sampled = rng.integers(0, n, rng.integers(0, 6)).tolist()
        if i % 2:
            kw |= random_edits(rng, n, sampled)
        position = int(rng.integers(0, 2**31 - 1))
        ours = token(logits, position, sampled, **kw)
        assert ours == draw(logits, position, sampled, **kw), (i, n, kw)
        seen.add(ours)
        failed += ours == -1
    assert len(seen) > 100 and 0 < failed < 240


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("kw", "kept"), [
    ({"temperature": 1.0}, 8), ({"temperature": 0.7}, 8), ({"temperature": 1.0, "top_k": 4}, 4),
    ({"temperature": 1.0, "top_p": 0.8}, 4), ({"temperature": 1.0, "min_p": 0.2}, 5),
])  # fmt: skip
def test_frequencies(kw, kept):
    """Chi-square of 20,000 draws at successive positions; the limit is its 0.999 quantile."""
    p = np.array([0.3, 0.25, 0.18, 0.1, 0.08, 0.05, 0.03, 0.01])
    logits = np.log(p)[[3, 0, 7, 2, 5, 1, 6, 4]]
    n = 20000
    counts = Counter(token(logits, position, seed=1234, **kw) for position in range(n))
    q = np.exp(logits / kw["temperature"])
    q[np.argsort(-q)[kept:]] = 0
    q /= q.sum()
    assert set(counts) == set(np.flatnonzero(q))
    value = chi_square(np.array([counts[i] for i in np.flatnonzero(q)]), n * q[q > 0])
    limit = {8: 24.3, 5: 18.5, 4: 16.3}[kept]
    print(f"{kw}: chi-square {value:.1f}, limit {limit}")
    assert value <= limit


def test_draws_depend_on_seed_and_position_only():
    logits = np.zeros(1000)
    draws = [token(logits, p, seed=5, temperature=1.0) for p in range(50)]
    assert draws == [token(logits, p, seed=5, temperature=1.0) for p in range(50)]
    assert draws != [token(logits, p, seed=6, temperature=1.0) for p in range(50)]
    assert draws != [token(logits, p, seed=5 + 2**32, temperature=1.0) for p in range(50)], "all 64 bits count"
    assert len(set(draws)) > 40


def test_refusals():
    for kw in ({"temperature": -1}, {"temperature": math.nan}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1},
               {"repetition_penalty": 0}, {"seed": 2**64}, {"seed": -1}):  # fmt: skip
        with pytest.raises(InvalidRequest, match=next(iter(kw))):
            token([1, 2], **kw)
    with pytest.raises(InvalidRequest, match="sampled"):
        token([1, 2], sampled=[2])
    with pytest.raises(InvalidRequest, match="logits"):
        token([])
    for logit_bias in ({2: 1.0}, {-1: 1.0}):
        with pytest.raises(InvalidRequest, match="outside"):
            token([1, 2], logit_bias=logit_bias)
    with pytest.raises(InvalidRequest, match="outside"):
        token([1, 2], bad_words=[(0, 2)])
    words = lambda *numbers: np.array(numbers, np.int32)  # noqa: E731
    for edits in (TokenEdits(1, 0, words(0, 0, 9, 1)), TokenEdits(1, 0, words(0, 0, 9, 1, 5)),
                  TokenEdits(1, 0, words(0, 0, 9, -1, 0)), TokenEdits(1, 0, words(0, 0, 9, 1, -1)),
                  TokenEdits(1, 0, words(0, 0, 9, 40, 0, *range(60))), TokenEdits(1, 2, words(0, 0, 9, 0, 0)),
                  TokenEdits(0, 0, np.zeros(20000, np.int32)), TokenEdits(1, 0, np.zeros(5)),
                  TokenEdits(-1, -1, words(0, 0, 9, 0, 0)), TokenEdits(1, -1, words(0, 0, 9, 0, 0))):  # fmt: skip
        with pytest.raises(InvalidRequest, match="edits"):
            sample_token(np.zeros(4, np.float32), 0, sampling(), (), edits)


def test_numbers_that_are_not_those_of_the_struct_are_refused():
    numbers = sampling().numbers()
    short = {name: value for name, value in numbers.items() if name != "min_p"}
    for odd in (short, {**numbers, "max_p": 1.0}):
        with pytest.raises(TypeError, match=r"SlotSampling takes the fields .*min_p"):
            sample_token(np.zeros(4, np.float32), 0, SimpleNamespace(numbers=lambda odd=odd: odd))
