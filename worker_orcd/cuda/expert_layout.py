"""The CUDA expert kernels' view of a step: lists of pairs, converted rows, launch geometry.

The Python mirror of the constants of params/route_params.h and params/experts_params.h, for VRAM plan, engine and
kernel tests. A pair is a row and one of its slots; an item is an expert with some of its pairs. Pure arithmetic.
"""

from __future__ import annotations

from functools import lru_cache

from worker_orcd.cuda import layout
from worker_orcd.cuda.layout import Launch

#: parts of K that a router logit is summed from
ROUTE_SLICES = 16
#: rows of one warp of route_logits, of route_few
ROUTE_ROWS, ROUTE_FEW_ROWS = 4, 2
#: pairs of a decode item
DECODE_ROWS = 16
#: pairs of a prefill item, by kernel variant
PREFILL_ROWS = (16, 64)
#: most pairs of an item of wgmma_experts_* whose rows it gathers
GATHERED_ROWS = 32
#: matrices of one expert in one launch
MAX_MATRICES = 2
#: most threads of a block of expert_few_*: of variants 128 and 256, of `long`
FEW_THREADS, FEW_LONG_THREADS = 768, 384
#: most row tiles that it adds up at once, what its shared memory has beside what the launch asks for
FEW_BATCH, FEW_STATIC_SMEM = 256, 512
#: what the weight rings of an expert_few_* block are cut to, but two slots each
FEW_RING_BYTES = 110 * 1024
#: shared memory of route_few beside its weights
ROUTE_FEW_STATIC_SMEM = 12 * 1024


def max_items(n_pairs: int, n_expert: int, item_rows: int) -> int:
    """Items that `n_pairs` pairs can make, however they fall on the experts."""
    return (n_pairs + min(n_pairs, n_expert) * (item_rows - 1)) // item_rows


