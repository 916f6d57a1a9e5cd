"""MXFP4 quantization: float32 rows to blocks of one E8M0 scale and 32 E2M1 codes, each block as well as the format can.

A block stores 17 bytes: the scale byte e, meaning 2^(e - 127), then 16 bytes with the codes of elements 0-15 in the low
and of elements 16-31 in the high nibbles. The magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.
Source of the format: OCP Microscaling Formats (MX) v1.0.

Which scale is best: let k be the exponent with max|x| / 2^k in [4, 8). Grid values of the scales above k + 1 that are
below 8 * 2^k lie on the grid of k + 1 too, so none of them is better than k + 1. Below k - 1 the largest element is cut
by at least 2.5 * 2^k, and the other 31 cannot make up for its square: up to 1.5 * 2^k the grid of k is at most
0.25 * 2^k off, and beyond that it is never further off than the cut. So the best of k - 1, k and k + 1 is the best.
"""

from __future__ import annotations

import numpy as np

BLOCK_SIZE, TYPE_SIZE = 32, 17
#: values of the 16 codes
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
#: elements worked on together: their temporaries stay in the cache
_CHUNK = 1 << 16
_BIAS, _MAX_SCALE = 127, 254
#: floor(4 * magnitude), cut at 24 -> code of the nearest magnitude; all rounding borders are multiples of 1/4
_CODE = np.searchsorted(np.array([1, 3, 5, 7, 10, 14, 20]), np.arange(25), side="right").astype(np.uint8)
_VALUE = E2M1[_CODE]


def quantize(x: np.ndarray) -> np.ndarray:
    """Blocks with the smallest sum of squared errors; of equally good scales the smallest.

    Args:
        x: finite float32 [..., n], n a multiple of 32.

    Returns:
        uint8 [..., n / 32 * 17].
    """
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK_SIZE)
    out = np.empty((len(blocks), TYPE_SIZE), np.uint8)
    step = _CHUNK // BLOCK_SIZE
    for start in range(0, len(blocks), step):
        _quantize_blocks(blocks[start : start + step], out[start : start + step])
    return out.reshape(*x.shape[:-1], -1)


def _quantize_blocks(x: np.ndarray, out: np.ndarray) -> None:
    """float32 [n, 32] to uint8 [n, 17]."""
    magnitudes = np.abs(x)
    largest = magnitudes.max(axis=1)
    exponent = np.frexp(largest)[1] - 3 + _BIAS  # frexp's mantissa is below 1: largest / 2^exponent is in [4, 8)
    exponent[largest == 0] = 0
    best_scale = best_error = best_quarters = None
    for offset in (-1, 0, 1):
        scale = np.clip(exponent + offset, 0, _MAX_SCALE)
        quarters, error = _scaled(magnitudes, scale)
        # errors are in units of each one's own scale, so that no block's square overflows
        error = np.ldexp(error, 2 * (scale - exponent.clip(0)))
        if best_error is None:
            best_scale, best_error, best_quarters = scale, error, quarters
            continue
        better = error < best_error
        best_scale = np.where(better, scale, best_scale)
        best_error = np.where(better, error, best_error)
        best_quarters[better] = quarters[better]
    codes = _CODE.take(best_quarters)
    codes |= ((x < 0) & (codes > 0)).view(np.uint8) << np.uint8(3)
    out[:, 0] = best_scale
    out[:, 1:] = codes[:, :16] | codes[:, 16:] << np.uint8(4)


def _scaled(magnitudes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(floor(4 * magnitude / 2^(scale - 127)) cut at 24, uint8 [n, 32]; sum of squared errors in that unit, [n])."""
    scaled = magnitudes * np.ldexp(np.float32(1), _BIAS - scale)[:, None]
    quarters = np.minimum(scaled * np.float32(4), np.float32(24)).astype(np.uint8)
    scaled -= _VALUE.take(quarters)
    return quarters, np.einsum("ij,ij->i", scaled, scaled)
