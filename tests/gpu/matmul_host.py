"""Matrices and products on the device, launched as csrc/params and worker_orcd/cuda/layout.py say.

Shared by the tests of the matrix kernels and tools/bench_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gpu.kernel_harness import Buffer, Gpu, params

from worker_orcd.cuda import layout
from worker_orcd.gguf import quants


@dataclass
class Matrix:
    """A repacked matrix [n_out, k] on the device."""

    type_id: int
    n_out: int
    k: int
    w: Buffer


def repack(gpu: Gpu, type_id: int, raw: np.ndarray, k: int, piece: int = 1 << 30) -> Matrix:
    """Upload GGUF rows uint8 [n_out, row bytes] and repack them, `piece` rows (a multiple of 16) at a time."""
    n_out = raw.shape[0]
    w = gpu.empty(layout.packed_bytes(type_id, n_out, k), np.uint8)
    kernel = gpu.kernel("repack", f"repack_{layout.kernel_suffix(type_id)}")
    for row0 in range(0, n_out, piece):
        rows = gpu.buffer(raw[row0 : row0 + piece])
        n = min(piece, n_out - row0)
        p = params("RepackParams", rows=rows, w=w, row_bytes=raw.shape[1], k=k, n_out=n_out, row0=row0,
                   n_rows=n)  # fmt: skip
        gpu.launch(kernel, (layout.n_row_tiles(n), 2), 256, p)
        gpu.sync()
        rows.check_guards()
    return Matrix(type_id, n_out, k, w)


def convert(gpu: Gpu, kernel: str, m: Matrix, x: Buffer, n_rows: int, stride: int, out: Buffer, scale: Buffer | None,
            pdl: bool = False) -> None:  # fmt: skip
    """Launch a conversion of x into `out` (all its rows)."""
    pad_rows, out_bytes = out.shape
    k_pad = layout.k_padded(m.type_id, m.k)
    p = params("ConvertParams", x=x, out=out, scale=scale, x_stride=stride, out_bytes=out_bytes, k=m.k,
               k_pad=k_pad, n_rows=n_rows, n_pad_rows=pad_rows)  # fmt: skip
    grid = (-(-k_pad // 2048), pad_rows) if kernel == "convert_split" else (pad_rows,)
    gpu.launch(gpu.kernel("convert", kernel), grid, 256, p, pdl=pdl)


class Matvec:
    """One decode launch over matrices that share the input; `run` queues it."""

    def __init__(
        self, gpu: Gpu, matrices: Sequence[Matrix], x: Buffer, outs: Sequence[Buffer], n_rows: int, *,
        x_stride: int | None = None, biases: Sequence[Buffer | None] | None = None, add: bool = False,
    ) -> None:  # fmt: skip
        m = matrices[0]
        self.gpu, self.x, self.m, self.n_rows, self.x_stride = gpu, x, m, n_rows, x_stride or m.k
        n_outs = tuple(a.n_out for a in matrices)
        self.launch = layout.matvec_launch(m.type_id, m.k, n_outs, n_rows, n_sm=gpu.n_sm, max_smem=gpu.max_smem)
        self.split = None
        if self.launch.needs_split:
            pad = 8 * int(self.launch.kernel.rsplit("_", 1)[1])
            self.split = gpu.empty((pad, layout.x_split_bytes(m.type_id, m.k)), np.uint8)
        parts, row_tile0 = [], 0
        for i, (a, out) in enumerate(zip(matrices, outs, strict=True)):
            parts.append({"w": a.w, "bias": biases[i] if biases else None, "out": out, "out_stride": out.shape[1],
                          "n_out": a.n_out, "row_tile0": row_tile0, "add": int(add)})  # fmt: skip
            row_tile0 += layout.n_row_tiles(a.n_out)
        self.params = params(
            "MatvecParams", m=parts, x=x, split=self.split, x_stride=self.x_stride,
            split_bytes=layout.x_split_bytes(m.type_id, m.k), n_matrices=len(parts), n_row_tiles=row_tile0, k=m.k,
            n_k_tiles=layout.n_k_tiles(m.type_id, m.k), n_rows=n_rows, ring_bytes=self.launch.ring_bytes)  # fmt: skip
        self.kernel = gpu.kernel("matvec", self.launch.kernel)

    def run(self, pdl: bool = False, convert_x: bool = True) -> None:
        """Queue the conversion of x (where this launch needs one) and the product."""
        if self.split and convert_x:
            convert(self.gpu, "convert_split", self.m, self.x, self.n_rows, self.x_stride, self.split, None, pdl)
        self.gpu.launch(self.kernel, self.launch.grid, self.launch.block, self.params, self.launch.smem, pdl)


class Matmul:
    """One prefill launch; `run` queues it. `small` chooses the variant, else `cuda.layout` does."""

    def __init__(self, gpu: Gpu, m: Matrix, x: Buffer, out: Buffer, n_rows: int, *, x_stride: int | None = None,
                 bias: Buffer | None = None, add: bool = False, small: bool | None = None) -> None:  # fmt: skip
        self.gpu, self.m, self.x, self.n_rows, self.x_stride = gpu, m, x, n_rows, x_stride or m.k
        # 2^20 multiprocessors make every product a small one
        n_sm = gpu.n_sm if small is None else (1 << 20) * small
        self.launch = layout.matmul_launch(m.type_id, m.n_out, n_rows, n_sm)
        pad = -(-n_rows // layout.MATMUL_TILE_ROWS) * layout.MATMUL_TILE_ROWS
        self.half = gpu.empty((pad, layout.x_f16_bytes(m.type_id, m.k)), np.uint8)
        self.scale = gpu.empty(pad)
        self.params = params(
            "MatmulParams", w=m.w, x=self.half, x_scale=self.scale, bias=bias, out=out,
            x_bytes=self.half.shape[1], out_stride=out.shape[1], n_out=m.n_out,
            n_k_tiles=layout.n_k_tiles(m.type_id, m.k), n_rows=n_rows, add=int(add))  # fmt: skip
        self.kernel = gpu.kernel("matmul", self.launch.kernel)

    def run(self, pdl: bool = False, convert_x: bool = True) -> None:
        """Queue the conversion of x and the product."""
        if convert_x:
            convert(self.gpu, "convert_f16", self.m, self.x, self.n_rows, self.x_stride, self.half, self.scale, pdl)
        self.gpu.launch(self.kernel, self.launch.grid, self.launch.block, self.params, self.launch.smem, pdl)


def row_lengths(type_id: int, lengths: Sequence[int]) -> list[int]:
    """Those of `lengths` that are whole blocks of the type."""
    return [k for k in lengths if k % quants.TYPES[type_id].block_size == 0]
