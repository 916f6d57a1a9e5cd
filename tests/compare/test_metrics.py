"""Distances between two models' logits, against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from worker_orcd.compare import metrics
from worker_orcd.compare.report import Check


def test_logit_distance_by_hand():
    a = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    b = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])) + 3.0  # an offset changes no probability
    d = metrics.logit_distance(a.astype(np.float32), b.astype(np.float32))
    assert d.kl_ab == pytest.approx([0.25 * np.log(2), 0], abs=1e-6) and d.kl_ba == pytest.approx(d.kl_ab, abs=1e-6)
    assert d.same_top1.tolist() == [False, True]
    apart = np.abs(a.astype(np.float32).astype(float) - b.astype(np.float32)).mean(axis=1)
    assert d.relative == pytest.approx(apart / np.ptp(a, axis=1), rel=1e-6)


def test_logit_distance_of_equal_and_of_broken_logits():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 300)).astype(np.float32)  # more rows than are worked on together
    same = metrics.logit_distance(a, a)
    assert not same.kl_ab.any() and not same.kl_ba.any() and not same.relative.any() and same.same_top1.all()
    b = a.copy()
    b[33, 7] = np.nan
    broken = metrics.logit_distance(a, b)
    assert np.isnan(broken.kl_ab[33]) and np.isnan(broken.relative[33]) and not np.isnan(broken.kl_ab[:33]).any()
    assert not Check("x", float(broken.kl_ab.mean()), 1e9, False).ok
    assert not Check("x", float("nan"), 0.0, True).ok and Check("x", 0.3 - 0.2, 0.1, False).ok


def test_first_divergence():
    first = metrics.first_divergence
    assert first((1, 2), (1, 2)) is None and first((1, 2), (1, 3)) == 1 and first((1, 2), (1,)) == 1
    assert first((), (5,)) == 0
