"""The rule of csrc/params/sampling.h in plain Python: whole sums, full sorts."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

ONE = 2**40


def philox(counter: list[int], key0: int, key1: int) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ key0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ key1, a & 0xFFFFFFFF
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def weights(x: np.ndarray) -> list[int]:
    """e^(x - max) in units of 2^-40, with the float32 exponential of the C library that the kernels call."""
    import ctypes

    expf = ctypes.CDLL("libm.so.6").expf
    expf.restype, expf.argtypes = ctypes.c_float, [ctypes.c_float]
    d = x - x.max()
    return [int(np.float32(expf(float(v))) * np.float32(ONE)) if v > -28 else 0 for v in d]


def edited(logits, sampled, logit_bias=None, bad_words=(), stop_ids=(), min_tokens=0) -> np.ndarray:
    """The logits with their biases and bans. `sampled`: the tokens of the slot so far; `bad_words`: tokens of each."""
    y = np.asarray(logits, np.float32).copy()
    sampled = list(sampled)
    for token, bias in (logit_bias or {}).items():
        y[token] += np.float32(bias)
    if len(sampled) < min_tokens:
        y[list(stop_ids)] = -np.inf
    for *before, last in bad_words:
        if len(sampled) >= len(before) and sampled[len(sampled) - len(before) :] == before:
            y[last] = -np.inf
    return y


def penalized(x, sampled, temperature, repetition_penalty, presence_penalty=0.0, frequency_penalty=0.0) -> np.ndarray:
    """What of x = y / temperature is left when the penalties are taken off; every number is rounded to float32."""
    f = np.float32
    x = x.copy()
    for i, n in Counter(sampled).items():
        x[i] = np.minimum(x[i] / f(repetition_penalty), np.finfo(f).max) if x[i] > 0 else x[i] * f(repetition_penalty)
        discount = f(frequency_penalty) * f(n) + f(presence_penalty)
        x[i] -= discount / f(temperature) if temperature else discount
    return x


def draw(logits, position, sampled, temperature, top_k, top_p, min_p, repetition_penalty, seed, **more) -> int:
    penalties = {name: more.pop(name, 0.0) for name in ("presence_penalty", "frequency_penalty")}
    x = edited(logits, sampled, **more)
    if not (x < np.inf).all() or x.max() == -np.inf:
        return -1
    if temperature:
        x /= np.float32(temperature)
    x = penalized(x, sampled, temperature, repetition_penalty, **penalties)
    if not temperature:
        return int(x.argmax())
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if 0 < top_k < len(x):
        order = order[:top_k]
    w = weights(x)
    if top_p < 1:
        target = max(1, math.ceil(float(np.float32(top_p)) * float(sum(w[i] for i in order))))
        total = 0
        for n, i in enumerate(order):
            total += w[i]
            if total >= target:
                order = order[: n + 1]
                break
    limit = math.ceil(float(np.float32(min_p)) * ONE)
    stay = sorted(i for n, i in enumerate(order) if n == 0 or w[i] >= limit)
    bits = philox([position + 1, 0, 0, 0], seed & 0xFFFFFFFF, seed >> 32)
    target = (((bits[1] << 32) | bits[0]) * sum(w[i] for i in stay)) >> 64
    total = 0
    for i in stay:
        total += w[i]
        if total > target:
            return i
    raise AssertionError
