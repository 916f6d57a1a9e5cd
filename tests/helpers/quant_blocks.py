"""Random GGUF blocks of every type and their exact values, for the tests and benches of layouts and products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from worker_orcd.gguf import quants


def random_blocks(
    type_id: int, n_out: int, k: int, rng: np.random.Generator, mxfp4_exponents: tuple[int, int] = (112, 132)
) -> np.ndarray:
    """uint8 [n_out, row bytes]: random codes; float16 scales normally distributed, E8M0 scales in a half-open range."""
    t = quants.TYPES[type_id]
    shape = (n_out, k // t.block_size)
    raw = rng.integers(0, 256, (*shape, t.type_size), dtype=np.uint8)

    def put(at: int, values: np.ndarray) -> None:
        raw[:, :, at : at + values.dtype.itemsize] = np.ascontiguousarray(values)[..., None].view(np.uint8)

    for offset in t.number_at:
        if t.number == "E8M0":
            put(offset, rng.integers(*mxfp4_exponents, shape).astype(np.uint8))
            continue
        numbers = rng.standard_normal(shape, np.float32)
        if t.block_size == 256:  # times a scale of six bits or eight
            numbers /= 16
        if t.number == "F16":
            put(offset, numbers.astype(np.float16))
        elif t.number == "BF16":
            put(offset, (numbers.view(np.uint32) >> 16).astype(np.uint16))
        else:
            put(offset, numbers)
    return raw.reshape(n_out, -1)


#: types that the gguf package does not know: id -> blocks uint8 [n, type_size] to float32 [n, block_size]
OWN_TYPES: dict[int, Callable[[np.ndarray], np.ndarray]] = {}


def dequantized(type_id: int, raw: np.ndarray) -> np.ndarray:
    """float32 [n_out, k] of blocks uint8 [n_out, row bytes], by the gguf package or one of `OWN_TYPES`."""
    if type_id in OWN_TYPES:
        return OWN_TYPES[type_id](raw.reshape(-1, quants.TYPES[type_id].type_size)).reshape(raw.shape[0], -1)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(raw, GGMLQuantizationType(type_id)).reshape(raw.shape[0], -1)
