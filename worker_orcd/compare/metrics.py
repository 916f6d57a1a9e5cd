"""How far two predictions of the same tokens are apart: NumPy on logits and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: rows worked on together: with 200,000 columns of float64 about 25 MB for each temporary
_ROWS: Final = 16


@dataclass(frozen=True)
class LogitDistance:
    """One number for each position, float64 [n] (`same_top1` bool [n]).

    Attributes:
        relative: mean |a - b| over the vocabulary, over the range max(a) - min(a).
        kl_ab: KL(A || B) in nats: what is lost where B stands for A.
        kl_ba: KL(B || A) in nats: large where B is sure of what A thinks unlikely.
        same_top1: whether both predict the same token.
    """

    relative: np.ndarray
    kl_ab: np.ndarray
    kl_ba: np.ndarray
    same_top1: np.ndarray


def logit_distance(a: np.ndarray, b: np.ndarray) -> LogitDistance:
    """Compare logits [n, n_vocab] of the same tokens. Numbers are NaN where a logit is not finite."""
    n = len(a)
    relative, kl_ab, kl_ba = np.empty(n), np.empty(n), np.empty(n)
    same = np.empty(n, bool)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for start in range(0, n, _ROWS):
            rows = slice(start, min(start + _ROWS, n))
            x, y = a[rows].astype(np.float64), b[rows].astype(np.float64)
            difference = np.abs(x - y).mean(axis=1)
            relative[rows] = np.where(difference == 0, 0.0, difference / (x.max(axis=1) - x.min(axis=1)))
            same[rows] = x.argmax(axis=1) == y.argmax(axis=1)
            log_p, log_q = _log_softmax(x), _log_softmax(y)
            gap = log_p - log_q
            kl_ab[rows] = (np.exp(log_p) * gap).sum(axis=1)
            kl_ba[rows] = -(np.exp(log_q) * gap).sum(axis=1)
    # rounding makes the sum of equal distributions a little negative
    return LogitDistance(relative, np.maximum(kl_ab, 0.0), np.maximum(kl_ba, 0.0), same)


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max(axis=1, keepdims=True)
    log_p: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return log_p


def activation_distance(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(|a - b| / |a|, cosine of a and b) of each row of two activations [n, width]; float64 [n] each."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norm_x, norm_y = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.linalg.norm(x - y, axis=1) / norm_x, (x * y).sum(axis=1) / (norm_x * norm_y)


def first_divergence(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    """Index of the first token in which two continuations differ; None where they are the same."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
