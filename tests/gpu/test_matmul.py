"""Matrix kernels on the device against the gguf package's dequantization and float64 products, every type.

Covered besides the numbers: guard bands and poisoned outputs (every buffer has them), odd sizes, views with strides,
bias and residual, and that a row has the same bits whatever other rows are in the launch.
"""

from __future__ import annotations

import limits
import numpy as np
import pytest
from gpu.kernel_harness import CONSTANTS, available, params
from gpu.matmul_host import Decode, ManyRows, Matmul, repack, row_lengths
from gpu.ops_host import check_nmse, new_gpu
from helpers.quant_blocks import dequantized, random_blocks

from worker_orcd.cuda import layout
from worker_orcd.gguf import quants

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not available(), reason="no CUDA device")]

TYPES = sorted(quants.TYPES)
NAMES = [quants.TYPES[t].name for t in TYPES]
every_type = pytest.mark.parametrize("type_id", TYPES, ids=NAMES)

#: (n_out, k): less than a row tile, no whole row tile, odd numbers of 32-blocks, several k tiles
SHAPES = [(5, 32), (16, 64), (100, 96), (33, 256), (130, 768), (48, 1056), (257, 2304), (64, 4864)]


@pytest.fixture(scope="module")
def gpu():
    return new_gpu()


def shapes_of(type_id):
    return [(n, k) for n, k in SHAPES if row_lengths(type_id, [k])]


def make(gpu, type_id, n_out, k, seed=0, **how):
    """A repacked random matrix and its exact float64 weights."""
    raw = random_blocks(type_id, n_out, k, np.random.default_rng([seed, type_id, n_out, k]), **how)
    return repack(gpu, type_id, raw, k), dequantized(type_id, raw).astype(np.float64)


def inputs(rng, n_rows, k, pad=0):
    """float32 [n_rows, k + pad]: rows of very different size, with outliers, as a residual stream has them."""
    x = rng.standard_normal((n_rows, k + pad)) * 2.0 ** rng.integers(-12, 12, (n_rows, 1))
    x[:, rng.integers(0, k, 2)] *= 300
    return x.astype(np.float32)


def nmse_by_row(got, want, limit, what):
    """Each row on its own scale."""
    scale = np.sqrt((want.astype(np.float64) ** 2).mean(-1, keepdims=True))
    check_nmse(got / scale, want / scale, limit, what)