def n_places(n_pairs: int, n_expert: int) -> int:
    """Places of a list whose items each begin at a multiple of 8, however the pairs fall on the experts."""
    return -(-(n_pairs + 7 * min(n_pairs, n_expert)) // 8) * 8


def list_bytes(n_pairs: int, n_expert: int) -> int:
    """Bytes of a list: the number of items (16 bytes), the items (16 each), the place of each pair, and the pair at
    each place (4 each)."""
    items = max_items(n_pairs, n_expert, min(DECODE_ROWS, *PREFILL_ROWS))
    return 16 + 16 * items + 4 * (n_pairs + n_places(n_pairs, n_expert))


def list_parts(address: int, n_pairs: int, n_expert: int) -> tuple[int, int, int, int]:
    """Addresses (number of items, items, pairs, places) of the list at `address`."""
    pairs = address + list_bytes(n_pairs, n_expert) - 4 * n_places(n_pairs, n_expert)
    return address, address + 16, pairs, pairs - 4 * n_pairs


def route_partial_bytes(n_rows: int, n_expert: int) -> int:
    """Scratch of route_logits: float32 [n_rows, ROUTE_SLICES, n_expert rounded up to 16]."""
    return 4 * n_rows * ROUTE_SLICES * layout.TILE_ROWS * layout.n_row_tiles(n_expert)


def route_grid(n_rows: int, n_expert: int) -> tuple[int, int, int]:
    """Grid of route_logits, 256 threads: a block for each row tile, slice, and rows of eight warps."""
    return layout.n_row_tiles(n_expert) * ROUTE_SLICES, -(-n_rows // (8 * ROUTE_ROWS)), 1


def route_few_blocks(n_rows: int, n_expert: int) -> int:
    """Blocks of route_few that make logits."""
    return layout.n_row_tiles(n_expert) * ROUTE_SLICES // 8 * -(-n_rows // ROUTE_FEW_ROWS)


def route_few_smem(type_id: int, k: int) -> int:
    """Shared memory of route_few: the part of K that each of its 8 warps has of a row tile."""
    return 8 * -(-layout.n_k_tiles(type_id, k) // ROUTE_SLICES) * layout.packed_tile_bytes(type_id)


def few_launch(
    type_id: int, k: int, n_out: int, n_rows: int, n_used: int, n_expert: int, *, n_sm: int, glu: bool = False,
    max_smem: int = layout.SMEM_SMALL,
) -> Launch:  # fmt: skip
    """The launch for `n_rows` (1 .. 8) rows and a matrix [n_out, k] of each expert, or two (`glu`).

    `x_smem` of the launch is 0 where the kernel takes converted rows only.

    Raises:
        ValueError: no block of the kernel has so little shared memory.
    """
    most, x_smem = FEW_THREADS // 32, n_rows * (2 * layout.PIECE * -(-k // layout.PIECE) + 64)
    # What is best, then what takes less shared memory: fewer warps, converted rows, ever fewer warps, one slot a ring.
    tries = [] if layout.chunk_columns(k) > 256 else [(most, x_smem), (most // 2, x_smem)]
    tries += [(warps, 0) for warps in range(FEW_LONG_THREADS // 32, 0, -1)]
    for least_depth in (2, 1):
        for warps, x in tries:
            launch = _few_launch(type_id, k, n_out, n_rows, n_used, n_expert, warps, x, n_sm, glu, max_smem)
            if launch.smem <= max_smem - FEW_STATIC_SMEM and launch.depth >= least_depth:
                return launch
    name = f"expert_few_{layout.kernel_suffix(type_id)}"
    raise ValueError(f"{name} for {k} columns needs more than {max_smem} bytes a block")


def _few_launch(
    type_id: int, k: int, n_out: int, n_rows: int, n_used: int, n_expert: int, most_warps: int, x_smem: int, n_sm: int,
    glu: bool, max_smem: int,
) -> Launch:  # fmt: skip
    """`few_launch` with x in so much shared memory, 0: of the variant `long`; it may take more than there is."""
    variant = str(layout.chunk_columns(k)) if x_smem else "long"
    chunks, unit, parts = layout.n_chunks(k), layout.decode_unit_bytes(type_id, variant), 2 if glu else 1
    most = max(1, min(most_warps, (max_smem - x_smem) // 2 // unit))  # rings of one slot in half of what is left
    n_warps = -(-chunks // -(-chunks // most))
    n_groups = max(1, min(most // n_warps, FEW_BATCH // 16))  # `step` row tiles, eight times as many of single pairs
    n_groups -= n_groups % 2 if n_groups > 1 else 0
    jobs = max_items(n_rows * n_used, n_expert, n_rows) * layout.n_row_tiles(n_out)
    grid, warps, step = min(jobs, n_sm), n_warps * n_groups, 2 * n_groups
    sums = (layout.TILE_ROWS if n_rows == 1 else 160) * 4 * chunks
    tiles = -(-jobs // grid) * parts
    most_batch = min(FEW_BATCH // (1 if n_rows == 1 else 8), 16384 // sums) // step * step
    batch = max(step, min(-(-tiles // step) * step, most_batch))
    rest = x_smem + 2 * batch * sums + 32 * chunks
    most_ring = max(FEW_RING_BYTES, 2 * warps * unit)
    room = min(most_ring, max_smem - FEW_STATIC_SMEM - rest - 8 * warps * 8)
    depth = max(1, min(8, room // (warps * unit)))
    ring = warps * depth * unit
    name = f"expert_few_{layout.kernel_suffix(type_id)}_{variant}"
    barriers = ring + rest
    return Launch(name, (grid, 1, 1), 32 * warps, barriers + 8 * warps * depth, ring, n_warps, n_groups, depth, batch,
                  x_smem, ring + x_smem + 2 * batch * sums, barriers)  # fmt: skip


def decode_launch(
    type_id: int, k: int, n_out: int, n_matrices: int, n_rows: int, n_used: int, n_expert: int, *, n_sm: int
) -> Launch:
    """The decode launch for `n_rows` (9 .. 64) converted rows and `n_matrices` matrices [n_out, k] of each expert."""
    warps = layout.matvec_warps(k)
    ring = warps * layout.matvec_shape(type_id, 1).ring_bytes
    tiles = 2
    smem = layout.matvec_smem(k, warps, ring, tiles, 1)
    # What the GPU holds at once: registers, then shared memory.
    resident = max(1, min(16 // warps, 227 * 1024 // (smem + 2048)))
    work = max_items(n_rows * n_used, n_expert, DECODE_ROWS) * n_matrices * layout.n_row_tiles(n_out)
    name = f"expert_matvec_{layout.kernel_suffix(type_id)}_{tiles}"
    return Launch(name, (min(work, n_sm * resident), 1, 1), 32 * warps, smem, ring)


def many_rows(n_rows: int, n_used: int, n_expert: int) -> int:
    """Pairs of an item of a wgmma_experts_* launch: few experts of an even choice have more, and most have not far
    fewer."""
    mean = n_rows * n_used / min(n_expert, n_rows * n_used)
    return 16 if mean <= 12 else 32 if mean <= 26 else 96


def many_places(n_rows: int, n_used: int, n_expert: int, item_rows: int) -> int:
    """Places of the list of a wgmma_experts_* launch with such items, where x lies; 0: it gathers its rows."""
    return 0 if item_rows <= GATHERED_ROWS else n_places(n_rows * n_used, n_expert)


@lru_cache(maxsize=4096)  # asked for by every layer of every step with so many rows
def many_launch(
    type_id: int, k: int, n_out: int, n_matrices: int, n_rows: int, n_used: int, n_expert: int, n_sm: int,
    item_rows: int | None = None,
) -> Launch:  # fmt: skip
    """The launch of wgmma_experts_* for `n_rows` rows and `n_matrices` matrices [n_out, k] of each expert; `item_rows`
    other than `many_rows` says gives the same bits."""
    rows = item_rows or many_rows(n_rows, n_used, n_expert)
    tiles_m = -(-n_matrices * layout.n_row_tiles(n_out) // (4 * layout.WGMMA_EXPERT_TILES[rows][0]))
    *_, smem, block = layout.many_rows_rings(type_id, rows, experts=True)
    grid = min(n_sm, tiles_m * max_items(n_rows * n_used, n_expert, rows))
    name = f"wgmma_experts_{layout.kernel_suffix(type_id)}_{rows}"
    places = many_places(n_rows, n_used, n_expert, rows)
    return Launch(name, (grid, 1, 1), block, smem, tiles_m=tiles_m, places=places)


def prefill_rows(n_rows: int, n_used: int, n_expert: int) -> int:
    """Pairs of an item of a prefill launch: large tiles only where an expert has enough rows to fill them."""
    return PREFILL_ROWS[n_rows * n_used >= 24 * n_expert]


@lru_cache(maxsize=4096)  # asked for by every layer of every step with prompt rows
def prefill_launch(
    type_id: int,
    k: int,
    n_out: int,
    n_matrices: int,
    n_rows: int,
    n_used: int,
    n_expert: int,
    item_rows: int | None = None,
) -> Launch:
    """The prefill launch; `item_rows` other than `prefill_rows` says gives the same bits."""
    item_rows = item_rows or prefill_rows(n_rows, n_used, n_expert)
    tiles = n_matrices * -(-n_out // 128)
    name = f"expert_matmul_{layout.kernel_suffix(type_id)}_{item_rows}"
    items = max_items(n_rows * n_used, n_expert, item_rows)
    smem = prefill_smem(type_id, item_rows) + 4 * item_rows * layout.n_chunks(k)
    return Launch(name, (tiles, items, 1), 128, smem)


def prefill_smem(type_id: int, item_rows: int) -> int:
    """Shared memory of the stages of a prefill kernel (matmul_shapes.cuh, MatmulShape<Q, 4, 1, item_rows / 8>)."""
    x, w, smem = item_rows * 128, 8 * layout.packed_tile_bytes(type_id), 0
    for stages in (4, 3, 2):
        smem = stages * x + (2 if layout.tile_k(type_id) == 256 else stages) * w
        if smem <= 75776:
            break
    return smem
