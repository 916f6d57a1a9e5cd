"""Matrix kernels on the device against the gguf package's dequantization and float64 products, every type.

Covered besides the numbers: guard bands and poisoned outputs (every buffer has them), odd sizes, views with strides,
bias and residual, and that a row has the same bits whatever other rows are in the launch.
"""

from __future__ import annotations

import limits
import numpy as np
import pytest
from gpu.kernel_harness import available, params
from gpu.matmul_host import Matmul, Matvec, repack, row_lengths
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
        Matvec(gpu, [m], gpu.buffer(x), [out], n_rows, x_stride=k + 4).run()
        got = out.to_numpy()
        name = f"{quants.TYPES[type_id].name} {n_out} x {k}, {n_rows} rows"
        nmse_by_row(got[:, :n_out], x[:, :k].astype(np.float64) @ w.T, limits.MATVEC_NMSE, name)
        assert np.isnan(got[:, n_out:]).all(), "columns outside the view were written"


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
            Matvec(gpu, [m], gpu.buffer(x[rows]), [out], len(rows)).run()
        else:
            Matmul(gpu, m, gpu.buffer(x[rows]), out, len(rows)).run()
        return out.to_numpy()

    everything = product(np.arange(most))
    limit = limits.MATVEC_NMSE if kernel == "decode" else limits.MATMUL_NMSE
    nmse_by_row(everything, x.astype(np.float64) @ w.T, limit, f"{quants.TYPES[type_id].name} {most} rows")
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
    Matvec(gpu, [m for m, _ in made], dx, together, n_rows, biases=biases, add=True).run()
    for (m, w), bias, begin, out in zip(made, biases, start, together, strict=True):
        alone, plain = gpu.buffer(begin), gpu.empty(begin.shape)
        Matvec(gpu, [m], dx, [alone], n_rows, biases=[bias], add=True).run()
        Matvec(gpu, [m], dx, [plain], n_rows).run()
        assert np.array_equal(out.to_numpy(), alone.to_numpy())
        assert np.array_equal(out.to_numpy(), begin + (plain.to_numpy() + bias.to_numpy()))
        prefill, plain = gpu.buffer(begin), gpu.empty(begin.shape)
        Matmul(gpu, m, dx, prefill, n_rows, bias=bias, add=True).run()
        Matmul(gpu, m, dx, plain, n_rows).run()
        want = x.astype(np.float64) @ w.T
        nmse_by_row(plain.to_numpy(), want, limits.MATMUL_NMSE, f"{quants.TYPES[type_id].name} {m.n_out}")
        assert np.allclose(prefill.to_numpy(), begin + (plain.to_numpy() + bias.to_numpy()), rtol=1e-6, atol=1e-6)


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
    Matvec(gpu, [m], dx, [decode], n_rows).run()
    Matmul(gpu, m, dx, prefill, n_rows).run()
    want = x.astype(np.float64) @ w.T
    nmse_by_row(decode.to_numpy(), want, limits.MATVEC_NMSE, f"{name} decode at {magnitude:.0e}")
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
        steps = [Matvec(gpu, [m], a, [b], n_rows), Matvec(gpu, [m], b, [a], n_rows)] * 3
        for step in steps:
            step.run(pdl=pdl)
        results.append(a.to_numpy())
    assert np.isfinite(results[0]).all()
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
