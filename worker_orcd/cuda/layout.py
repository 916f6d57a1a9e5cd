"""The CUDA kernels' view of matrices: bytes of the repacked layouts, converted activations, launch geometry.

The Python mirror of csrc/cuda/quant/layout.cuh and the constants of matvec.cu and matmul.cu there, for the VRAM plan,
the lowering and the kernel tests. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from worker_orcd.gguf import quants

#: rows of a row tile, the k tile of the layout along n_out
TILE_ROWS = 16
#: dynamic shared memory that every supported GPU grants one block, less the driver's own
SMEM_SMALL = 99 * 1024
_DENSE = frozenset({"F32", "F16", "BF16"})
#: types whose packed tiles are followed by one float32 per row: their weights may lie outside the range of fp16
ROW_SCALED = frozenset({"F32", "BF16", "MXFP4"})
#: rows one decode launch can take, by kernel variant (tiles of 8 rows)
MATVEC_TILES = (1, 2, 4, 8)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def kernel_suffix(type_id: int) -> str:
    """The type's name in kernel names, for example ``"q4_k"``."""
    return quants.TYPES[type_id].name.lower()


def tile_k(type_id: int) -> int:
    """Columns of one packed tile: 256 for K-quants, else 64."""
    return max(64, quants.TYPES[type_id].block_size)


