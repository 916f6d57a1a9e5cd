"""The CUDA expert kernels' view of a step: lists of pairs, converted rows, launch geometry.

The Python mirror of the constants of params/route_params.h and params/experts_params.h, for VRAM plan, engine and
kernel tests. A pair is a row and one of its slots; an item is an expert with some of its pairs. Pure arithmetic.
"""

from __future__ import annotations

from functools import lru_cache

from worker_orcd.cuda import layout
from worker_orcd.cuda.layout import SMEM_SMALL, Launch

#: parts of K that a router logit is summed from
ROUTE_SLICES = 16
#: rows of one warp of route_logits
ROUTE_ROWS = 8
#: pairs of a decode item
DECODE_ROWS = 16
#: pairs of a prefill item, by kernel variant
PREFILL_ROWS = (16, 64)
#: matrices of one expert in one launch
MAX_MATRICES = 2
#: most rows for which a decode block converts x itself
CONVERT_IN_BLOCK = 4


def max_items(n_pairs: int, n_expert: int, item_rows: int) -> int:
    """Items that `n_pairs` pairs can make, however they fall on the experts."""
    return (n_pairs + min(n_pairs, n_expert) * (item_rows - 1)) // item_rows


def list_bytes(n_pairs: int, n_expert: int) -> int:
    """Bytes of a list: the number of items (16 bytes), the items (16 each), the pairs (4 each)."""
    return 16 + 16 * max_items(n_pairs, n_expert, min(DECODE_ROWS, *PREFILL_ROWS)) + 4 * n_pairs


def list_parts(address: int, n_pairs: int, n_expert: int) -> tuple[int, int, int]:
    """Addresses (number of items, items, pairs) of the list at `address`."""
    return address, address + 16, address + list_bytes(n_pairs, n_expert) - 4 * n_pairs


def route_partial_bytes(n_rows: int, n_expert: int) -> int:
    """Scratch of route_logits: float32 [n_rows, ROUTE_SLICES, n_expert rounded up to 16]."""
    return 4 * n_rows * ROUTE_SLICES * layout.TILE_ROWS * layout.n_row_tiles(n_expert)


def route_grid(n_rows: int, n_expert: int) -> tuple[int, int, int]:
    """Grid of route_logits, 256 threads: a warp for each row tile and slice."""
    return layout.n_row_tiles(n_expert) * ROUTE_SLICES // 8, -(-n_rows // ROUTE_ROWS), 1


def decode_launch(
    type_id: int, k: int, n_out: int, n_matrices: int, n_rows: int, n_used: int, n_expert: int, *, n_sm: int,
    max_smem: int = SMEM_SMALL,
) -> Launch:  # fmt: skip
    """The decode launch for `n_rows` (1 .. 64) rows and `n_matrices` matrices [n_out, k] of each expert.

    Args:
        n_sm: multiprocessors of the GPU.
        max_smem: dynamic shared memory bytes that a block may have.

    Returns:
        `needs_split` says that the input must have been converted by convert_split; else the kernel takes float32.
    """
    warps = layout.matvec_warps(type_id, k)
    ring = warps * layout.matvec_shape(type_id, 1).ring_bytes
    smem, tiles = ring + 2 * warps * 512, 2
    inside = smem + n_rows * layout.x_split_bytes(type_id, k)
    if n_rows <= CONVERT_IN_BLOCK and inside + 4 * DECODE_ROWS <= max_smem:
        smem, tiles = inside, 1
    # What the GPU holds at once: registers, then shared memory.
    resident = max(1, min({1: 24, 2: 16}[tiles] // warps, 227 * 1024 // (smem + 2048)))
    work = max_items(n_rows * n_used, n_expert, DECODE_ROWS) * n_matrices * layout.n_row_tiles(n_out)
    name = f"expert_matvec_{layout.kernel_suffix(type_id)}_{tiles}"
    return Launch(name, (min(work, n_sm * resident), 1, 1), 32 * warps, smem, ring, 8 * tiles, tiles > 1)


def prefill_rows(n_rows: int, n_used: int, n_expert: int) -> int:
    """Pairs of an item of a prefill launch: large tiles only where an expert has enough rows to fill them."""
    return PREFILL_ROWS[n_rows * n_used >= 24 * n_expert]


@lru_cache(maxsize=4096)  # asked for by every layer of every step with prompt rows
def prefill_launch(
    type_id: int, n_out: int, n_matrices: int, n_rows: int, n_used: int, n_expert: int, item_rows: int | None = None
) -> Launch:
    """The prefill launch; `item_rows` other than `prefill_rows` says gives the same bits."""
    item_rows = item_rows or prefill_rows(n_rows, n_used, n_expert)
    tiles = n_matrices * -(-n_out // 128)
    name = f"expert_matmul_{layout.kernel_suffix(type_id)}_{item_rows}"
    items = max_items(n_rows * n_used, n_expert, item_rows)
    return Launch(name, (tiles, items, 1), 128, prefill_smem(type_id, item_rows))


def prefill_smem(type_id: int, item_rows: int) -> int:
    """Shared memory of a prefill kernel (csrc/cuda/matmul_shapes.cuh, MatmulShape<Q, 4, 1, item_rows / 8>)."""
    x, w, smem = item_rows * 128, 8 * layout.packed_tile_bytes(type_id), 0
    for stages in (4, 3, 2):
        smem = stages * x + (2 if layout.tile_k(type_id) == 256 else stages) * w
        if smem <= 75776:
            break
    return smem
