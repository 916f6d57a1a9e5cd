"""Norm, rotary embedding with cache write, and pointwise kernels against float64."""

from __future__ import annotations

import limits
import numpy as np
import pytest
from gpu.kernel_harness import available, params
from gpu.ops_host import KV_BLOCK, PagedCache, check_nmse, new_gpu, rule, view

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not available(), reason="no CUDA device")]

RMS, LAYER = 0, 1
INTERLEAVED, NEOX = 0, 1


@pytest.fixture(scope="module")
def gpu():
    return new_gpu()


def norm_reference(kind, x, weight, bias, eps):
    x = x.astype(np.float64)
    if kind == LAYER:
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


@pytest.mark.parametrize("kind", [RMS, LAYER])
@pytest.mark.parametrize(
    ("n", "pad"), [(896, 0), (64, 8), (4, 0), (2880, 4), (8192, 0), (16384, 0), (1, 0), (3, 2), (897, 1), (5001, 0)]
)
def test_norm(gpu, n, pad, kind):
    rng = np.random.default_rng(n + kind)
    rows, stride = 3, n + pad
    x = (rng.standard_normal((rows, stride)) * 3 + (500 if kind == LAYER else 0.5)).astype(np.float32)
    weight, bias = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    scalar = bool(n % 4 or stride % 4)
    dx, dw, db = (gpu.buffer(a) for a in (x, weight, bias))
    out = gpu.empty((rows, stride))
    p = params("NormParams", x=dx, weight=dw, bias=db, out=out,
               x_stride=stride, out_stride=stride, n=n, kind=kind, eps=1e-5)  # fmt: skip
    kernel = gpu.kernel("norm", "norm_scalar" if scalar else "norm_vec4")
    gpu.launch(kernel, rows, rule("norm_threads", n, scalar), p)
    got, x_after = out.to_numpy(), dx.to_numpy()
    assert np.array_equal(x_after, x), "the input was changed"
    assert np.isnan(got[:, n:]).all(), "columns outside the view were written"
    # the mean of 500 costs bits of the difference, whatever the algorithm
    limit = limits.LAYER_NORM_NMSE if kind == LAYER else limits.POINTWISE_NMSE
    check_nmse(got[:, :n], norm_reference(kind, x[:, :n], weight, bias, 1e-5), limit, "norm")


def test_norm_in_place_and_repeatable(gpu):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 1024)).astype(np.float32)
    weight = gpu.buffer(rng.standard_normal(1024).astype(np.float32))
    results = []
    for rows in (5, 1):  # a row alone and among others
        d = gpu.buffer(x[:rows])
        p = params("NormParams", x=d, weight=weight, out=d, x_stride=1024, out_stride=1024, n=1024, eps=1e-6)
        gpu.launch(gpu.kernel("norm", "norm_vec4"), rows, rule("norm_threads", 1024, 0), p, pdl=True)
        results.append(d.to_numpy())
    assert np.array_equal(results[0][:1], results[1])


