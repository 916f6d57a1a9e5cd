"""The rule of csrc/params/sampling.h in plain Python: whole sums, full sorts."""

from __future__ import annotations

import math

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


def draw(logits, position, sampled, temperature, top_k, top_p, min_p, repetition_penalty, seed) -> int:
    x = np.asarray(logits, np.float32).copy()
    if temperature:
        x /= np.float32(temperature)
    for i in set(sampled):
        x[i] = x[i] / np.float32(repetition_penalty) if x[i] > 0 else x[i] * np.float32(repetition_penalty)
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