@every_type
def test_dequant_is_exact(gpu, type_id):
    t = quants.TYPES[type_id]
    k = max(t.block_size, 32) * 3
    raw = random_blocks(type_id, 7, k, np.random.default_rng(type_id), mxfp4_exponents=(0, 253))
    blocks, out = gpu.buffer(raw), gpu.empty((7, k))
    p = params("DequantParams", blocks=blocks, out=out, n_blocks=7 * k // t.block_size)
    gpu.launch(gpu.kernel("dequant", f"dequant_{layout.kernel_suffix(type_id)}"), 3, 256, p)
    assert np.array_equal(out.to_numpy().view(np.uint32), dequantized(type_id, raw).view(np.uint32))


@every_type
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_rows_of_a_repacked_matrix_are_exact(gpu, type_id, piece):
    for n_out, k in shapes_of(type_id):
        raw = random_blocks(type_id, n_out, k, np.random.default_rng(k), mxfp4_exponents=(0, 253))
        m = repack(gpu, type_id, raw, k, piece)
        m.w.check_guards()
        index = np.array([n_out - 1, 0, n_out // 2, -1, n_out, 3 % n_out], np.int32)
        out, stride = gpu.empty((6, k + 8)), k + 8
        p = params("RowsParams", w=m.w, index=gpu.buffer(index), out=out, out_stride=stride, scale=1.0, k=k,
                   n_table=n_out)  # fmt: skip
        kernel = gpu.kernel("repack", f"rows_{layout.kernel_suffix(type_id)}")
        gpu.launch(kernel, 6, 128, p)
        got, want = out.to_numpy(), np.zeros((6, k), np.float32)
        exists = (index >= 0) & (index < n_out)
        want[exists] = dequantized(type_id, raw)[index[exists]]
        assert np.array_equal(got[exists, :k].view(np.uint32), want[exists].view(np.uint32)), f"{n_out} x {k}"
        assert not got[~exists, :k].any(), "rows that do not exist are zeros"
        assert np.isnan(got[:, k:]).all(), "columns outside the view were written"
        p.add, p.scale = 1, 0.5
        gpu.launch(kernel, 6, 128, p)
        with np.errstate(over="ignore"):
            assert np.array_equal(out.to_numpy()[:, :k], want + np.float32(0.5) * want)


@every_type
def test_decode_product(gpu, type_id):
    rng = np.random.default_rng(type_id)
    for (n_out, k), n_rows in zip(shapes_of(type_id), [1, 3, 8, 9, 16, 17, 40, 64], strict=False):
        m, w = make(gpu, type_id, n_out, k)
        x = inputs(rng, n_rows, k, pad=4)
        out = gpu.empty((n_rows, n_out + 3))
        Decode(gpu, [m], gpu.buffer(x), [out], n_rows, x_stride=k + 4).run()
        got = out.to_numpy()
        name = f"{quants.TYPES[type_id].name} {n_out} x {k}, {n_rows} rows"
        nmse_by_row(got[:, :n_out], x[:, :k].astype(np.float64) @ w.T, limits.MATMUL_NMSE, name)
        assert np.isnan(got[:, n_out:]).all(), "columns outside the view were written"


@pytest.mark.parametrize("pair", list(layout.DECODE_PAIRS), ids="-".join)
def test_two_types_in_one_launch(gpu, pair):
    """q and k with v of more bits: the bits that each has alone, whichever variant and however many rows."""
    types, rng, seen = [quants.BY_NAME[name].id for name in pair], np.random.default_rng(0), set()
    weight = ("rms", gpu.buffer(rng.uniform(0.5, 2.0, 5120).astype(np.float32)), None, 1e-5)
    for n_outs, k in [((1024, 128), 896), ((272, 33), 1280), ((4096, 512), 1536), ((48, 16), 256), ((300, 40), 3072),
                      ((8192, 512), 1536)]:  # fmt: skip
        if any(k % quants.TYPES[t].block_size for t in types):
            continue
        made = [make(gpu, t, n, k)[0] for t, n in zip(types, n_outs, strict=True)]
        for n_rows in (1, 2, 8):
            sizes = {"n_sm": 132, "max_smem": gpu.max_smem}  # of whatever GPU: grids are free
            launches = layout.pair_launch(tuple(types), k, n_outs, n_rows, **sizes)
            if launches is None:
                continue
            seen.add(launches[0].kernel)
            x = gpu.buffer(inputs(rng, n_rows, k))
            wants, gots = ([gpu.empty((n_rows, n)) for n in n_outs] for _ in range(2))
            alone = [Decode(gpu, [m], x, [out], n_rows, norm=weight) for m, out in zip(made, wants, strict=True)]
            for one in alone:
                one.run()
            both = params("DecodePairParams", n_first_blocks=launches[1].grid[0])
            for i, (one, launch, out) in enumerate(zip(alone, launches[1:], gots, strict=True)):
                both.p[i] = one.launches[0][2]
                for name, value in vars(launch).items():
                    if name not in ("kernel", "grid", "block", "smem"):
                        setattr(both.p[i], name, value)
                both.p[i].out = out.ptr
            kernel = gpu.kernel("decode", launches[0].kernel)
            gpu.launch(kernel, launches[0].grid, launches[0].block, both, launches[0].smem)
            for got, want in zip(gots, wants, strict=True):
                assert np.array_equal(got.to_numpy(), want.to_numpy()), f"{n_outs} x {k}, {n_rows} rows"
    assert seen == {f"decode_{'_'.join(name.lower() for name in pair)}_{v}" for v in layout.DECODE_PAIRS[pair]}


@every_type
@pytest.mark.parametrize("kernel", ["decode", "prompt"])
def test_a_row_does_not_depend_on_the_others(gpu, type_id, kernel):
    k = {"F32": 1088, "F16": 1088, "BF16": 1088}.get(quants.TYPES[type_id].name, 1280)
    n_out, most = 200, 64 if kernel == "decode" else 300
    m, w = make(gpu, type_id, n_out, k)
    x = inputs(np.random.default_rng(1), most, k)

    def product(rows):
        out = gpu.empty((len(rows), n_out))
        if kernel == "decode":
            Decode(gpu, [m], gpu.buffer(x[rows]), [out], len(rows)).run()
        else:
            Matmul(gpu, m, gpu.buffer(x[rows]), out, len(rows)).run()
        return out.to_numpy()

    everything = product(np.arange(most))
    nmse_by_row(everything, x.astype(np.float64) @ w.T, limits.MATMUL_NMSE, f"{quants.TYPES[type_id].name} {most} rows")
    for n in (1, 2, 7, 8, 9, 16, 17, 25, 32, 33, 63):
        rows = np.random.default_rng(n).permutation(most)[:n]
        assert np.array_equal(product(rows), everything[rows]), f"{n} rows alone differ from the same among {most}"
    assert np.array_equal(product(np.arange(most)), everything), "two runs differ"


@every_type
def test_bias_residual_and_groups(gpu, type_id):
    """Several matrices in one decode launch, as q, k, v: each as alone; bias and residual added in float32."""
    k, sizes, n_rows = 768, (144, 40, 17), 5
    rng = np.random.default_rng(2)
    made = [make(gpu, type_id, n, k, seed=i) for i, n in enumerate(sizes)]
    x = inputs(rng, n_rows, k)
    dx = gpu.buffer(x)
    biases = [gpu.buffer(rng.standard_normal(n).astype(np.float32)) for n in sizes]
    start = [rng.standard_normal((n_rows, n)).astype(np.float32) for n in sizes]
    together = [gpu.buffer(s) for s in start]
    Decode(gpu, [m for m, _ in made], dx, together, n_rows, biases=biases, mode="add").run()
    for (m, w), bias, begin, out in zip(made, biases, start, together, strict=True):
        alone, plain = gpu.buffer(begin), gpu.empty(begin.shape)
        Decode(gpu, [m], dx, [alone], n_rows, biases=[bias], mode="add").run()
        Decode(gpu, [m], dx, [plain], n_rows).run()
        assert np.array_equal(out.to_numpy(), alone.to_numpy())
        assert np.array_equal(out.to_numpy(), begin + (plain.to_numpy() + bias.to_numpy()))
        prefill, plain = gpu.buffer(begin), gpu.empty(begin.shape)
        Matmul(gpu, m, dx, prefill, n_rows, bias=bias, add=True).run()
        Matmul(gpu, m, dx, plain, n_rows).run()
        want = x.astype(np.float64) @ w.T
        nmse_by_row(plain.to_numpy(), want, limits.MATMUL_NMSE, f"{quants.TYPES[type_id].name} {m.n_out}")
        assert np.array_equal(prefill.to_numpy(), out.to_numpy()), "decode and prompt rows differ"


@every_type
def test_prefill_product(gpu, type_id):
    rng = np.random.default_rng(type_id)
    for (n_out, k), n_rows in zip(shapes_of(type_id), [1, 7, 64, 65, 127, 128, 130, 200], strict=False):
        m, w = make(gpu, type_id, n_out, k)
        x = inputs(rng, n_rows, k, pad=4)
        dx, results = gpu.buffer(x), []
        for small in (False, True):
            out = gpu.empty((n_rows, n_out + 3))
            Matmul(gpu, m, dx, out, n_rows, x_stride=k + 4, small=small).run()
            results.append(out.to_numpy())
        name = f"{quants.TYPES[type_id].name} {n_out} x {k}, {n_rows} rows"
        nmse_by_row(results[0][:, :n_out], x[:, :k].astype(np.float64) @ w.T, limits.MATMUL_NMSE, name)
        assert np.isnan(results[0][:, n_out:]).all(), "columns outside the view were written"
        assert np.array_equal(results[0], results[1], equal_nan=True), "the two variants differ"


def norm_of(gpu, rng, kind, k):
    """A norm before a product, as `Converted` takes it."""
    if kind is None:
        return None
    vector = lambda: gpu.buffer((1 + 0.3 * rng.standard_normal(k)).astype(np.float32))  # noqa: E731
    return (kind, vector(), vector() if kind == "layer" else None, 1e-5)


def normed(x, norm):
    """What a norm makes of float32 rows, in float64."""
    if norm is None:
        return x.astype(np.float64)
    kind, weight, bias, eps = norm
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + eps) * weight.to_numpy()
    return x + bias.to_numpy() if bias else x


#: (n_out, k): chunks of 128, 256, 512, 1024 columns, whole and broken; one chunk, more than a block has warps
FAMILY_SHAPES = [(40, 32), (5, 96), (33, 288), (200, 896), (48, 256), (100, 1024), (130, 2880), (64, 4864), (16, 5120),
                 (40, 5376), (24, 8192), (17, 29568)]  # fmt: skip


@every_type
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_a_row_has_the_same_bits_in_every_kernel(gpu, type_id, norm):
    """Decode rows, one or many, and prompt rows: whichever kernel has a row, and however that is launched."""
    rng = np.random.default_rng(type_id)
    for n_out, k in [(n, k) for n, k in FAMILY_SHAPES if row_lengths(type_id, [k])]:
        m, w = make(gpu, type_id, n_out, k)
        x, before = inputs(rng, 70, k), norm_of(gpu, rng, norm, k)
        bias = gpu.buffer(rng.standard_normal(n_out).astype(np.float32))
        prompt = gpu.empty((70, n_out))
        Matmul(gpu, m, gpu.buffer(x), prompt, 70, bias=bias, norm=before).run()
        want = prompt.to_numpy()
        exact = normed(x, before) @ w.T + bias.to_numpy()
        name = f"{quants.TYPES[type_id].name} {n_out} x {k}"
        nmse_by_row(want, exact, limits.MATMUL_NMSE, name)

        def decode(first, n, m=m, x=x, bias=bias, before=before, n_out=n_out, **how):
            out = gpu.empty((n, n_out))
            Decode(gpu, [m], gpu.buffer(x[first : first + n]), [out], n, biases=[bias], norm=before, **how).run()
            return out.to_numpy()

        ways = [{}, {"inline": False}, {"early": False}, {"early": False, "grid": 1}, {"early": False, "depth": 1},
                {"early": False, "grid": 2, "n_groups": 1}, {"early": True, "grid": 2},
                {"early": True, "grid": 1, "n_groups": 1, "n_staged": 2, "depth": 1},
                {"max_smem": layout.SMEM_SMALL}]  # fmt: skip
        for row in (0, 3, 69):
            for how in ways:
                assert np.array_equal(decode(row, 1, **how)[0], want[row]), f"{name}: row {row} {how}"
        for first, n in ((1, 2), (5, 3), (0, 8), (7, 9), (3, 17), (0, 64), (2, 33)):
            for how in ways if n <= 8 else (ways[0], ways[-1]):
                assert np.array_equal(decode(first, n, **how), want[first : first + n]), f"{name}: {n} rows {how}"


@every_type
@pytest.mark.parametrize("tile_rows", list(layout.WGMMA_TILES))
def test_products_of_warpgroups(gpu, type_id, tile_rows):
    """wgmma_*: the bits of prompt rows, whatever the rows, the shape, the grid, the norm and what becomes of the
    results."""
    if gpu.arch != layout.WGMMA_ARCH:
        pytest.skip(f"sm_{gpu.arch} has no products of warpgroups")
    rng = np.random.default_rng([type_id, tile_rows])
    for i, (n_out, k) in enumerate([(n, k) for n, k in FAMILY_SHAPES if row_lengths(type_id, [k])]):
        m, _ = make(gpu, type_id, n_out, k)
        n_rows = [9, tile_rows, tile_rows + 1, 2 * tile_rows + 17, 130][i % 5]
        kind = [None, "rms", "layer"][i % 3]
        x, before = gpu.buffer(inputs(rng, n_rows, k, pad=4)), norm_of(gpu, rng, kind, k)
        bias = gpu.buffer(rng.standard_normal(n_out).astype(np.float32)) if i % 2 else None
        start = rng.standard_normal((n_rows, n_out + 3 + i % 2)).astype(np.float32)
        for mode in ("store", "add"):
            want, got = gpu.buffer(start), gpu.buffer(start)
            Matmul(gpu, m, x, want, n_rows, x_stride=k + 4, bias=bias, norm=before, add=mode == "add").run()
            product = ManyRows(gpu, [m], x, [got], n_rows, tile_rows=tile_rows, x_stride=k + 4, biases=[bias],
                               norm=before, mode=mode, grid=[None, 1, 3][i % 3])  # fmt: skip
            product.run()
            assert product.launch.kernel.endswith(f"_{tile_rows}")
            assert np.array_equal(got.to_numpy(), want.to_numpy()), f"{n_out} x {k}, {n_rows} rows, {mode}"


@every_type
def test_warpgroups_with_several_matrices(gpu, type_id):
    """q, k and v in one launch, and gate and up: the bits of a launch for each."""
    if gpu.arch != layout.WGMMA_ARCH:
        pytest.skip(f"sm_{gpu.arch} has no products of warpgroups")
    rng, k = np.random.default_rng(type_id), 768
    for tile_rows, n_rows in zip(layout.WGMMA_TILES, (9, 70, 65, 40, 200), strict=True):
        x, before = gpu.buffer(inputs(rng, n_rows, k) / 16), norm_of(gpu, rng, "rms", k)
        sizes = (144, 40, 17)
        made = [make(gpu, type_id, n, k, seed=i)[0] for i, n in enumerate(sizes)]
        biases = [gpu.buffer(rng.standard_normal(n).astype(np.float32)) for n in sizes]
        wants, gots = ([gpu.empty((n_rows, n)) for n in sizes] for _ in range(2))
        for m, bias, out in zip(made, biases, wants, strict=True):
            Matmul(gpu, m, x, out, n_rows, bias=bias, norm=before).run()
        ManyRows(gpu, made, x, gots, n_rows, tile_rows=tile_rows, biases=biases, norm=before).run()
        for want, got in zip(wants, gots, strict=True):
            assert np.array_equal(got.to_numpy(), want.to_numpy()), f"{tile_rows} rows a tile"
        for kind, n_out in (("SILU", 100), ("GELU_TANH", 38), ("SWIGLU_OAI", 100)):
            kind = CONSTANTS[f"GLU_{kind}"]
            made = [make(gpu, type_id, n_out, k, seed=i)[0] for i in range(2)]
            biases = [gpu.buffer(rng.standard_normal(n_out).astype(np.float32)) for _ in range(2)]
            alone, want = [gpu.empty((n_rows, n_out)) for _ in range(2)], gpu.empty((n_rows, n_out))
            for m, bias, out in zip(made, biases, alone, strict=True):
                Matmul(gpu, m, x, out, n_rows, bias=bias, norm=before).run()
            p = params("PointwiseParams", a=alone[0], b=alone[1], out=want, a_stride=n_out, b_stride=n_out,
                       out_stride=n_out, n=n_out, kind=kind)  # fmt: skip
            gpu.launch(gpu.kernel("pointwise", "glu"), (1, n_rows), 256, p)
            out, untouched = gpu.empty((n_rows, n_out)), gpu.empty((n_rows, n_out))
            ManyRows(gpu, made, x, [out, untouched], n_rows, tile_rows=tile_rows, biases=biases, norm=before,
                     mode="glu", glu=kind, grid=2).run()  # fmt: skip
            assert np.array_equal(out.to_numpy(), want.to_numpy()), f"{tile_rows} rows a tile, activation {kind}"
            assert np.isnan(untouched.to_numpy()).all()


@pytest.mark.parametrize("type_id", [t for t in TYPES if quants.TYPES[t].name not in ("F32", "F16", "BF16")])
def test_small_launches_of_one_row(gpu, type_id):
    """decode_*_128e1 and 256e1 with every number of row tiles of a warp that they decode into shared memory, all warps
    with as many or some with one less: the bits of prompt rows."""
    rng = np.random.default_rng(type_id)
    cases = [(896, layout.early_tiles(type_id), layout.MOST_STAGED), (1280, 1, layout.MOST_STAGED_256)]
    for k, ready, most_staged in [case for case in cases if row_lengths(type_id, [case[0]])]:
        for n_staged in range(most_staged + 1):
            for n_groups in (1, 2) if n_staged < 3 else (1,):  # shared memory has no room for more of all types
                n_tiles = n_groups * (ready + n_staged) - (n_groups - 1)
                n_out = layout.TILE_ROWS * n_tiles - 3
                m, _ = make(gpu, type_id, n_out, k)
                x, before = gpu.buffer(inputs(rng, 1, k)), norm_of(gpu, rng, "rms", k)
                bias = gpu.buffer(rng.standard_normal(n_out).astype(np.float32))
                want, got = gpu.empty((1, n_out)), gpu.empty((1, n_out))
                Matmul(gpu, m, x, want, 1, bias=bias, norm=before).run()
                one = Decode(gpu, [m], x, [got], 1, biases=[bias], norm=before, early=1, grid=1, n_groups=n_groups)
                launch = one.launches[0][1]
                assert launch.kernel.endswith("e1") and launch.n_staged == n_staged, launch
                one.run()
                assert np.array_equal(got.to_numpy(), want.to_numpy()), f"{n_out} x {k}, {launch}"


@every_type
@pytest.mark.parametrize("kind", ["SILU", "GELU_TANH", "SWIGLU_OAI"])
def test_gated_products(gpu, type_id, kind):
    """act(gate) * up in the product's launch: the bits of two products and the activation by itself."""
    rng, kind = np.random.default_rng(type_id), CONSTANTS[f"GLU_{kind}"]
    for (n_out, k), n_rows in zip([(40, 896), (100, 768), (304, 1024), (64, 8192)], (1, 3, 8, 2), strict=True):
        if not row_lengths(type_id, [k]):
            continue
        made = [make(gpu, type_id, n_out, k, seed=i)[0] for i in range(2)]
        x, before = gpu.buffer(inputs(rng, n_rows, k) / 16), norm_of(gpu, rng, "rms", k)
        biases = [gpu.buffer(rng.standard_normal(n_out).astype(np.float32)) for _ in range(2)]
        alone = [gpu.empty((n_rows, n_out)) for _ in range(2)]
        Decode(gpu, made, x, alone, n_rows, biases=biases, norm=before).run()
        want = gpu.empty((n_rows, n_out))
        p = params("PointwiseParams", a=alone[0], b=alone[1], out=want, a_stride=n_out, b_stride=n_out,
                   out_stride=n_out, n=n_out, kind=kind)  # fmt: skip
        gpu.launch(gpu.kernel("pointwise", "glu"), (1, n_rows), 256, p)
        for how in ({}, {"early": False}, {"early": False, "grid": 1}, {"early": False, "n_groups": 1},
                    {"early": True, "grid": 2}, {"early": True, "grid": 3, "n_groups": 1, "n_staged": 1}):  # fmt: skip
            out, untouched = gpu.empty((n_rows, n_out)), gpu.empty((n_rows, n_out))
            outs = [out, untouched]
            Decode(gpu, made, x, outs, n_rows, biases=biases, norm=before, mode="glu", glu=kind, **how).run()
            assert np.array_equal(out.to_numpy(), want.to_numpy()), f"{n_out} x {k}, {n_rows} rows {how}"
            assert np.isnan(untouched.to_numpy()).all()


@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("name", ["F32", "BF16", "MXFP4", "Q4_K", "Q8_0"])
def test_no_range_is_too_wide(gpu, name, magnitude):
    """Activations, and the weights of types that can hold them, far outside the range of fp16."""
    type_id, k, n_out, n_rows = quants.BY_NAME[name].id, 512, 64, 9
    exponent = int(np.log2(magnitude))
    raw = random_blocks(type_id, n_out, k, np.random.default_rng(0), mxfp4_exponents=(120 + exponent, 130 + exponent))
    if name == "F32":
        raw = (raw.view(np.float32) * np.float32(magnitude)).view(np.uint8)
    if name == "BF16":
        wide = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32) * np.float32(2.0**exponent)
        raw = (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    m, w = repack(gpu, type_id, raw, k), dequantized(type_id, raw).astype(np.float64)
    x = inputs(np.random.default_rng(3), n_rows, k) * np.float32(1 / magnitude)
    dx, decode, prefill = gpu.buffer(x), gpu.empty((n_rows, n_out)), gpu.empty((n_rows, n_out))
    Decode(gpu, [m], dx, [decode], n_rows).run()
    Matmul(gpu, m, dx, prefill, n_rows).run()
    want = x.astype(np.float64) @ w.T
    nmse_by_row(decode.to_numpy(), want, limits.MATMUL_NMSE, f"{name} decode at {magnitude:.0e}")
    nmse_by_row(prefill.to_numpy(), want, limits.MATMUL_NMSE, f"{name} prefill at {magnitude:.0e}")


@pytest.mark.parametrize("n_rows", [1, 20])
def test_dependent_launches_wait(gpu, n_rows):
    """A chain of products, each reading what the one before wrote, with and without programmatic launch."""
    type_id, n = quants.BY_NAME["Q4_0"].id, 1024
    m, _ = make(gpu, type_id, n, n)
    x = inputs(np.random.default_rng(5), n_rows, n)
    results = []
    for pdl in (False, True, True):
        a, b = gpu.buffer(x), gpu.empty((n_rows, n))
        steps = [Decode(gpu, [m], a, [b], n_rows), Decode(gpu, [m], b, [a], n_rows)] * 3
        for step in steps:
            step.run(pdl=pdl)
        results.append(a.to_numpy())
    assert np.isfinite(results[0]).all()
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
