"""The repacked layouts of csrc/cuda/quant, compiled for the CPU: nothing lost or moved wrongly, sizes as planned."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.quant_blocks import dequantized, random_blocks

from worker_orcd.cuda import layout
from worker_orcd.gguf import quants

ROOT = Path(__file__).resolve().parents[2]
TYPES = sorted(quants.TYPES)
NAMES = [quants.TYPES[t].name for t in TYPES]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("layout") / "layout.so"
    source = ROOT / "tests" / "helpers" / "cuda_layout_host.cpp"
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    subprocess.run(
        ["g++", *flags, "-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "cuda"), str(source), "-o", str(out)],
        check=True,
    )
    return ctypes.CDLL(str(out))


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


@pytest.mark.parametrize("type_id", TYPES, ids=NAMES)
def test_sizes_match_the_headers(lib, type_id):
    suffix = layout.kernel_suffix(type_id)
    assert getattr(lib, f"tile_k_{suffix}")() == layout.tile_k(type_id)
    assert getattr(lib, f"packed_tile_bytes_{suffix}")() == layout.packed_tile_bytes(type_id)
    assert bool(getattr(lib, f"row_scaled_{suffix}")()) == (quants.TYPES[type_id].name in layout.ROW_SCALED)


@pytest.mark.parametrize("type_id", TYPES, ids=NAMES)
@pytest.mark.parametrize(("n_out", "k"), [(16, 256), (33, 768), (5, 1024), (48, 96), (17, 32)])
def test_repacked_weights_are_the_files_weights(lib, type_id, n_out, k):
    if k % quants.TYPES[type_id].block_size:
        pytest.skip("no row of this type is that long")
    rng = np.random.default_rng([type_id, n_out, k])
    raw = random_blocks(type_id, n_out, k, rng, mxfp4_exponents=(0, 253))
    suffix = layout.kernel_suffix(type_id)
    row_tiles, width = layout.n_row_tiles(n_out), layout.k_padded(type_id, k)
    n_bytes = row_tiles * layout.n_k_tiles(type_id, k) * layout.packed_tile_bytes(type_id)
    packed = np.full(n_bytes + 64, 0xA5, np.uint8)
    getattr(lib, f"repack_{suffix}")(pointer(raw), pointer(packed), n_out, k)
    assert (packed[n_bytes:] == 0xA5).all()
    out = np.full((row_tiles * 16, width), np.nan, np.float32)
    getattr(lib, f"unpack_{suffix}")(pointer(packed), pointer(out), n_out, k)
    expected = dequantized(type_id, raw)
    assert np.array_equal(out[:n_out, :k].view(np.uint32), expected.view(np.uint32))
    assert not out[n_out:].any() and not out[:, k:].any(), "padding must be zero weights"
    # Whole row tiles and k tiles hold the file's bits and no others.
    if n_out % 16 == 0 and k == width:
        assert n_bytes == raw.nbytes
        assert np.unpackbits(packed[:n_bytes]).sum() == np.unpackbits(raw).sum()


@pytest.mark.parametrize("type_id", TYPES, ids=NAMES)
def test_launch_sizes_match_the_kernels(lib, type_id):
    suffix, out = layout.kernel_suffix(type_id), (ctypes.c_int * 4)()
    for tiles in layout.MATVEC_TILES:
        getattr(lib, f"matvec_{suffix}")(tiles, out)
        shape = layout.matvec_shape(type_id, tiles)
        assert list(out) == [shape.stage_k_tiles, shape.row_tiles, shape.depth, shape.slot_bytes]
    for small in (False, True):
        getattr(lib, f"matmul_{suffix}")(int(small), out)
        assert list(out) == [*layout.matmul_stages(type_id, small), layout.MATMUL_TILE_ROWS]


def test_activation_order_is_the_fragment_order(lib):
    """Lane t's eight stored values are the columns of its pairs 0, 2, 4, 6 (low, high)."""
    slots = [lib.x_slot_of(k) for k in range(32)]
    assert sorted(slots) == list(range(32))
    for t in range(4):
        columns = [lib.column_of(t, pair) + odd for pair in (0, 2, 4, 6) for odd in (0, 1)]
        assert [slots[c] for c in columns] == list(range(8 * t, 8 * t + 8))


@pytest.mark.parametrize("type_id", TYPES, ids=NAMES)
def test_padding_is_small(type_id):
    """Real shapes cost at most 2 % more than in the file."""
    block = quants.TYPES[type_id].block_size
    for n_out, k in [(896, 896), (128, 896), (4864, 896), (896, 4864), (151936, 896), (9216, 3072), (32064, 3072),
                     (3072, 8192), (4096, 2880), (2880, 4096), (201088, 2880), (576, 1536), (49152, 576)]:  # fmt: skip
        if k % block == 0:
            in_file = n_out * quants.TYPES[type_id].row_bytes(k)
            ratio = layout.packed_bytes(type_id, n_out, k) / in_file
            assert 1 <= ratio <= 1.02, f"{n_out} x {k}: {ratio}"


@pytest.mark.parametrize("type_id", TYPES, ids=NAMES)
def test_launches_fit_the_smallest_gpu(type_id):
    for n_outs, k in [((896, 128, 128), 896), ((896,), 4864), ((151936,), 896), ((3072,), 8192), ((48,), 32)]:
        k = -(-k // quants.TYPES[type_id].block_size) * quants.TYPES[type_id].block_size
        row_tiles = sum(map(layout.n_row_tiles, n_outs))
        warps = layout.matvec_warps(type_id, k)
        for n_rows in (1, 2, 8, 9, 16, 17, 32, 33, 64):
            launch = layout.matvec_launch(type_id, k, n_outs, n_rows, n_sm=132)
            assert launch.smem <= layout.SMEM_SMALL and launch.block == 32 * warps <= 256
            assert 1 <= launch.grid[0] <= row_tiles
    for small in (False, True):
        assert layout.matmul_stages(type_id, small)[2] <= layout.SMEM_SMALL
