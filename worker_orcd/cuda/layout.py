"""The CUDA kernels' view of matrices: bytes of the repacked layouts, converted activations, launch geometry.

The Python mirror of csrc/cuda/quant/layout.cuh, params/convert_params.h and the constants of decode.cu, matvec.cu and
matmul.cu, for the VRAM plan, the lowering and the kernel tests. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from worker_orcd.gguf import quants

#: rows of a row tile, the k tile of the layout along n_out
TILE_ROWS = 16
#: dynamic shared memory that every supported GPU grants one block, less the driver's own
SMEM_SMALL = 99 * 1024
_DENSE = frozenset({"F32", "F16", "BF16"})
#: types whose packed tiles are followed by one float32 per row: their weights may lie outside the range of fp16
ROW_SCALED = frozenset({"F32", "BF16", "MXFP4"})
#: columns of a piece of a converted row
PIECE = 256
#: rows of a decode_* launch
DECODE_ROWS = 8
#: tiles of 8 rows that one matvec_* launch can take, by kernel variant, and the most rows; where a step has more decode
#: rows, products take them for prompt rows
MATVEC_TILES, MATVEC_ROWS = (2, 4, 8), 64
#: most warps of a block of decode_*: of variants 128, 256, 256e and 256e1; of 128e, 128e1 and `long`
DECODE_WARPS, DECODE_FEW_WARPS = 19, 16
#: shared memory that the weight rings of a decode_* block are cut to (but two slots each): more weights on the way keep
#: x waiting. Where they are decoded early, all of them are on the way long before x is there.
DECODE_RING_BYTES, DECODE_EARLY_RING_BYTES = 60 * 1024, 96 * 1024
#: most row tiles of a warp that decode_*_128e and 128e1, 256e and 256e1 decode into shared memory, beside those in
#: registers
MOST_STAGED, MOST_STAGED_256 = 3, 1


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


def chunk_columns(k: int) -> int:
    """Columns of one chunk of a product over `k` columns (`chunk_columns` in convert_params.h)."""
    if k <= 1024 and k % 256:
        return 128
    return 256 if k <= 5120 else 512 if k <= 7168 else 1024


def n_chunks(k: int) -> int:
    """Chunks of a row of `k` columns."""
    return -(-k // chunk_columns(k))


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


def can_split(type_id: int, n_out: int) -> bool:
    """Whether rows from `n_out` on of a repacked matrix can be read as a matrix of their own."""
    return n_out % TILE_ROWS == 0 and quants.TYPES[type_id].name not in ROW_SCALED


# ---- converted activations -------------------------------------------------------------------------------------------


def x_f16_bytes(k: int) -> int:
    """Bytes of a row of `k` columns written by convert_rows: fp16 in whole pieces, a float32 factor for each chunk."""
    return 2 * _round_up(k, PIECE) + _round_up(4 * n_chunks(k), 16)


def inverse(k: int) -> float:
    """1 / `k` in float32, as the kernels that convert rows divide."""
    return float(np.float32(1.0) / np.float32(k))


# ---- decode ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How to launch a kernel: its name, grid, threads of a block and dynamic shared memory bytes.

    Of decode kernels also what they must be told: bytes of their weight rings; of decode_* further fields of
    `DecodeParams`, under their names there; of wgmma_* how many tiles there are, and of wgmma_experts_* how many places
    the list has where x lies by them.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    smem: int
    ring_bytes: int = 0
    n_warps: int = 0
    n_groups: int = 0
    depth: int = 0
    batch: int = 0
    x_smem: int = 0
    factors: int = 0
    barriers: int = 0
    block_tiles: int = 0
    more_tiles: int = 0
    n_staged: int = 0
    staged: int = 0
    tiles_m: int = 0
    tiles_n: int = 0
    places: int = 0


def early_tiles(type_id: int) -> int:
    """Row tiles of a warp that decode_<type>_128e and 128e1 have in registers before their input is there."""
    return 1 if quants.TYPES[type_id].name in ("Q4_1", "Q5_1", "Q8_0", "MXFP4") else 2


def decode_unit_bytes(type_id: int, variant: str) -> int:
    """Bytes of a slot of a ring of decode_<type>_<variant> (`unit_columns` in decode_unit.cuh): 64 columns of
    unquantized types, 256 of K-quants and in variants of 256 columns of codes up to 5 bits, else 128."""
    columns = tile_k(type_id)
    if columns == 64 and (name := quants.TYPES[type_id].name) not in _DENSE:
        columns = 256 if variant.startswith("256") and name != "Q8_0" else 128
    return columns // tile_k(type_id) * packed_tile_bytes(type_id)


def decode_launch(
    type_id: int, k: int, n_out: int, n_rows: int, *, n_sm: int, glu: bool = False, max_smem: int = SMEM_SMALL,
    **how: int,
) -> Launch:  # fmt: skip
    """The launch for a matrix [n_out, k], or two, and an input of 1 .. 8 rows.

    Args:
        type_id, k, n_out: the matrix.
        n_rows: rows of the input.
        n_sm: multiprocessors of the GPU.
        glu: there are two matrices, gate and up of PRODUCT_GLU.
        max_smem: dynamic shared memory bytes that a block may have.
        how: `grid`, `n_groups`, `depth`, `early`, `n_staged`, `ready` (row tiles of a warp that are decoded into
            registers) or `converts` (0: the one row has been converted before) in the place of what is chosen here.
            Results do not depend on them.

    Raises:
        ValueError: no block of the kernel has so little shared memory.
    """
    chunks = n_chunks(k)
    most = -(-chunks // -(-chunks // DECODE_FEW_WARPS))
    # What is best, then what takes less shared memory: no weights decoded into it, one group of warps, then `long` with
    # ever fewer warps, then rings of one slot.
    long, one = chunk_columns(k) > 256 or chunks > DECODE_WARPS, {"n_staged": 0, **how, "n_groups": 1}
    tries = [(True, n, choice) for choice in (one, {**one, "depth": 1}) for n in range(most, 0, -1)]
    tries = [(long, most if long else chunks, choice) for choice in (how, {"n_staged": 0, **how}, one)] + tries
    for long, n_warps, choice in tries:
        launch = _decode_launch(type_id, k, n_out, n_rows, long, n_warps, n_sm, glu, max_smem, choice)
        if launch.smem <= max_smem:
            return launch
    raise ValueError(f"decode_{kernel_suffix(type_id)} for {k} columns needs more than {max_smem} bytes a block")


def _decode_launch(
    type_id: int, k: int, n_out: int, n_rows: int, long: bool, n_warps: int, n_sm: int, glu: bool, max_smem: int,
    how: dict[str, int],
) -> Launch:  # fmt: skip
    """`decode_launch` of a variant with so many warps to a group; it may take more shared memory than there is."""
    chunk, chunks, parts = chunk_columns(k), n_chunks(k), 2 if glu else 1
    jobs = n_row_tiles(n_out)
    total = jobs * parts
    early_warps = DECODE_WARPS if chunk == 256 else DECODE_FEW_WARPS
    can_early = not long and n_warps <= early_warps and quants.TYPES[type_id].name not in _DENSE

    def share(most_warps: int) -> tuple[int, bool, int]:
        """With blocks of so many warps: groups of them, whether there is little work for each, blocks."""
        most = max(1, most_warps // n_warps)
        groups = min(how.get("n_groups", max(parts, 2) if n_warps <= 8 else 1), most, total)
        # Launches of little work leave multiprocessors to those before and after, whose weights arrive meanwhile.
        per_warp = -(-total // (groups * max(1, n_sm * 3 // 4)))
        small = per_warp <= 4 and not long
        grid = min(jobs, max(1, -(-total // (groups * per_warp)) if small else n_sm))
        return groups, small, how.get("grid", grid)

    n_groups, small, grid = share(early_warps)
    early = bool(can_early and how.get("early", small))
    ready = how.get("ready", early_tiles(type_id)) if chunk == 128 else 1
    warp_tiles = -(-(-(-jobs // grid) * parts) // n_groups)
    most_staged = how.get("n_staged", MOST_STAGED if chunk == 128 else MOST_STAGED_256)
    n_staged = min(most_staged, max(0, warp_tiles - ready))
    tiles = -(-jobs // grid) * parts
    single = n_rows == 1 and bool(how.get("converts", 1))
    if chunk == 256 or single:  # no other row tiles
        early &= warp_tiles <= ready + n_staged
    if single:  # a thread has at most one result
        early &= tiles * TILE_ROWS <= 32 * n_warps * n_groups
    if not early:
        n_groups, _, grid = share(DECODE_FEW_WARPS if long else DECODE_WARPS)
        tiles, n_staged = -(-jobs // grid) * parts, 0
    single &= early
    variant = "long" if long else f"{chunk}{'e1' if single else 'e' if early else ''}"
    unit = decode_unit_bytes(type_id, variant)
    one_row = n_rows == 1 and (single or not early)
    sums = TILE_ROWS * 4 * _round_up(chunks, 4) if one_row else 160 * 4 * chunks
    step = n_groups * (ready + n_staged if early else 2 if n_groups % parts else 1)
    if step % parts:
        step *= parts
    row = -(-k // PIECE) * 2 * PIECE  # of converted x
    warps, columns = n_warps * n_groups, unit // packed_tile_bytes(type_id) * tile_k(type_id)
    if one_row:  # a converted chunk of every warp and, but for `single`, the norm's weights of it
        x_smem = row if long else warps * (512 if single else 1536)
    else:  # several rows stay where they are
        x_smem = n_rows * (row + 64) if chunk == 256 and early else 0
    rest = x_smem + 32 * chunks + 32 * -(-k // (4 * PIECE))  # sums of squares are read by eights
    staged_bytes = n_staged * chunk * 32 * warps
    rest += staged_bytes
    most_ring = max(DECODE_EARLY_RING_BYTES if early else DECODE_RING_BYTES, 2 * warps * unit)
    # Of several rows all row tiles at once where there is room: fewer barriers. Else two batches take turns.
    batch, sets = _round_up(tiles, step), 1
    if (one_row and not single) or rest + batch * sums + most_ring + 8 * warps * 8 > max_smem:
        most_sums = 32768 if n_rows > 1 and max_smem > 2 * SMEM_SMALL else min(16384, max_smem // 14)
        most_sums = min(most_sums, (max_smem - rest - 2 * warps * (unit + 8)) // 2)  # two slots come first
        batch, sets = min(batch, max(step, most_sums // sums // step * step)), 2
    rest += sets * batch * sums
    units = -(-tiles // n_groups) * -(-min(chunk, k) // columns) * -(-chunks // n_warps)
    room = min(most_ring, max_smem - rest - 8 * warps * 8)
    most_depth = min(how.get("depth", 8), units)
    depth = max(min(2, most_depth), min(most_depth, room // (warps * unit)))
    ring = warps * depth * unit
    name = f"decode_{kernel_suffix(type_id)}_{variant}"
    factors = ring + x_smem + sets * batch * sums
    staged = ring + rest - staged_bytes
    barriers = ring + rest
    return Launch(name, (grid, 1, 1), 32 * warps, barriers + 8 * warps * depth, ring, n_warps, n_groups, depth, batch,
                  x_smem, factors, barriers, jobs // grid, jobs % grid, n_staged, staged)  # fmt: skip


#: variants of decode_<type>_<type>_<variant>, by the names of the types
DECODE_PAIRS = {
    ("Q5_0", "Q8_0"): ("128e", "128e1", "256e", "256e1"),
    ("Q4_K", "Q6_K"): ("256e", "256e1", "256"),
}


def pair_launch(
    type_ids: tuple[int, int], k: int, n_outs: tuple[int, int], n_rows: int, *, n_sm: int, max_smem: int = SMEM_SMALL,
    **how: int,
) -> tuple[Launch, Launch, Launch] | None:  # fmt: skip
    """One launch for two matrices [n_out, k] of two types and one input of 1 .. 8 rows, if there is a kernel for it.

    Args:
        how: of `decode_launch`.

    Returns:
        the launch, and the two of which it has the blocks: those of the first, then those of the second.
    """
    variants = DECODE_PAIRS.get((quants.TYPES[type_ids[0]].name, quants.TYPES[type_ids[1]].name), ())
    names = [kernel_suffix(type_id) for type_id in type_ids]
    work = [n_row_tiles(n) * packed_tile_bytes(t) / tile_k(t) for t, n in zip(type_ids, n_outs, strict=True)]
    for early in (1, 0) if variants else ():
        choice = {"early": early, "ready": 1, **how}
        first, second = (
            decode_launch(t, k, n, n_rows, n_sm=n_sm, glu=False, max_smem=max_smem, **choice)
            for t, n in zip(type_ids, n_outs, strict=True)
        )
        if first.grid[0] + second.grid[0] > n_sm:  # by what they have to read
            blocks = min(n_sm - 1, max(1, round(n_sm * work[0] / sum(work))))
            grids = (min(blocks, n_row_tiles(n_outs[0])), min(n_sm - blocks, n_row_tiles(n_outs[1])))
            first, second = (
                decode_launch(t, k, n, n_rows, n_sm=n_sm, glu=False, max_smem=max_smem, **{**choice, "grid": grid})
                for t, n, grid in zip(type_ids, n_outs, grids, strict=True)
            )
        if first.block != second.block:
            continue
        for variant in variants:
            if [one.kernel for one in (first, second)] == [f"decode_{name}_{variant}" for name in names]:
                name = f"decode_{names[0]}_{names[1]}_{variant}"
                grid = (first.grid[0] + second.grid[0], 1, 1)
                return Launch(name, grid, first.block, max(first.smem, second.smem)), first, second
    return None


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
    """The constants of matvec_<type>_<tiles>; with tiles 1 those of the expert kernels."""
    k_tiles = 2 if tile_k(type_id) == 64 and quants.TYPES[type_id].name not in _DENSE else 1
    stage = k_tiles * packed_tile_bytes(type_id)
    two_fit = tiles == 4 or (tile_k(type_id) == 64 and quants.TYPES[type_id].name != "Q5_1")
    row_tiles = 2 if tiles >= 4 and stage <= 2304 and two_fit else 1
    slot = row_tiles * stage
    return MatvecShape(k_tiles, row_tiles, max(2, min(4, 10240 // slot)), slot)


def matvec_warps(k: int) -> int:
    """Warps of a block of matvec_* and expert_matvec_*: the fewest that need as few rounds of chunks as eight would."""
    rounds = -(-n_chunks(k) // 8)
    return -(-n_chunks(k) // rounds)


def matvec_smem(k: int, warps: int, ring_bytes: int, tiles: int, row_tiles: int) -> int:
    """Shared memory of a block: rings, sums of chunks, factors, sums so far."""
    return ring_bytes + 2 * warps * row_tiles * 512 + n_chunks(k) * 32 * tiles + tiles * row_tiles * 512


def matvec_launch(
    type_id: int, k: int, n_outs: tuple[int, ...], n_rows: int, *, n_sm: int, max_smem: int = SMEM_SMALL
) -> Launch:
    """The launch for up to four matrices [n_out, k] of one type and one converted input of up to 64 rows.

    A block has at most `max_smem` bytes of shared memory, and where that is little, fewer warps.
    """
    total = sum(map(n_row_tiles, n_outs))
    tiles = next(t for t in MATVEC_TILES if n_rows <= 8 * t)
    shape = matvec_shape(type_id, tiles)
    for warps in range(matvec_warps(k), 0, -1):
        ring = warps * shape.ring_bytes
        smem = matvec_smem(k, warps, ring, tiles, shape.row_tiles)
        if smem <= max_smem:
            break
    # As many blocks as the GPU holds at once (registers, then shared memory): each stays for several tiles, so that
    # one tile's weights arrive while the one before is being summed.
    resident = max(1, min({2: 16, 4: 8, 8: 8}[tiles] // warps, 227 * 1024 // (smem + 1024)))
    grid = min(-(-total // shape.row_tiles), n_sm * resident)
    return Launch(f"matvec_{kernel_suffix(type_id)}_{tiles}", (grid, 1, 1), 32 * warps, smem, ring)


# ---- many rows: wgmma_<type>_<rows> ----------------------------------------------------------------------------------


#: compute capability that has wgmma_*, and the architecture of its machine code
WGMMA_CAPABILITY, WGMMA_ARCH = (9, 0), "90a"
#: shared memory of a block there
WGMMA_SMEM = 227 * 1024
#: rows of a tile of wgmma_*, and of wgmma_experts_* -> warpgroups along the outputs, parts of K (`ManyRowsShape`)
WGMMA_TILES = {16: (1, 4), 32: (1, 4), 64: (2, 1), 128: (2, 1), 192: (2, 1)}
WGMMA_EXPERT_TILES = {16: (4, 1), 32: (4, 1), 96: (3, 1)}
#: us of a launch beside its steps and of a step of 64 columns (of each part), as measured on an H200 with Q4_K; close
#: enough for the other types
WGMMA_LAUNCH_US, WGMMA_STEP_US = 3.5, {16: 0.56, 32: 0.65, 64: 0.40, 128: 0.54, 192: 0.74}


def many_rows_rings(type_id: int, rows: int, experts: bool = False) -> tuple[int, int, int, int]:
    """(slots of x, slots of weights, shared memory bytes, threads) of wgmma_<type>_<rows> or, with `experts`, of
    wgmma_experts_<type>_<rows> (matmul_shapes.cuh, ManyRowsShape)."""
    groups, parts = (WGMMA_EXPERT_TILES if experts else WGMMA_TILES)[rows]
    warps = 4 * groups * parts
    dense = quants.TYPES[type_id].name in _DENSE
    unit = packed_tile_bytes(type_id) * (1 if dense else 256 // tile_k(type_id))
    x_slot = 128 * rows + _round_up(4 * rows, 1024)
    rest = (256 * groups * rows if parts > 1 else 0) + warps // 2 * 4096

    def weights(depth: int) -> int:
        return depth * warps * unit

    def x_depth(w_depth: int) -> int:
        return (WGMMA_SMEM - rest - 1024 - weights(w_depth)) // (parts * x_slot)

    w_depth = 4 if x_depth(4) >= 6 else 3 if x_depth(3) >= 4 else 2
    depth = min(8, x_depth(w_depth))
    smem = parts * depth * x_slot + weights(w_depth) + rest + 16 * parts * (depth + w_depth)
    suppliers = 8 if experts and rows <= 32 else 4 if parts == 1 else 2 * parts  # rows of small tiles are gathered
    return depth, w_depth, smem, 32 * (warps + suppliers)


@lru_cache(maxsize=4096)  # asked for by every product of every step with so many rows
def many_rows_launch(type_id: int, k: int, n_tiles: int, n_rows: int, n_sm: int, rows: int | None = None) -> Launch:
    """The launch for matrices of `k` columns with `n_tiles` row tiles and an input of `n_rows` rows in tiles.

    Args:
        rows: of a tile, in the place of what is chosen here. Results do not depend on it.
    """

    def tiles(rows: int) -> tuple[int, int]:
        return -(-n_tiles // (4 * WGMMA_TILES[rows][0])), -(-n_rows // rows)

    def cost(rows: int) -> float:
        m, n = tiles(rows)
        steps = -(-n_chunks(k) // WGMMA_TILES[rows][1]) * min(chunk_columns(k), k) / 64
        return WGMMA_LAUNCH_US + -(-m * n // n_sm) * steps * WGMMA_STEP_US[rows]

    rows = rows or min(WGMMA_TILES, key=cost)
    m, n = tiles(rows)
    *_, smem, block = many_rows_rings(type_id, rows)
    name = f"wgmma_{kernel_suffix(type_id)}_{rows}"
    return Launch(name, (min(m * n, n_sm), 1, 1), block, smem, tiles_m=m, tiles_n=n)


# ---- prefill: matmul_<type> and matmul_<type>_small ------------------------------------------------------------------


#: rows of the input in a tile of either prefill kernel; convert_rows must have written whole tiles
MATMUL_TILE_ROWS = 64


def matmul_stages(type_id: int, small: bool) -> tuple[int, int, int]:
    """(activation stages, weight slots, their shared memory) of a prefill kernel (matmul_shapes.cuh, MatmulShape)."""
    x, w = MATMUL_TILE_ROWS * 128, (4 if small else 8) * packed_tile_bytes(type_id)
    for stages in (4, 3, 2):
        slots = 2 if tile_k(type_id) == 256 else stages
        smem = stages * x + slots * w
        if smem <= (49152 if small else 75776):
            break
    return stages, slots, smem


@lru_cache(maxsize=4096)  # asked for by every product of every step with prompt rows
def matmul_launch(type_id: int, k: int, n_out: int, n_rows: int, n_sm: int) -> Launch:
    """The prefill launch for a matrix [n_out, k] and an input of `n_rows` converted rows.

    Both variants give the same bits; the small one is for products that do not fill the GPU with large tiles.
    """
    row_tiles = -(-n_rows // MATMUL_TILE_ROWS)
    small = -(-n_out // 128) * row_tiles < 3 * n_sm
    grid = (-(-n_out // (64 if small else 128)), row_tiles, 1)
    name = f"matmul_{kernel_suffix(type_id)}" + ("_small" if small else "")
    return Launch(name, grid, 128, matmul_stages(type_id, small)[2] + 4 * MATMUL_TILE_ROWS * n_chunks(k))
