"""Limits that the compiled engine and Python both need: the same number."""

from __future__ import annotations

import pytest

from worker_orcd.config import FLAGS
from worker_orcd.runtime import sizing


def test_the_sequences_of_a_gpu_fill_its_largest_decode_step():
    engine = pytest.importorskip("worker_orcd._engine")
    assert engine.DECODE_SIZES[-1] == sizing.MAX_SEQS <= FLAGS["max_seqs"].most
