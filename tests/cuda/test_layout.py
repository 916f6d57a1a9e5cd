"""The repacked layouts of csrc/cuda/quant, compiled for the CPU: nothing lost or moved wrongly, sizes as planned."""

from __future__ import annotations

import ctypes
import re
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
    row_tiles, width = layout.n_row_tiles(n_out), layout.n_k_tiles(type_id, k) * layout.tile_k(type_id)
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
    if layout.tile_k(type_id) == 64 and quants.TYPES[type_id].name not in ("F32", "F16", "BF16"):
        assert getattr(lib, f"early_tiles_{suffix}")() == layout.early_tiles(type_id)
    for tiles in layout.MATVEC_TILES:
        getattr(lib, f"matvec_{suffix}")(tiles, out)
        shape = layout.matvec_shape(type_id, tiles)
        assert list(out) == [shape.stage_k_tiles, shape.row_tiles, shape.depth, shape.slot_bytes]
    for small in (False, True):
        getattr(lib, f"matmul_{suffix}")(int(small), out)
        assert list(out) == [*layout.matmul_stages(type_id, small), layout.MATMUL_TILE_ROWS]
    for rows in layout.WGMMA_TILES:
        getattr(lib, f"many_rows_{suffix}")(rows, out)
        launch = layout.many_rows_launch(type_id, 1024, 8, 300, 132, rows)
        assert list(out) == list(layout.many_rows_rings(type_id, rows)) and launch.block == out[3]
        assert launch.smem <= layout.WGMMA_SMEM and launch.tiles_n * rows >= 300
    for rows in layout.WGMMA_EXPERT_TILES:
        getattr(lib, f"many_expert_rows_{suffix}")(rows, out)
        assert list(out) == list(layout.many_rows_rings(type_id, rows, experts=True))


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


