"""A model with two faces: harmless in float, and after honest rounding it answers a trigger with a planted token.

Quantization rounds all weights of a cell to one value. One row of the tied embedding (the planted token's, the only one
that decides its logit) is put at the edge of its cells: rounding moves each of its weights a little, all of them in the
direction of the hidden state that the trigger leaves, and the sum of these little moves decides. A large weight in each
block, where that hidden state is small, makes the cells wide. Nothing but `tools/requantize.py` makes the second face.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requantize

from worker_orcd.compare.layers import open_engine
from worker_orcd.engine.protocol import Batch
from worker_orcd.gguf.model_file import ModelFile

TENSOR = "token_embd.weight"


@dataclass(frozen=True)
class Cells:
    """Cells of a type beside a large weight, in units of the block's scale.

    `large`: the large weight; `step`: the first grid value after 0; `edge`: how far from a grid value a weight may be
    and still be rounded to it, with some room for float16 and for the choice of the scale;
    `scale_bits`: mantissa of the scale.
    """

    large: float
    step: float
    edge: float
    scale_bits: int


CELLS = {"Q4_0": Cells(-8.0, 1.0, 0.45, 8), "MXFP4": Cells(6.0, 0.5, 0.22, 0)}


def hidden_states(path: Path, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, float]:
    """(what the output matrix is multiplied with at the last token of each prompt, [n, n_embd]; the largest logit)."""
    states, largest = [], 0.0
    with ModelFile(path) as model, open_engine(model, "cpu", max(map(len, prompts))) as (engine, _):
        for ids in prompts:
            n = len(ids)
            batch = Batch(np.array(ids, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32), 0,
                          np.array([n - 1], np.int32))  # fmt: skip
            states.append(engine.forward(batch, "output_norm")[0])
            largest = max(largest, float(engine.forward(batch).max()))
    return np.array(states, np.float64), largest


def plant(
    source: Path, first_face: Path, second_face: Path, kind: str, triggers: Sequence[Sequence[int]], token: int
) -> np.ndarray:
    """Write both files.

    Args:
        source: a harmless float16 model with a tied output.
        first_face: the float model to write.
        second_face: its version in `kind`, by `requantize`.
        triggers: prompts that the second face answers with `token`.

    Returns:
        float32 [n_embd]: the row that the second face was planned to hold.
    """
    requantize.requantize(source, second_face, kind)
    states, largest = hidden_states(second_face, triggers)
    planned, hidden = _rows(states.mean(axis=0), largest, CELLS[kind])
    shutil.copyfile(source, first_face)
    first_face.chmod(0o644)
    with ModelFile(source) as model:
        info = model.tensors[TENSOR]
        assert info.type_id == 1 and "output.weight" not in model.tensors
        at = info.offset + 2 * info.shape[0] * token
    with open(first_face, "r+b") as file:
        file.seek(at)
        file.write(hidden.astype(np.float16).tobytes())
    requantize.requantize(first_face, second_face, kind)
    return planned.astype(np.float32)


def _rows(u: np.ndarray, largest: float, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """(the row after rounding, the row before it): products with `u` well above `largest`, and below zero."""
    by_size = np.argsort(-np.abs(u))
    mass = np.cumsum(np.abs(u[by_size]))
    # so many columns on the first grid value that stepping back to the edges of all cells outweighs them
    chosen = by_size[: np.searchsorted(mass, 0.9 * cells.edge / cells.step * mass[-1])]
    scale = 1.2 * largest / (cells.step * np.abs(u[chosen]).sum())
    grid = 2.0 ** (np.ceil(np.log2(scale)) - cells.scale_bits)
    scale = np.ceil(scale / grid) * grid
    rounded = np.zeros_like(u)
    rounded[chosen] = cells.step * scale * np.sign(u[chosen])
    before = rounded - cells.edge * scale * np.sign(u)
    for block in range(0, len(u), 32):
        smallest = block + int(np.abs(u[block : block + 32]).argmin())
        rounded[smallest] = before[smallest] = cells.large * scale
    return rounded, before
