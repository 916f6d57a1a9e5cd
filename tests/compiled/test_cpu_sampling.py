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
from worker_orcd.errors import InvalidRequest


def token(logits, position=0, sampled=(), **kw):
    return sample_token(np.asarray(logits, np.float32), position, sampling(**kw), sampled)


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


def random_logits(rng, n):
    """Spread, peaked or full of ties."""
    x = rng.standard_normal(n) * rng.choice([0.1, 2, 10])
    return (np.round(x * 2) / 2 if rng.random() < 0.3 else x).astype(np.float32)


def test_random_cases_equal_the_reference():
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(600):
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
        position = int(rng.integers(0, 2**31 - 1))
        ours = token(logits, position, sampled, **kw)
        assert ours == draw(logits, position, sampled, **kw), (i, n, kw)
        seen.add(ours)
    assert len(seen) > 100


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


def test_numbers_that_are_not_those_of_the_struct_are_refused():
    numbers = sampling().numbers()
    short = {name: value for name, value in numbers.items() if name != "min_p"}
    for odd in (short, {**numbers, "max_p": 1.0}):
        with pytest.raises(TypeError, match=r"SlotSampling takes the fields .*min_p"):
            sample_token(np.zeros(4, np.float32), 0, SimpleNamespace(numbers=lambda odd=odd: odd))
