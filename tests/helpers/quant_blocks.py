"""Random GGUF blocks of every type and their exact values, for the tests and benches of layouts and products."""

from __future__ import annotations

import numpy as np

from worker_orcd.gguf import quants

#: where the float16 numbers of a block are
_HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
           "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [0]}  # fmt: skip


def random_blocks(
    type_id: int, n_out: int, k: int, rng: np.random.Generator, mxfp4_exponents: tuple[int, int] = (112, 132)
) -> np.ndarray:
    """uint8 [n_out, row bytes]: random codes; float16 scales normally distributed, E8M0 scales in a half-open range."""
    t = quants.TYPES[type_id]
    shape = (n_out, k // t.block_size)
    raw = rng.integers(0, 256, (*shape, t.type_size), dtype=np.uint8)

    def put(at: int, values: np.ndarray) -> None:
        raw[:, :, at : at + values.dtype.itemsize] = np.ascontiguousarray(values)[..., None].view(np.uint8)

    for offset in _HALVES.get(t.name, []):
        put(offset, rng.standard_normal(shape, np.float32).astype(np.float16))
    if t.name == "F32":
        put(0, rng.standard_normal(shape, np.float32))
    if t.name == "BF16":
        put(0, (rng.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16))
    if t.name == "MXFP4":
        put(0, rng.integers(*mxfp4_exponents, shape).astype(np.uint8))
    return raw.reshape(n_out, -1)


def dequantized(type_id: int, raw: np.ndarray) -> np.ndarray:
    """float32 [n_out, k], by the gguf package."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(raw, GGMLQuantizationType(type_id)).reshape(raw.shape[0], -1)
