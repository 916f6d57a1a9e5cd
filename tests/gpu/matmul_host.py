"""Matrices and products on the device, launched as csrc/params and worker_orcd/cuda/layout.py say.

Shared by the tests of the matrix kernels and tools/bench_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gpu.kernel_harness import CONSTANTS, Buffer, Gpu, params

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


class Converted:
    """`n_rows` rows of x as convert_rows leaves them, before `pad` rows of zeros; `run` queues the conversion.

    `norm`: None, or (kind, weight, bias, eps) of the norm before. `order`: CONVERTED_*; of tiles the factors are in
    `factors`. `places`, of tiles: (address of the place of each slot of a row, slots, places).
    """

    def __init__(self, gpu: Gpu, k: int, x: Buffer, n_rows: int, stride: int, pad: int = 0,
                 norm: tuple[str, Buffer, Buffer | None, float] | None = None, n_inputs: int = 1,
                 order: str = "fragments", places: tuple[int, int, int] | None = None) -> None:  # fmt: skip
        self.gpu, self.n_inputs, self.pad_rows = gpu, n_inputs, n_rows + pad
        self.rows = gpu.empty((n_inputs * self.pad_rows, layout.x_f16_bytes(k)), np.uint8)
        self.factors = None
        at, n_used, room = places or (0, 0, self.pad_rows)
        if order == "tiles":
            self.rows = gpu.empty((2 * -(-k // 256), 2, room, 128), np.uint8)
            self.factors = gpu.empty((layout.n_chunks(k), room))
        kind, weight, bias, eps = norm or ("plain", None, None, 0.0)
        self.params = params(
            "ConvertParams", x=x, weight=weight, bias=bias, out=self.rows, x_stride=stride, input_stride=k,
            out_bytes=layout.x_f16_bytes(k), k=k, n_rows=n_rows, n_pad_rows=self.pad_rows,
            kind=CONSTANTS[f"CONVERT_{kind.upper()}"], eps=eps, order=CONSTANTS[f"CONVERTED_{order.upper()}"],
            factors=self.factors, factor_stride=room, places=at, places_stride=n_used,
            n_copies=n_used // n_inputs)  # fmt: skip

    def run(self, pdl: bool = False) -> None:
        """Queue the conversion."""
        name = "convert_rows_to_places" if self.params.places else "convert_rows"
        kernel = self.gpu.kernel("convert", name)
        self.gpu.launch(kernel, (self.pad_rows, self.n_inputs), 256, self.params, pdl=pdl)


class Decode:
    """Launches for 1 to 64 rows over matrices that share the input; `run` queues them and, where they need one, the
    conversion of x.

    Args:
        mode: "store", "add" or "glu".
        glu: GLU_* of `mode` "glu".
        norm: as of `Converted`; "rms" is applied by the launch itself where there is one row.
        inline: one row is converted by the launch.
        max_smem: shared memory of a block, of a GPU that has less than this one.
        how: of `layout.decode_launch`.
    """

    def __init__(
        self, gpu: Gpu, matrices: Sequence[Matrix], x: Buffer, outs: Sequence[Buffer], n_rows: int, *,
        x_stride: int | None = None, biases: Sequence[Buffer | None] | None = None, mode: str = "store", glu: int = 0,
        norm: tuple[str, Buffer, Buffer | None, float] | None = None, inline: bool = True,
        max_smem: int | None = None, **how: int,
    ) -> None:  # fmt: skip
        m = matrices[0]
        self.gpu = gpu
        max_smem = max_smem or gpu.max_smem
        few = n_rows <= layout.DECODE_ROWS
        inline = inline and n_rows == 1 and (norm is None or norm[0] == "rms")
        how = how if inline else {**how, "converts": 0}
        pad = -n_rows % 64
        self.converted = None if inline else Converted(gpu, m.k, x, n_rows, x_stride or m.k, pad, norm)
        both = {
            "rows": self.converted.rows if self.converted else None, "x_bytes": layout.x_f16_bytes(m.k), "k": m.k,
            "n_k_tiles": layout.n_k_tiles(m.type_id, m.k), "n_rows": n_rows,
            "mode": CONSTANTS[f"PRODUCT_{mode.upper()}"],
        }  # fmt: skip
        biases = biases or [None] * len(matrices)
        if few:
            gated = mode == "glu"
            tile_bytes = both["n_k_tiles"] * layout.packed_tile_bytes(m.type_id)
            both |= {
                "tile_bytes": tile_bytes, "n_chunks": layout.n_chunks(m.k), "x": x if inline else None, "glu": glu,
                "norm_weight": norm[1] if norm and inline else None, "eps": norm[3] if norm else 0.0,
                "inverse_k": layout.inverse(m.k),
            }  # fmt: skip
            told = ("n_warps", "n_groups", "depth", "batch", "ring_bytes", "x_smem", "factors", "n_staged", "staged",
                    "barriers", "block_tiles", "more_tiles")  # fmt: skip
            self.launches = []
            for i, (a, out) in enumerate(zip(matrices, outs, strict=True)):
                if gated and i:
                    break
                launch = layout.decode_launch(a.type_id, a.k, a.n_out, n_rows, n_sm=gpu.n_sm, max_smem=max_smem,
                                              glu=gated, **how)  # fmt: skip
                pair = [{"w": b.w, "bias": c} for b, c in zip(matrices, biases, strict=True)]
                p = params(
                    "DecodeParams", **both, **{name: getattr(launch, name) for name in told},
                    m=pair if gated else pair[i : i + 1], out=out, out_stride=out.shape[1],
                    n_out=a.n_out, scales_at=layout.n_row_tiles(a.n_out) * tile_bytes)  # fmt: skip
                self.launches.append((gpu.kernel("decode", launch.kernel), launch, p))
            return
        parts, row_tile0 = [], 0
        for a, out, bias in zip(matrices, outs, biases, strict=True):
            parts.append({"w": a.w, "bias": bias, "out": out, "out_stride": out.shape[1], "n_out": a.n_out,
                          "row_tile0": row_tile0})  # fmt: skip
            row_tile0 += layout.n_row_tiles(a.n_out)
        launch = layout.matvec_launch(m.type_id, m.k, tuple(a.n_out for a in matrices), n_rows, n_sm=gpu.n_sm,
                                      max_smem=max_smem)  # fmt: skip
        p = params("MatvecParams", **both, m=parts, n_matrices=len(parts), n_row_tiles=row_tile0,
                   ring_bytes=launch.ring_bytes)  # fmt: skip
        self.launches = [(gpu.kernel("matvec", launch.kernel), launch, p)]

    def run(self, pdl: bool = False, convert_x: bool = True) -> None:
        """Queue the conversion of x (where it is needed) and the products."""
        if self.converted and convert_x:
            self.converted.run(pdl)
        for kernel, launch, p in self.launches:
            self.gpu.launch(kernel, launch.grid, launch.block, p, launch.smem, pdl)


class Matmul:
    """One prefill launch; `run` queues it. `small` chooses the variant, else `cuda.layout` does."""

    def __init__(self, gpu: Gpu, m: Matrix, x: Buffer, out: Buffer, n_rows: int, *, x_stride: int | None = None,
                 bias: Buffer | None = None, add: bool = False, small: bool | None = None,
                 norm: tuple[str, Buffer, Buffer | None, float] | None = None) -> None:  # fmt: skip
        self.gpu = gpu
        # 2^20 multiprocessors make every product a small one
        n_sm = gpu.n_sm if small is None else (1 << 20) * small
        self.launch = layout.matmul_launch(m.type_id, m.k, m.n_out, n_rows, n_sm)
        self.converted = Converted(gpu, m.k, x, n_rows, x_stride or m.k, -n_rows % layout.MATMUL_TILE_ROWS, norm)
        self.params = params(
            "MatmulParams", w=m.w, x=self.converted.rows, bias=bias, out=out, x_bytes=layout.x_f16_bytes(m.k),
            out_stride=out.shape[1], n_out=m.n_out, k=m.k, n_k_tiles=layout.n_k_tiles(m.type_id, m.k), n_rows=n_rows,
            add=int(add))  # fmt: skip
        self.kernel = gpu.kernel("matmul", self.launch.kernel)

    def run(self, pdl: bool = False, convert_x: bool = True) -> None:
        """Queue the conversion of x and the product."""
        if convert_x:
            self.converted.run(pdl)
        self.gpu.launch(self.kernel, self.launch.grid, self.launch.block, self.params, self.launch.smem, pdl)


class ManyRows:
    """One launch of wgmma_* over matrices that share the input; `run` queues it and the conversion of x.

    Args:
        tile_rows: rows of a tile, else `layout.many_rows_launch` chooses.
        mode: "store", "add" or "glu" (of two matrices; results go to the first of `outs`).
        grid: blocks, else one for each multiprocessor.
    """

    def __init__(
        self, gpu: Gpu, matrices: Sequence[Matrix], x: Buffer, outs: Sequence[Buffer], n_rows: int, *,
        tile_rows: int | None = None, x_stride: int | None = None, biases: Sequence[Buffer | None] | None = None,
        mode: str = "store", glu: int = 0, norm: tuple[str, Buffer, Buffer | None, float] | None = None,
        grid: int | None = None,
    ) -> None:  # fmt: skip
        m = matrices[0]
        self.gpu = gpu
        n_tiles = [layout.n_row_tiles(a.n_out) for a in matrices]
        self.launch = layout.many_rows_launch(m.type_id, m.k, sum(n_tiles), n_rows, grid or gpu.n_sm, tile_rows)
        self.converted = Converted(gpu, m.k, x, n_rows, x_stride or m.k, -n_rows % 8, norm, order="tiles")
        parts = [
            {"w": a.w, "bias": bias, "out": out, "out_stride": out.shape[1], "n_out": a.n_out,
             "row_tile0": sum(n_tiles[:i])}
            for i, (a, bias, out) in enumerate(zip(matrices, biases or [None] * len(matrices), outs, strict=True))
        ]  # fmt: skip
        self.params = params(
            "ManyRowsParams", m=parts, x=self.converted.rows, factors=self.converted.factors,
            factor_stride=self.converted.pad_rows, n_matrices=len(parts), n_row_tiles=sum(n_tiles),
            n_tiles_m=self.launch.tiles_m, n_tiles_n=self.launch.tiles_n, k=m.k,
            n_k_tiles=layout.n_k_tiles(m.type_id, m.k), n_rows=n_rows, mode=CONSTANTS[f"PRODUCT_{mode.upper()}"],
            glu=glu)  # fmt: skip
        self.kernel = gpu.kernel("wgmma", self.launch.kernel)

    def run(self, pdl: bool = False, convert_x: bool = True) -> None:
        """Queue the conversion of x and the product."""
        if convert_x:
            self.converted.run(pdl)
        self.gpu.launch(self.kernel, self.launch.grid, self.launch.block, self.params, self.launch.smem, pdl)


def row_lengths(type_id: int, lengths: Sequence[int]) -> list[int]:
    """Those of `lengths` that are whole blocks of the type."""
    return [k for k in lengths if k % quants.TYPES[type_id].block_size == 0]