def n_k_tiles(type_id: int, k: int) -> int:
    """Packed tiles of a row tile of row length `k` (a multiple of 32)."""
    return -(-k // tile_k(type_id))


def k_padded(type_id: int, k: int) -> int:
    """Row length in whole packed tiles; activations are zero-padded to it."""
    return n_k_tiles(type_id, k) * tile_k(type_id)


def n_row_tiles(n_out: int) -> int:
    """Row tiles of a matrix of `n_out` rows."""
    return -(-n_out // TILE_ROWS)


def packed_tile_bytes(type_id: int) -> int:
    """Bytes of one packed tile: what its 16 rows x tile_k weights have in the file."""
    return TILE_ROWS * quants.TYPES[type_id].row_bytes(tile_k(type_id))


def packed_bytes(type_id: int, n_out: int, k: int) -> int:
    """Device bytes of a repacked matrix [n_out, k], row scales included."""
    row_tiles = n_row_tiles(n_out)
    scales = 4 * TILE_ROWS * row_tiles if quants.TYPES[type_id].name in ROW_SCALED else 0
    return row_tiles * n_k_tiles(type_id, k) * packed_tile_bytes(type_id) + scales


# ---- converted activations -------------------------------------------------------------------------------------------


def x_f16_bytes(type_id: int, k: int) -> int:
    """Bytes of a row written by convert_f16."""
    return 2 * k_padded(type_id, k)


def x_split_bytes(type_id: int, k: int) -> int:
    """Bytes of a row written by convert_split, and of a row in shared memory of the 1-tile decode kernels.

    Per 32 columns 128 bytes (bf16 high parts, then low parts) and 8 bytes of sums; the odd multiple of 64 keeps the
    rows of a tile on different banks.
    """
    return _round_up(k_padded(type_id, k) // 32 * 136, 128) + 64


# ---- decode: matvec_<type>_<tiles> -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatvecShape:
    """Compile-time constants of one decode kernel (csrc/cuda/matmul_shapes.cuh, MatvecShape)."""

    stage_k_tiles: int
    row_tiles: int
    depth: int
    slot_bytes: int

    @property
    def ring_bytes(self) -> int:
        """Shared memory of one warp's weight ring."""
        return self.depth * self.slot_bytes


def matvec_shape(type_id: int, tiles: int) -> MatvecShape:
    """The constants of matvec_<type>_<tiles>."""
    k_tiles = 2 if tile_k(type_id) == 64 and quants.TYPES[type_id].name not in _DENSE else 1
    stage = k_tiles * packed_tile_bytes(type_id)
    two_fit = tiles == 4 or (tile_k(type_id) == 64 and quants.TYPES[type_id].name != "Q5_1")
    row_tiles = 2 if tiles >= 4 and stage <= 2304 and two_fit else 1
    slot = row_tiles * stage
    return MatvecShape(k_tiles, row_tiles, max(2, min(4, 10240 // slot)), slot)


def matvec_warps(type_id: int, k: int) -> int:
    """Warps of a block, which is also the number of parts that K is split into.

    It fixes the order of summation, so it depends on type and K alone, never on the number of rows. The fewest warps
    that need as few rounds as eight would.
    """
    stages = -(-n_k_tiles(type_id, k) // matvec_shape(type_id, 1).stage_k_tiles)
    rounds = -(-stages // 8)
    return -(-stages // rounds)


@dataclass(frozen=True)
class Launch:
    """How to launch a kernel: its name, grid, threads of a block and dynamic shared memory bytes.

    Of decode kernels also the bytes of their weight rings, the rows of their tiles (1 tile for float32 input, several
    for input by convert_split, padded to whole tiles) and whether they need that.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    smem: int
    ring_bytes: int = 0
    tile_rows: int = 0
    needs_split: bool = False


def matvec_launch(
    type_id: int, k: int, n_outs: tuple[int, ...], n_rows: int, *, n_sm: int, max_smem: int = SMEM_SMALL
) -> Launch:
    """The decode launch for up to four matrices [n_out, k] of one type and one input of 1 .. 64 rows.

    Args:
        type_id, k, n_outs: the matrices.
        n_rows: rows of the input.
        n_sm: multiprocessors of the GPU.
        max_smem: dynamic shared memory bytes that a block may have.

    Returns:
        `needs_split` says that the input must have been converted by convert_split; else the kernel takes float32.
    """
    total = sum(n_row_tiles(n) for n in n_outs)
    warps = matvec_warps(type_id, k)
    tiles = next(t for t in MATVEC_TILES if n_rows <= 8 * t)
    while True:
        shape = matvec_shape(type_id, tiles)
        ring = warps * shape.ring_bytes
        smem = ring + 2 * warps * shape.row_tiles * 512
        if tiles == 1:
            smem += n_rows * x_split_bytes(type_id, k)
            if smem > max_smem:  # the rows do not fit beside the weights: read them from memory
                tiles = 2
                continue
        # As many blocks as the GPU holds at once (registers, then shared memory): each stays for several tiles, so that
        # one tile's weights arrive while the one before is being summed.
        resident = max(1, min({1: 24, 2: 16, 4: 8, 8: 8}[tiles] // warps, 227 * 1024 // (smem + 1024)))
        grid = min(-(-total // shape.row_tiles), n_sm * resident)
        name = f"matvec_{kernel_suffix(type_id)}_{tiles}"
        return Launch(name, (grid, 1, 1), 32 * warps, smem, ring, 8 * tiles, tiles > 1)


# ---- prefill: matmul_<type> and matmul_<type>_small ------------------------------------------------------------------


#: rows of the input in a tile of either prefill kernel; convert_f16 must have written whole tiles
MATMUL_TILE_ROWS = 64


def matmul_stages(type_id: int, small: bool) -> tuple[int, int, int]:
    """(activation stages, weight slots, shared memory bytes) of a prefill kernel (matmul_shapes.cuh, MatmulShape)."""
    x, w = MATMUL_TILE_ROWS * 128, (4 if small else 8) * packed_tile_bytes(type_id)
    for stages in (4, 3, 2):
        slots = 2 if tile_k(type_id) == 256 else stages
        smem = stages * x + slots * w
        if smem <= (49152 if small else 75776):
            break
    return stages, slots, smem


@lru_cache(maxsize=4096)  # asked for by every product of every step with prompt rows
def matmul_launch(type_id: int, n_out: int, n_rows: int, n_sm: int) -> Launch:
    """The prefill launch for a matrix of `n_out` rows and an input of `n_rows` rows converted by convert_f16.

    Both variants give the same bits; the small one is for products that do not fill the GPU with large tiles.
    """
    row_tiles = -(-n_rows // MATMUL_TILE_ROWS)
    small = -(-n_out // 128) * row_tiles < 3 * n_sm
    grid = (-(-n_out // (64 if small else 128)), row_tiles, 1)
    name = f"matmul_{kernel_suffix(type_id)}" + ("_small" if small else "")
    return Launch(name, grid, 128, matmul_stages(type_id, small)[2])