@pytest.mark.parametrize(("group", "n_group"), [(64, 14), (128, 3), (80, 9), (5, 1), (1024, 2)])
def test_norm_group(gpu, group, n_group):
    rng = np.random.default_rng(group)
    x = rng.standard_normal((3, n_group * group + 4)).astype(np.float32)
    weight = rng.standard_normal(group).astype(np.float32)
    d, w = gpu.buffer(x), gpu.buffer(weight)
    stride = x.shape[1]
    p = params(
        "NormParams",
        x=d,
        weight=w,
        out=d,
        x_stride=stride,
        out_stride=stride,
        n=group,
        n_group=n_group,
        eps=1e-6,
    )
    gpu.launch(gpu.kernel("norm", "norm_group"), (-(-n_group // 8), 3), 256, p)
    got = d.to_numpy()
    want = norm_reference(RMS, x[:, : n_group * group].reshape(3, n_group, group), weight, 0.0, 1e-6)
    check_nmse(got[:, : n_group * group], want.reshape(3, -1), limits.POINTWISE_NMSE, "norm_group")
    assert np.array_equal(got[:, n_group * group :], x[:, n_group * group :])


def rope_reference(x, position, inv_freq, rope_type, n_rot, mscale):
    x = x.astype(np.float64).copy()
    angle = position * inv_freq.astype(np.float64)
    cos, sin = np.cos(angle) * mscale, np.sin(angle) * mscale
    a, b = (
        (slice(0, n_rot, 2), slice(1, n_rot, 2))
        if rope_type == INTERLEAVED
        else (slice(0, n_rot // 2), slice(n_rot // 2, n_rot))
    )
    xa, xb = x[..., a].copy(), x[..., b].copy()
    x[..., a], x[..., b] = xa * cos - xb * sin, xa * sin + xb * cos
    return x


@pytest.mark.parametrize("rope_type", [INTERLEAVED, NEOX])
@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim", "n_rot", "mscale"),
    [
        (14, 2, 64, 64, 1.0),
        (4, 4, 96, 96, 1.19),
        (8, 1, 128, 64, 1.0),
        (3, 3, 80, 32, 1.0),
        (2, 2, 64, 0, 1.0),
        (2, 1, 256, 256, 1.0),
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_rope_kv(gpu, n_head, n_head_kv, head_dim, n_rot, mscale, rope_type, long):
    rng = np.random.default_rng(head_dim + rope_type)
    lengths = [65, 131072, 129, 40]
    cache = PagedCache(rng, [65, 64, 129, 40], n_head_kv, head_dim, filled=False)
    # Sequence 1 is long: only the block of its last position exists.
    table = np.full((4, 131072 // KV_BLOCK), -1, np.int32)
    table[:, : cache.max_blocks] = cache.block_table
    table[1, -1], table[1, 0] = table[1, 0], -1
    positions = np.array([n - 1 for n in lengths] + [7], np.int32)
    slots = np.array([0, 1, 2, 3, -1], np.int32)  # the last row is dead
    width = (n_head + 2 * n_head_kv) * head_dim + 8
    x = rng.standard_normal((5, width)).astype(np.float32)
    x[0, (n_head + n_head_kv) * head_dim] = 1e6  # a value float16 cannot hold
    inv_freq = (10000.0 ** (-np.arange(max(n_rot // 2, 1)) / max(n_rot // 2, 1))).astype(np.float32)
    rope_tables = np.array([1, 0, 1, 0], np.int32)
    both = np.concatenate([inv_freq, inv_freq / 3])
    buffers = [gpu.buffer(a) for a in (x, both, cache.arena, table, positions, slots, rope_tables)]
    dx, df, dkv, dt, dp, ds, dl = buffers
    k0, v0 = n_head * head_dim, (n_head + n_head_kv) * head_dim
    p = params("RopeKvParams", q=dx, k=view(dx, k0), v=view(dx, v0), inv_freq=df, kv=dkv, block_table=dt,
               positions=dp, slots=ds, rope_tables=dl if long else 0,
               q_stride=width, k_stride=width, v_stride=width, n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim,
               n_rot=n_rot, rope_type=rope_type, max_blocks=table.shape[1], mscale=mscale)  # fmt: skip
    gpu.launch(gpu.kernel("rope_kv", "rope_kv"), (5, 3), 256, p)
    got, arena = dx.to_numpy(), dkv.to_numpy()
    assert np.array_equal(got[4], x[4]), "the dead row was changed"
    assert np.array_equal(got[:, v0:], x[:, v0:]), "v was changed"
    expected = cache.arena.copy()
    saved, cache.arena = cache.arena, expected
    for r in range(4):
        mine = both[len(inv_freq) :] if long and rope_tables[r] else inv_freq
        want = rope_reference(x[r, :v0].reshape(-1, head_dim), int(positions[r]), mine, rope_type, n_rot, mscale)
        check_nmse(got[r, :v0], want.ravel(), limits.POINTWISE_NMSE, f"rope at position {positions[r]}")
        at = int(positions[r]) if r != 1 else KV_BLOCK - 1
        k = got[r, k0:v0].reshape(n_head_kv, head_dim).astype(np.float16)
        v = x[r, v0 : v0 + n_head_kv * head_dim].reshape(n_head_kv, head_dim)
        cache.put(r, at, k, np.clip(v, -65504, 65504).astype(np.float16))
    cache.arena = saved
    assert np.array_equal(arena.view(np.uint16), expected.view(np.uint16)), (
        "the cache differs from k and v, or was written elsewhere"
    )


@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_keys_and_values_of_prompts(gpu, head_dim):
    """Runs of rows of several sequences, eight of which begin at a multiple of eight or not, with dead rows between."""
    rng, n_head_kv = np.random.default_rng(head_dim), 3
    cache = PagedCache(rng, [90, 64, 41], n_head_kv, head_dim, filled=False)
    runs = [(0, 0, 24), (-1, 0, 1), (1, 8, 23), (2, 0, 16), (2, 24, 9), (-1, 8, 8), (0, 56, 17), (1, 40, 24)]
    slots = np.concatenate([np.full(n, seq) for seq, _, n in runs]).astype(np.int32)
    positions = np.concatenate([np.arange(at, at + n) for _, at, n in runs]).astype(np.int32)
    width = 2 * n_head_kv * head_dim + 4
    x = (rng.standard_normal((len(slots), width)) * 3e4).astype(np.float32)
    dx, dkv, dt = gpu.buffer(x), gpu.buffer(cache.arena), gpu.buffer(cache.block_table)
    p = params("RopeKvParams", k=dx, v=view(dx, n_head_kv * head_dim), kv=dkv, block_table=dt,
               inv_freq=gpu.buffer(x[0]), positions=gpu.buffer(positions), slots=gpu.buffer(slots),
               k_stride=width, v_stride=width, n_head_kv=n_head_kv, head_dim=head_dim,
               max_blocks=cache.max_blocks, mscale=1.0)  # fmt: skip
    gpu.launch(gpu.kernel("rope_kv", "rope_kv"), (len(slots), 2), 256, p)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot >= 0:
            k, v = (x[row, : width - 4].reshape(2, n_head_kv, head_dim).clip(-65504, 65504)).astype(np.float16)
            cache.put(slot, position, k, v)
    assert np.array_equal(dkv.to_numpy().view(np.uint16), cache.arena.view(np.uint16))


def test_rope_keeps_nan_visible(gpu):
    cache = PagedCache(np.random.default_rng(0), [1], 1, 64, filled=False)
    cache.arena[:] = 0
    x = np.full((1, 192), np.nan, np.float32)
    dx, df, dkv = gpu.buffer(x), gpu.buffer(np.ones(32, np.float32)), gpu.buffer(cache.arena)
    dt, dp, ds = gpu.buffer(cache.block_table), gpu.buffer(np.zeros(1, np.int32)), gpu.buffer(np.zeros(1, np.int32))
    p = params("RopeKvParams", q=dx, k=view(dx, 64), v=view(dx, 128), inv_freq=df, kv=dkv, block_table=dt,
               positions=dp, slots=ds,
               q_stride=192, k_stride=192, v_stride=192, n_head=1, n_head_kv=1, head_dim=64, n_rot=64, rope_type=NEOX,
               max_blocks=cache.max_blocks, mscale=1.0)  # fmt: skip
    gpu.launch(gpu.kernel("rope_kv", "rope_kv"), 1, 256, p)
    cache.arena = dkv.to_numpy()
    assert np.isnan(cache.at(0, 0)).all()


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def glu_reference(kind, g, u):
    g, u = g.astype(np.float64), u.astype(np.float64)
    if kind == 0:
        return g * sigmoid(g) * u
    if kind == 1:
        return gelu(g) * u
    g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    return g * sigmoid(1.702 * g) * (u + 1)


@pytest.mark.parametrize(("n", "offset"), [(4864, 0), (1, 0), (1027, 0), (256, 1), (6, 2)])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_glu(gpu, n, offset, kind):
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((3, 2 * n + offset)) * 5).astype(np.float32)
    dx, out = gpu.buffer(x), gpu.empty((3, n))
    p = params("PointwiseParams", a=view(dx, offset), b=view(dx, offset + n), out=out, a_stride=x.shape[1],
               b_stride=x.shape[1], out_stride=n, n=n, kind=kind)  # fmt: skip
    gpu.launch(gpu.kernel("pointwise", "glu"), (-(-n // 1024), 3), 256, p)
    check_nmse(
        out.to_numpy(), glu_reference(kind, x[:, offset : offset + n], x[:, offset + n :]), limits.POINTWISE_NMSE, "glu"
    )


def test_glu_keeps_nan(gpu):
    x = np.array([[np.nan, 1.0, 1.0, np.nan]], np.float32)
    dx, out = gpu.buffer(x), gpu.empty((1, 2))
    p = params("PointwiseParams", a=dx, b=view(dx, 2), out=out, a_stride=4, b_stride=4, out_stride=2, n=2, kind=2)
    gpu.launch(gpu.kernel("pointwise", "glu"), 1, 256, p)
    assert np.isnan(out.to_numpy()).all()


@pytest.mark.parametrize(("n", "pad"), [(3072, 0), (1029, 3), (2, 0)])
def test_act_add_gather(gpu, n, pad):
    rng = np.random.default_rng(n)
    x, y = (rng.standard_normal((4, n + pad)).astype(np.float32) for _ in range(2))
    rows = np.array([3, -1, 0], np.int32)
    grid = (-(-n // 1024), 4)
    dx, dy, drows = gpu.buffer(x), gpu.buffer(y), gpu.buffer(rows)
    common = {"n": n, "a_stride": n + pad, "out_stride": n + pad}
    gpu.launch(gpu.kernel("pointwise", "add"), grid, 256, params("PointwiseParams", a=dx, out=dy, **common))
    total = dy.to_numpy()
    assert np.array_equal(total[:, :n], x[:, :n] + y[:, :n]) and np.array_equal(total[:, n:], y[:, n:])
    out = gpu.empty((3, n + pad))
    gather = params("PointwiseParams", a=dx, out=out, rows=drows, **common)
    gpu.launch(gpu.kernel("pointwise", "gather_rows"), (grid[0], 3), 256, gather)
    got = out.to_numpy()
    assert (
        np.array_equal(got[:, :n], np.stack([x[3, :n], np.zeros(n, np.float32), x[0, :n]]))
        and np.isnan(got[:, n:]).all()
    )
    gpu.launch(gpu.kernel("pointwise", "act_gelu_tanh"), grid, 256, params("PointwiseParams", a=dx, out=dx, **common))
    check_nmse(dx.to_numpy()[:, :n], gelu(x[:, :n].astype(np.float64)), limits.POINTWISE_NMSE, "gelu")
