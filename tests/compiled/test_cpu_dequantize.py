"""Dequantization on the CPU: the gguf package's values to the bit, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.cpu_engines import ISAS
from helpers.quant_blocks import dequantized, random_blocks

from worker_orcd._cpu import cpu_features, dequantize
from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf import quants

#: float16 scales: zeros, subnormals, the smallest normal, one, the largest, infinities, each with its negative
SCALES = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00],
                  np.uint16)  # fmt: skip
TYPES = list(quants.TYPES.values())


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to the bit; NaN where the other has NaN, of any payload."""
    ours, theirs = ours.ravel(), theirs.ravel()
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("t", TYPES, ids=lambda t: t.name)
def test_random_blocks(t, isa):
    raw = random_blocks(t.id, 33, 512, np.random.default_rng(t.id), (0, 255))
    with np.errstate(over="ignore"):
        same(dequantize(t.id, raw, 33 * 512, isa=isa), dequantized(t.id, raw))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("t", [t for t in TYPES if t.number == "F16" and t.block_size > 1], ids=lambda t: t.name)
def test_extreme_scales(t, isa):
    halves = t.number_at
    pairs = [(a, b) for a in SCALES for b in (SCALES if len(halves) == 2 else SCALES[:1])]
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (len(pairs), t.type_size), dtype=np.uint8)
    for i, pair in enumerate(pairs):
        for offset, scale in zip(halves, pair, strict=False):
            raw[i, offset : offset + 2] = np.array([scale]).view(np.uint8)
    with np.errstate(all="ignore"):
        same(dequantize(t.id, raw, raw.shape[0] * t.block_size, isa=isa), dequantized(t.id, raw))


@pytest.mark.parametrize("isa", ISAS)
def test_every_float(isa):
    halves = np.arange(65536, dtype=np.uint16)
    same(dequantize(1, halves, 65536, isa=isa), halves.view(np.float16).astype(np.float32))
    same(dequantize(30, halves, 65536, isa=isa), (halves.astype(np.uint32) << 16).view(np.float32))
    floats = np.random.default_rng(1).integers(0, 2**32, 4097, dtype=np.uint32)
    same(dequantize(0, floats, 4097, isa=isa), floats.view(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_every_mxfp4_scale_and_code(isa):
    raw = np.empty((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    raw[:, 1:] = np.arange(16) * 17  # both nibbles
    ours = dequantize(39, raw, 256 * 32, isa=isa).reshape(256, 32)
    with np.errstate(over="ignore"):
        same(ours[:255], dequantized(39, raw[:255]))
    code = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    assert (ours[0] == np.tile(code, 2) * 2.0**-127).all() and ours[0].any(), "e = 0 gives denormals, not zeros"
    assert np.isnan(ours[255]).all(), "E8M0 255 is NaN"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("t", TYPES, ids=lambda t: t.name)
def test_unaligned_buffers_and_exact_sizes(t, isa):
    raw = random_blocks(t.id, 3, 256, np.random.default_rng(3))
    want = dequantized(t.id, raw)
    for shift in (1, 3):
        moved = np.empty(raw.nbytes + shift, np.uint8)
        moved[shift:] = raw.ravel()
        same(dequantize(t.id, moved[shift:], 3 * 256, isa=isa), want)
    assert dequantize(t.id, raw, 0, isa=isa).shape == (0,)


@pytest.mark.parametrize("t", [q for q in TYPES if q.block_size == 1], ids=lambda t: t.name)
def test_tails_of_unquantized_rows(t):
    raw = random_blocks(t.id, 1, 64, np.random.default_rng(5))
    for n in range(1, 40):
        same(dequantize(t.id, raw[0, : t.row_bytes(n)], n), dequantized(t.id, raw)[0, :n])


def test_refusals():
    with pytest.raises(InvalidRequest, match="not supported"):
        dequantize(4, b"\0" * 64, 32)
    with pytest.raises(InvalidRequest, match="no multiple"):
        dequantize(2, b"\0" * 64, 33)
    with pytest.raises(InvalidRequest, match="hold fewer"):
        dequantize(2, b"\0" * 17, 32)
    with pytest.raises(InvalidRequest, match="instruction set 'mmx'"):
        dequantize(2, b"\0" * 18, 32, isa="mmx")


def test_cpu_features(monkeypatch):
    features = cpu_features()
    assert features["isa"] == features["available"][0] and features["available"][-1] == "baseline"
    assert features["cores"] >= 1
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", "baseline")
    assert cpu_features()["isa"] == "baseline"
