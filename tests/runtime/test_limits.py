"""Limits that the compiled engine and Python both need: the same number."""

from __future__ import annotations

import itertools

import pytest

from worker_orcd.config import FLAGS
from worker_orcd.cuda import memory
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.runtime import sizing


def test_sequences_of_a_gpu_fill_decode_steps():
    engine = pytest.importorskip("worker_orcd._engine")
    sizes = engine.DECODE_SIZES
    assert sizing.MAX_SEQS in sizes and sizes[-1] <= FLAGS["max_seqs"].most
    assert sizing.MAX_SEQS == memory.OUTPUT_ROWS
    for n in range(1, sizes[-1] + 1):
        rows = next(size for size in sizes if size >= n)
        assert rows <= memory.output_rows(EngineConfig(n, n, 64, (4,)))


def test_a_decode_step_has_few_rows_that_stand_for_none():
    engine = pytest.importorskip("worker_orcd._engine")
    for fewer, more in itertools.pairwise(engine.DECODE_SIZES):
        assert more - fewer <= max(1, more // 3)
