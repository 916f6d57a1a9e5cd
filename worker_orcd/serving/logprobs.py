"""Log-probabilities of a drawn token and of the most likely ones, from one row of raw logits."""

from __future__ import annotations

import numpy as np


def top_logprobs(logits: np.ndarray, token: int, n: int) -> dict[int, float]:
    """The `n` largest log-softmax values of `logits` (float32 [n_vocab]), most likely first, lower id on a tie.

    `token` comes last where it is not among them.
    """
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    n = min(n, len(x))
    ids = np.arange(len(x))
    if 0 < n < len(x):
        ids = np.flatnonzero(x >= np.partition(x, -n)[-n])  # a tie at the edge keeps all of its ids here
    top = ids[np.argsort(-x[ids], kind="stable")][:n]
    found = {int(i): float(x[i]) for i in top}
    found.setdefault(token, float(x[token]))
    return found