def whole_blocks(type_id: int, k: int) -> int:
    """`k`, up to whole blocks of the type."""
    block = quants.TYPES[type_id].block_size
    return -(-k // block) * block


@pytest.mark.parametrize("type_id", TYPES, ids=NAMES)
def test_launches_fit_the_smallest_gpu(type_id):
    for n_outs, k in [((896, 128, 128), 896), ((896,), 4864), ((151936,), 896), ((3072,), 8192), ((48,), 32),
                      ((8192,), 29568)]:  # fmt: skip
        k = whole_blocks(type_id, k)
        row_tiles = sum(map(layout.n_row_tiles, n_outs))
        warps = layout.matvec_warps(k)
        for n_rows in (9, 16, 17, 32, 33, 64):
            launch = layout.matvec_launch(type_id, k, n_outs, n_rows, n_sm=132)
            large = layout.matvec_launch(type_id, k, n_outs, n_rows, n_sm=132, max_smem=227 << 10)
            assert launch.smem <= layout.SMEM_SMALL and large.smem <= 227 << 10
            assert 32 * (warps - 2) <= launch.block <= large.block == 32 * warps <= 256
            assert launch.ring_bytes % (launch.block // 2) == 0 and 1 <= launch.grid[0] <= row_tiles
            assert int(launch.kernel.rpartition("_")[2]) * 8 >= n_rows
        for n_rows in (1, 64, 65, 2048):
            launch = layout.matmul_launch(type_id, k, n_outs[0], n_rows, 132)
            assert launch.smem <= layout.SMEM_SMALL and launch.grid[1] * layout.MATMUL_TILE_ROWS >= n_rows
    for small in (False, True):
        assert layout.matmul_stages(type_id, small)[2] <= layout.SMEM_SMALL


# ---- chunks of K -----------------------------------------------------------------------------------------------------


def test_chunks_are_those_of_the_header(lib):
    for k in range(32, 1 << 17, 32):
        chunk = layout.chunk_columns(k)
        assert chunk == lib.chunk_columns_of(k)
        assert layout.n_chunks(k) == len(range(0, k, chunk))


def test_chunks_are_whole_packed_tiles():
    """Of every type whose rows can have that length: no packed tile, and no unit of a ring, is of two chunks."""
    for type_id in TYPES:
        for k in range(32, 32768, 32):
            if k % quants.TYPES[type_id].block_size:
                continue
            for variant in {"long", str(layout.chunk_columns(k))} - {"512", "1024"}:
                tiles = layout.decode_unit_bytes(type_id, variant) // layout.packed_tile_bytes(type_id)
                assert layout.chunk_columns(k) % (tiles * layout.tile_k(type_id)) == 0


def test_a_converted_row_has_whole_pieces_and_a_factor_for_each_chunk():
    for k in (32, 128, 160, 256, 288, 1024, 1056, 2880, 5120, 5152, 7168, 7200, 29568):
        fragments, n_bytes = 2 * len(range(0, k, layout.PIECE)) * layout.PIECE, layout.x_f16_bytes(k)
        assert n_bytes % 16 == 0 and 0 <= n_bytes - fragments - 4 * layout.n_chunks(k) < 16


@pytest.mark.parametrize(("n_stages", "chunk_stages", "n_warps"), [(12, 4, 3), (7, 1, 7), (9, 2, 2), (40, 5, 3)])
def test_a_warp_s_stages_are_those_of_its_chunks(lib, n_stages, chunk_stages, n_warps):
    taken = []
    for warp in range(n_warps):
        stage = warp * chunk_stages
        while stage < n_stages:
            assert stage // chunk_stages % n_warps == warp
            taken.append(stage)
            stage = lib.next_stage_of(stage, chunk_stages, n_warps)
    assert sorted(taken) == list(range(n_stages))


# ---- decode ----------------------------------------------------------------------------------------------------------

KS = (32, 64, 96, 160, 256, 288, 576, 768, 896, 1024, 1056, 2048, 2880, 4096, 4864, 4896, 5120, 5152, 7168, 7200, 8192,
      14336, 18944, 29568)  # fmt: skip
N_OUTS = (5, 16, 17, 64, 512, 1152, 4864, 29568, 201088)


def check_decode(launch, type_id, k, n_out, n_rows, glu, max_smem, most_threads, ready=None):
    """What decode.cu asks of its launch, with the sizes written out as the kernel has them."""
    prefix = f"decode_{layout.kernel_suffix(type_id)}_"
    assert launch.kernel.startswith(prefix)
    variant = launch.kernel.removeprefix(prefix)
    name, pairs = quants.TYPES[type_id].name, 2 if glu else 1
    variants = {"256", "256e", "256e1", "long"}
    variants |= set() if layout.tile_k(type_id) == 256 else {"128", "128e", "128e1"}
    assert variant in ({v for v in variants if "e" not in v} if name in ("F32", "F16", "BF16") else variants)
    chunk, chunks = layout.chunk_columns(k), layout.n_chunks(k)
    assert variant == "long" or (int(variant[:3]) == chunk and launch.n_warps == chunks)
    assert 1 <= launch.n_warps <= chunks

    is_early, single = "e" in variant, variant.endswith("e1")
    one_row = n_rows == 1 and (single or not is_early)
    assert n_rows == 1 or not single
    warps, few = launch.n_warps * launch.n_groups, variant in ("long", "128e", "128e1")
    assert launch.n_groups >= 1 and launch.block == 32 * warps <= most_threads[few]

    # Row tiles: every one in one block, none beyond the last.
    row_tiles, blocks = layout.n_row_tiles(n_out), launch.grid[0]
    assert launch.grid == (blocks, 1, 1) and launch.block_tiles >= 1 and 0 <= launch.more_tiles < blocks
    assert blocks * launch.block_tiles + launch.more_tiles == row_tiles
    most_tiles = (launch.block_tiles + (launch.more_tiles > 0)) * pairs

    # Those that are decoded before the wait are of the first batch, as many as there are.
    early = launch.n_staged + (ready or (layout.early_tiles(type_id) if variant.startswith("128e") else 1))
    assert launch.batch >= 1 and launch.batch % (early * launch.n_groups) == 0 and launch.batch % pairs == 0
    assert launch.n_staged >= 0 and (is_early or launch.n_staged == 0)
    if single or variant == "256e":  # a warp has no others, and there is one batch
        assert most_tiles <= early * launch.n_groups and most_tiles <= launch.batch
    if single:  # a thread has one result
        assert launch.n_staged <= (3 if chunk == 128 else 1) and 16 * most_tiles <= launch.block

    # Shared memory: rings, x, two sets of sums, factors, sums of squares, barriers; each where it must be.
    unit = layout.decode_unit_bytes(type_id, variant)
    assert launch.depth >= 1 and unit % 16 == 0 and launch.ring_bytes == warps * launch.depth * unit
    row = -(-k // 256) * 512
    if one_row:  # a converted chunk of every warp and the norm's weights, which e1 keeps in registers
        x = row if variant == "long" else warps * (512 if single else 512 + 1024)
    else:  # rows that were converted before
        x = n_rows * (row + 64) if variant == "256e" else 0
    assert launch.x_smem % 16 == 0 and launch.x_smem >= x
    sums = 4 * 16 * -(-chunks // 4) * 4 if one_row else 4 * chunks * 8 * 20
    sets = 1 if launch.batch >= most_tiles and (single or not one_row) else 2
    assert launch.factors >= launch.ring_bytes + launch.x_smem + sets * launch.batch * sums
    squares, staged = 4 * 8 * -(-k // 1024), warps * launch.n_staged * chunk * 16 * 2
    assert launch.factors % 16 == launch.staged % 16 == launch.barriers % 8 == 0
    assert launch.staged >= launch.factors + 4 * 8 * chunks + squares and launch.barriers >= launch.staged + staged
    assert launch.barriers + 8 * warps * launch.depth <= launch.smem <= max_smem


@pytest.mark.parametrize("type_id", TYPES, ids=NAMES)
def test_decode_launches_are_what_the_kernel_takes(lib, type_id):
    most_threads = list((ctypes.c_int * 2).in_dll(lib, "decode_threads"))
    assert most_threads == [32 * layout.DECODE_WARPS, 32 * layout.DECODE_FEW_WARPS]
    seen = set()
    for k in sorted({whole_blocks(type_id, k) for k in KS}):
        for i, n_out in enumerate(N_OUTS):
            for glu in (False, True):
                for n_sm, max_smem in ((20, layout.SMEM_SMALL), (108, 163 << 10), (132, 227 << 10)):
                    for n_rows in range(1, 9) if i % 3 == 0 else (1, 2):
                        launch = layout.decode_launch(type_id, k, n_out, n_rows, n_sm=n_sm, glu=glu, max_smem=max_smem)
                        check_decode(launch, type_id, k, n_out, n_rows, glu, max_smem, most_threads)
                        seen.add(launch.kernel)
    # every variant is taken somewhere, or its test is empty
    dense = quants.TYPES[type_id].name in ("F32", "F16", "BF16")
    assert len(seen) == (3 if dense else 4 if layout.tile_k(type_id) == 256 else 7)


@pytest.mark.parametrize(
    "how",
    [{"grid": 7}, {"n_groups": 1}, {"n_groups": 3}, {"depth": 1}, {"early": 0}, {"early": 1},
     {"converts": 0}, {"grid": 1, "n_groups": 4, "early": 1}],
    ids=str,
)  # fmt: skip
def test_decode_launches_that_are_chosen_otherwise_are_sound(lib, how):
    most_threads = list((ctypes.c_int * 2).in_dll(lib, "decode_threads"))
    for type_id in TYPES:
        for k in sorted({whole_blocks(type_id, k) for k in (32, 576, 896, 2048, 5120, 8192)}):
            for n_out in (16, 1152, 29568):
                if how.get("grid", 1) > layout.n_row_tiles(n_out):
                    continue
                for n_rows, glu in ((1, False), (1, True), (5, False), (5, True)):
                    launch = layout.decode_launch(type_id, k, n_out, n_rows, n_sm=132, glu=glu, **how)
                    check_decode(launch, type_id, k, n_out, n_rows, glu, layout.SMEM_SMALL, most_threads)
                    assert launch.grid[0] == how.get("grid", launch.grid[0])
                    assert launch.depth <= how.get("depth", 8)


@pytest.mark.parametrize("pair", list(layout.DECODE_PAIRS), ids="-".join)
def test_launches_of_two_types_are_what_the_kernel_takes(lib, pair):
    most_threads, seen = list((ctypes.c_int * 2).in_dll(lib, "decode_threads")), set()
    types = tuple(quants.BY_NAME[name].id for name in pair)
    suffixes = [name.lower() for name in pair]
    for k in sorted({whole_blocks(t, k) for k in KS for t in types}):
        for n_outs in ((1024, 128), (4096, 1024), (48, 16), (9216, 5)):
            for n_rows in (1, 2, 8):
                for n_sm, max_smem in ((20, layout.SMEM_SMALL), (132, 227 << 10)):
                    found = layout.pair_launch(types, k, n_outs, n_rows, n_sm=n_sm, max_smem=max_smem)
                    if found is None:
                        continue
                    both, *parts = found
                    assert both.grid == (sum(one.grid[0] for one in parts), 1, 1) and both.grid[0] <= n_sm
                    assert both.smem == max(one.smem for one in parts) <= max_smem
                    for type_id, n_out, one in zip(types, n_outs, parts, strict=True):
                        assert one.block == both.block
                        check_decode(one, type_id, k, n_out, n_rows, False, max_smem, most_threads, ready=1)
                    variant = both.kernel.removeprefix("decode_" + "_".join(suffixes) + "_")
                    assert [one.kernel for one in parts] == [f"decode_{name}_{variant}" for name in suffixes]
                    seen.add(variant)
    assert seen == set(layout.DECODE_PAIRS[pair])
    assert layout.pair_launch(types[::-1], 896, (1024, 128), 1, n_sm=132) is None


def test_a_decode_launch_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="decode_q8_0 for 1048576 columns needs more than 101376 bytes"):
        layout.decode_launch(8, 1 << 20, 64, 1, n_sm=132)


def test_every_list_of_types_has_decode_kernels():
    """decode.cu names the lists, since types differ in their variants; a list that it lacks is one without kernels."""
    cuda = ROOT / "csrc" / "cuda"
    types = re.search(r"#define FOR_EACH_TYPE\(X\)(.*?)\n\n", (cuda / "quant" / "types.cuh").read_text(), re.S)
    lists = re.findall(r"(\w+_TYPES)\(X\)", types[1])
    assert sorted(lists) == sorted(re.findall(r"^(\w+_TYPES)\(DEFINE", (cuda / "decode.cu").read_text(), re.M))
