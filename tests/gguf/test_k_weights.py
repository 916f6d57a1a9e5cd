"""Weights of K-quants that are too large for a GPU, by what the gguf package makes of the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.quant_blocks import dequantized, random_blocks

from worker_orcd._gguf import check_ranges
from worker_orcd.gguf import quants

K_QUANTS = [t for t in quants.TYPES.values() if t.block_size == 256]
LARGEST = 4094


def first_fault(path, raw: np.ndarray, rule) -> tuple[int, str] | None:
    """(block, what) of the first fault that the check finds in `raw`, uint8 [n, block bytes]."""
    path.write_bytes(raw.tobytes())
    with open(path, "rb") as file:
        found = check_ranges([(file.fileno(), rule, 0, raw.size)], 2)
    return None if found is None else (found[1] // rule[0], found[2])


def blocks(t: quants.QuantType, n: int, scale: float, seed: int) -> np.ndarray:
    """Random blocks whose float16 numbers are `scale` times as large as usual."""
    raw = random_blocks(t.id, n, 256, np.random.default_rng(seed))
    for at in t.number_at:
        numbers = raw[:, at : at + 2].copy().view(np.float16)
        raw[:, at : at + 2] = (numbers.astype(np.float32) * scale).astype(np.float16).view(np.uint8)
    return raw


def parts_of_scales(t: quants.QuantType, raw: np.ndarray) -> np.ndarray:
    """Per block the largest magnitude of d, dmin (1,024 times them where kernels take that), and of both times the
    scales and minima of its parts."""
    numbers = [np.abs(raw[:, at : at + 2].copy().view(np.float16).astype(np.float32)) for at in t.number_at]
    d, dmin = numbers[0], numbers[1] if len(numbers) == 2 else 0 * numbers[0]
    if t.name == "Q2_K":
        scales, mins = raw[:, :16] & 15, raw[:, :16] >> 4
    elif t.name == "Q6_K":
        scales, mins = np.abs(raw[:, 192:208].view(np.int8).astype(np.int32)), np.zeros((len(raw), 1))
    elif t.name == "Q3_K":
        b = raw[:, 96:108].astype(np.int32)
        low = np.concatenate([b[:, :8] & 15, b[:, :8] >> 4], axis=1)
        high = np.concatenate([b[:, 8:12] >> 2 * i & 3 for i in range(4)], axis=1)
        scales, mins = np.abs((low | high << 4) - 32), np.zeros((len(raw), 1))
    else:
        b = raw[:, 4:16].astype(np.int32)
        scales = np.concatenate([b[:, :4] & 63, b[:, 8:12] & 15 | b[:, :4] >> 6 << 4], axis=1)
        mins = np.concatenate([b[:, 4:8] & 63, b[:, 8:12] >> 4 | b[:, 4:8] >> 6 << 4], axis=1)
    power = 1024 if t.name in ("Q4_K", "Q5_K") else 1  # a kernel multiplies by 1024 plus the scale, then takes that off
    parts = [power * d, power * dmin, d * scales.max(1, keepdims=True), dmin * mins.max(1, keepdims=True)]
    return np.maximum.reduce(parts)[:, 0]


@pytest.mark.parametrize("t", K_QUANTS, ids=lambda t: t.name)
@pytest.mark.parametrize("scale", [1, 8, 30, 100, 1000])
def test_a_block_is_refused_where_a_weight_of_it_is_too_large(t, scale, tmp_path):
    """Each block by itself: what is refused is what is too large, and nothing else."""
    raw = blocks(t, 300, scale, seed=scale)
    largest = np.maximum(np.abs(dequantized(t.id, raw)).max(1), parts_of_scales(t, raw))
    wanted = largest > LARGEST
    found = [first_fault(tmp_path / "w", raw[i : i + 1], t.gpu_check_rule) is not None for i in range(len(raw))]
    clear = np.abs(largest / LARGEST - 1) > 1e-5  # nearer ones are a matter of rounding
    assert clear.sum() > 290 and (np.array(found) == wanted)[clear].all()
    assert (scale < 1000 or wanted.any()) and (scale > 1 or not wanted.any())
    print(f"{t.name} x {scale}: {wanted.sum()} of {len(raw)} blocks are too large")
    if wanted.any():
        at, reason = first_fault(tmp_path / "w", raw, t.gpu_check_rule)
        assert at == wanted.argmax() and reason.startswith("has a block of weights above 4,094, which a GPU cannot")
    assert first_fault(tmp_path / "w", raw, t.check_rule) is None  # on the CPU nothing of it counts


@pytest.mark.parametrize("t", K_QUANTS, ids=lambda t: t.name)
def test_the_first_fault_of_either_kind_is_told(t, tmp_path):
    raw = blocks(t, 3000, 1, seed=1)
    at = t.number_at[-1]
    for nan, large in ((2000, 2500), (2500, 2000), (7, 7)):
        bad = raw.copy()
        bad[large, t.number_at[0] : t.number_at[0] + 2] = np.frombuffer(np.float16(60000).tobytes(), np.uint8)
        bad[nan, at : at + 2] = (0, 0x7E)
        block, reason = first_fault(tmp_path / "w", bad, t.gpu_check_rule)
        assert block == min(nan, large) and ("NaN" in reason) == (nan <= large)
    for smallest in (b"\0\0", b"\1\0", b"\0\x80"):  # zeros, and a number below the normal ones
        good = raw.copy()
        good[:, at : at + 2] = np.frombuffer(smallest, np.uint8)
        assert first_fault(tmp_path / "w", good, t.gpu_check_rule) is None


def test_rules_name_k_quants_alone(tmp_path):
    assert [t.name for t in quants.TYPES.values() if len(t.gpu_check_rule) == 4] == [
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    ]
    for t in quants.TYPES.values():
        assert t.gpu_check_rule[:3] == t.check_rule
    for weights in (("Q4_0",), ("Q4_K", "Q4_K"), (None,)):
        with pytest.raises(ValueError, match="no rule to check numbers by"):
            first_fault(tmp_path / "w", np.zeros((1, 144), np.uint8), (144, "F16", (0, 2), *weights))
