"""Expert kernels on the device: routing, lists, products of every type against float64, any load of the experts.

Covered besides the numbers: guard bands and poisoned outputs (every buffer has them), odd sizes, and that a row has the
same bits whatever other rows are in the launch and whichever variant computes it.
"""

from __future__ import annotations

import limits
import numpy as np
import pytest
from gpu.expert_host import Decode, List, Many, Prefill, Route, host_list, repack_experts
from gpu.kernel_harness import CONSTANTS, available, params
from gpu.ops_host import check_nmse, new_gpu
from helpers.quant_blocks import dequantized, random_blocks

from worker_orcd.cuda import expert_layout, layout
from worker_orcd.gguf import quants

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not available(), reason="no CUDA device")]

TYPES = sorted(quants.TYPES)
every_type = pytest.mark.parametrize("type_id", TYPES, ids=[quants.TYPES[t].name for t in TYPES])

N_EXPERT, N_USED = 6, 3


@pytest.fixture(scope="module")
def gpu():
    return new_gpu()


def make(gpu, type_id, n_expert, n_out, k, seed=0, bias=True):
    """Repacked random experts, their exact float64 weights [n_expert, n_out, k] and biases."""
    rng = np.random.default_rng([seed, type_id, n_out, k])
    raw = random_blocks(type_id, n_expert * n_out, k, rng)
    b = rng.standard_normal((n_expert, n_out)).astype(np.float32) if bias else np.zeros((n_expert, n_out), np.float32)
    experts = repack_experts(gpu, type_id, raw.reshape(n_expert, n_out, -1), k, b if bias else None)
    return experts, dequantized(type_id, raw).astype(np.float64).reshape(n_expert, n_out, k), b


def inputs(rng, n_rows, width):
    """float32 rows of very different size, with outliers, as a residual stream has them."""
    x = rng.standard_normal((n_rows, width)) * 2.0 ** rng.integers(-8, 8, (n_rows, 1))
    x[:, rng.integers(0, width, 2)] *= 300
    return x.astype(np.float32)


def loads(rng, n_rows, n_expert=N_EXPERT, n_used=N_USED):
    """Expert ids [n_rows, n_used] by name: any, the same for all, and all rows sharing one with the rest unused."""
    free = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_rows)])
    same = np.tile(rng.permutation(n_expert)[:n_used], (n_rows, 1))
    one = free.copy()
    one[:, 0] = n_expert - 1
    few = max(n_expert // 2, n_used - 1)
    one[:, 1:] = np.stack([rng.permutation(few)[: n_used - 1] for _ in range(n_rows)])
    return {"free": free, "same": same, "one": one}


def reference(w, bias, x, ids, k, per_slot):
    """float64 [n_rows, n_used, n_out]."""
    x = x.astype(np.float64)
    out = np.empty((*ids.shape, w.shape[1]))
    for s in range(ids.shape[1]):
        column = s * k if per_slot else 0
        for e in np.unique(ids[:, s]):
            rows = ids[:, s] == e
            out[rows, s] = x[rows, column : column + k] @ w[e].T + bias[e]
    return out


def nmse_by_pair(got, want, limit, what):
    """Each pair on its own scale."""
    scale = np.sqrt((want**2).mean(-1, keepdims=True))
    check_nmse(got / scale, want / scale, limit, what)


def products(gpu, kind, experts, x, ids, per_slot, grid=None):
    """Results [matrix, row, slot, output] of a decode launch, or of a prefill launch in items of `kind` rows."""
    n_rows, n_used = ids.shape
    m, width = experts[0], n_used * experts[0].n_out
    stride = len(experts) * width + 3
    out = gpu.empty((n_rows, stride))
    outs = [(out.ptr + 4 * i * width, stride) for i in range(len(experts))]
    item_rows = expert_layout.DECODE_ROWS if kind == "decode" else kind
    pairs = List(gpu, ids.size, m.n_expert).set(ids, m.n_expert, item_rows)
    args = (gpu, experts, gpu.buffer(x), outs, n_rows, n_used, per_slot, pairs)
    run = Decode(*args, grid=grid) if kind == "decode" else Prefill(*args, item_rows=kind)
    run.run()
    got = out.to_numpy()
    assert np.isnan(got[:, -3:]).all(), "columns outside the view were written"
    return got[:, :-3].reshape(n_rows, len(experts), n_used, m.n_out).transpose(1, 0, 2, 3)


def shapes_of(type_id, row_counts):
    """((n_out, k), n_rows): every shape with two of the row counts."""
    block, n = quants.TYPES[type_id].block_size, len(row_counts)
    shapes = [s for s in [(5, 32), (100, 96), (33, 256), (130, 768), (48, 1056), (257, 1280)] if s[1] % block == 0]
    return [(s, row_counts[j % n]) for i, s in enumerate(shapes) for j in (i, i + 3)]


# ---- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "MXFP4", "Q4_K", "Q6_K"])
@pytest.mark.parametrize(
    ("n_expert", "n_used", "k"), [(8, 4, 256), (32, 4, 2816), (5, 5, 256), (130, 8, 768), (256, 32, 256)]
)
def test_route(gpu, name, n_expert, n_used, k):
    type_id, rng = quants.BY_NAME[name].id, np.random.default_rng(n_expert)
    router, w, bias = make(gpu, type_id, 1, n_expert, k)
    for n_rows in (1, 9, 64, 300):
        x = rng.standard_normal((n_rows, k)).astype(np.float32)
        x /= np.sqrt((w[0] ** 2).sum(1)).mean()
        item_rows = 16 if n_rows <= 64 else 64
        route = Route(gpu, router, gpu.buffer(x), n_rows, n_used, item_rows)
        route.run(one_block=n_rows <= 64)
        ids, gates = route.ids.to_numpy().astype(int), route.gates.to_numpy()
        logits = x.astype(np.float64) @ w[0].T + bias
        chosen = np.take_along_axis(logits, ids, 1)
        best = -np.sort(-logits, axis=1)[:, :n_used]
        assert np.abs(chosen - best).max() < 1e-5, "other experts than the n_used best, in order"
        assert all(len(set(row)) == n_used for row in ids)
        e = np.exp(chosen - chosen.max(1, keepdims=True))
        check_nmse(
            gates, e / e.sum(1, keepdims=True), limits.GATES_NMSE, f"{name} {n_used} of {n_expert}, {n_rows} rows"
        )
        items, pairs, _ = route.list.get()
        want_items, want_pairs, _ = host_list(ids, n_expert, item_rows)
        assert np.array_equal(items, want_items) and np.array_equal(pairs[: ids.size], want_pairs[: ids.size])
        assert len(items) <= expert_layout.max_items(n_rows * n_used, n_expert, item_rows)
        route.partial.check_guards()


def test_route_of_a_row_does_not_depend_on_the_others(gpu):
    type_id, k, rng = quants.BY_NAME["F32"].id, 2880, np.random.default_rng(0)
    router, _, _ = make(gpu, type_id, 1, 32, k)
    x = (rng.standard_normal((300, k)) / 50).astype(np.float32)

    def run(rows, one_block):
        route = Route(gpu, router, gpu.buffer(x[rows]), len(rows), 4, 16)
        route.run(one_block)
        return np.concatenate([route.ids.to_numpy(), route.gates.to_numpy()], 1)

    everything = run(np.arange(300), False)
    for n in (1, 2, 7, 8, 9, 33, 64):
        rows = np.random.default_rng(n).permutation(300)[:n]
        for one_block in (True, False):
            assert np.array_equal(run(rows, one_block), everything[rows])


def test_ties_take_the_lower_id_and_nan_takes_some(gpu):
    k, n_expert, n_used = 64, 32, 4
    raw = np.zeros((1, n_expert, 4 * k), np.uint8)
    bias = np.full(n_expert, -1.0, np.float32)
    bias[[3, 7, 20]] = 2.0, -0.0, 0.0
    router = repack_experts(gpu, quants.BY_NAME["F32"].id, raw, k, bias[None])
    x = np.ones((3, k), np.float32)
    x[1], x[2] = np.nan, np.inf
    route = Route(gpu, router, gpu.buffer(x), 3, n_used, 16)
    route.run(one_block=True)
    ids = route.ids.to_numpy()
    assert ids[0].tolist() == [3, 7, 20, 0]
    for row in ids[1:]:
        assert len(set(row)) == n_used and row.min() >= 0 and row.max() < n_expert
    assert np.array_equal(route.list.get()[1][: ids.size], host_list(ids, n_expert, 16)[1][: ids.size])


@pytest.mark.parametrize(("n_rows", "n_used", "n_expert"), [(1, 1, 1), (64, 4, 32), (2048, 4, 32), (333, 8, 129)])
@pytest.mark.parametrize("load", ["free", "same"])
def test_list(gpu, n_rows, n_used, n_expert, load):
    ids = loads(np.random.default_rng(n_rows), n_rows, n_expert, n_used)[load]
    made = List(gpu, ids.size, n_expert)
    for item_rows in (16, 64, 96):
        fields = made.with_places().fields if item_rows == 96 else made.fields
        p = params("RouteParams", ids=gpu.buffer(ids.astype(np.float32)), n_rows=n_rows, n_used=n_used,
                   n_expert=n_expert, item_rows=item_rows, list=fields)  # fmt: skip
        gpu.launch(gpu.kernel("route", "route_list"), 1, 1024, p)
        items, pairs, places = made.get()
        want_items, want_pairs, want_places = host_list(ids, n_expert, item_rows)
        assert np.array_equal(items, want_items)
        assert len(items) <= expert_layout.max_items(ids.size, n_expert, item_rows)
        assert np.array_equal(pairs[want_pairs >= 0], want_pairs[want_pairs >= 0])
        assert item_rows != 96 or np.array_equal(places, want_places)
        made.buffer.check_guards()


# ---- products --------------------------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("per_slot", [False, True])
def test_decode_products(gpu, type_id, per_slot):
    """One row and many; one matrix and two."""
    rng = np.random.default_rng(type_id)
    for (n_out, k), n_rows in shapes_of(type_id, [1, 3, 4, 5, 17, 64]):
        made = [make(gpu, type_id, N_EXPERT, n_out, k, seed=i) for i in range(1 if per_slot else 2)]
        x = inputs(rng, n_rows, N_USED * k if per_slot else k)
        for load, ids in loads(rng, n_rows).items():
            got = products(gpu, "decode", [m for m, _, _ in made], x, ids, per_slot)
            for (_, w, bias), out in zip(made, got, strict=True):
                name = f"{quants.TYPES[type_id].name} {n_out} x {k}, {n_rows} rows, {load}"
                nmse_by_pair(out, reference(w, bias, x, ids, k, per_slot), limits.EXPERTS_NMSE, name)


@every_type
@pytest.mark.parametrize("per_slot", [False, True])
def test_prefill_product(gpu, type_id, per_slot):
    rng = np.random.default_rng(type_id)
    for (n_out, k), n_rows in shapes_of(type_id, [1, 7, 40, 65, 128, 200]):
        made = [make(gpu, type_id, N_EXPERT, n_out, k, seed=i) for i in range(1 if per_slot else 2)]
        x = inputs(rng, n_rows, N_USED * k if per_slot else k)
        for load, ids in loads(rng, n_rows).items():
            got, other = (products(gpu, rows, [m for m, _, _ in made], x, ids, per_slot) for rows in (64, 16))
            assert np.array_equal(got, other), "the two variants differ"
            for (_, w, bias), out in zip(made, got, strict=True):
                name = f"{quants.TYPES[type_id].name} {n_out} x {k}, {n_rows} rows, {load}"
                nmse_by_pair(out, reference(w, bias, x, ids, k, per_slot), limits.EXPERTS_NMSE, name)


@every_type
@pytest.mark.parametrize("per_slot", [False, True])
def test_a_row_has_the_same_bits_in_every_kernel(gpu, type_id, per_slot):
    """Decode rows and prompt rows, in items of 16 and of 64 pairs."""
    rng = np.random.default_rng(type_id)
    for n_out, k in [(40, 96), (100, 2880), (33, 8192), (48, 768)]:
        if k % quants.TYPES[type_id].block_size:
            continue
        experts = [make(gpu, type_id, N_EXPERT, n_out, k)[0]]
        x = inputs(rng, 64, N_USED * k if per_slot else k)
        ids = loads(rng, 64)["free"]
        want = products(gpu, 64, experts, x, ids, per_slot)[0]
        for first, n in ((0, 1), (3, 1), (1, 2), (5, 8), (2, 9), (0, 64)):
            rows = slice(first, first + n)
            for kind in ("decode", 16, 64):
                got = products(gpu, kind, experts, x[rows], ids[rows], per_slot)[0]
                assert np.array_equal(got, want[rows]), f"{n_out} x {k}: {n} rows, {kind}"


@every_type
@pytest.mark.parametrize("item_rows", list(layout.WGMMA_EXPERT_TILES))
def test_products_of_warpgroups(gpu, type_id, item_rows):
    """wgmma_experts_*: the bits of prefill products, whatever the load, the shape and the grid; and of these with the
    activation by itself."""
    if gpu.arch != layout.WGMMA_ARCH:
        pytest.skip(f"sm_{gpu.arch} has no products of warpgroups")
    rng, kind = np.random.default_rng([type_id, item_rows]), CONSTANTS["GLU_SWIGLU_OAI"]
    cases = [((5, 32), 9), ((130, 2880), 40), ((33, 8192), 65), ((260, 768), 200), ((210, 256), 150)]
    for i, ((n_out, k), n_rows) in enumerate(cases):
        if k % quants.TYPES[type_id].block_size:
            continue
        made = [make(gpu, type_id, N_EXPERT, n_out, k, seed=j)[0] for j in range(2)]
        load = ("free", "same", "one")[i % 3]
        for per_slot in (False, True):
            x, ids = inputs(rng, n_rows, N_USED * k if per_slot else k) / 16, loads(rng, n_rows)[load]
            name = f"{n_out} x {k}, {n_rows} rows, {load}, {per_slot}"
            gate, up = products(gpu, 64, made, x, ids, per_slot)
            width = N_USED * n_out
            pairs = List(gpu, ids.size, N_EXPERT).set(ids, N_EXPERT, item_rows)
            args = (n_rows, N_USED, per_slot, pairs, item_rows, (None, 1, 3)[i % 3])
            outs = [gpu.empty((n_rows, width + 3)) for _ in range(2)]
            places = [(out.ptr, width + 3) for out in outs]
            Many(gpu, made, gpu.buffer(x), places, *args).run()
            for out, want in zip(outs, (gate, up), strict=True):
                got = out.to_numpy()
                assert np.array_equal(got[:, :width], want.reshape(n_rows, width)), name
                assert np.isnan(got[:, width:]).all(), "columns outside the view were written"
            want, got, untouched = (gpu.empty((n_rows, width)) for _ in range(3))
            p = params("PointwiseParams", a=gpu.buffer(gate.reshape(n_rows, width)),
                       b=gpu.buffer(up.reshape(n_rows, width)), out=want, a_stride=width, b_stride=width,
                       out_stride=width, n=width, kind=kind)  # fmt: skip
            gpu.launch(gpu.kernel("pointwise", "glu"), (-(-width // 1024), n_rows), 256, p)
            Many(gpu, made, gpu.buffer(x), [(got.ptr, width), (untouched.ptr, width)], *args, glu=kind).run()
            assert np.array_equal(got.to_numpy(), want.to_numpy()), f"{name}, gated"
            assert np.isnan(untouched.to_numpy()).all()


@every_type
def test_gated_products(gpu, type_id):
    """act(gate) * up in the products' launch: the bits of two products and the activation by itself."""
    rng = np.random.default_rng(type_id)
    for (n_out, k), n_rows in zip([(40, 96), (100, 2880), (33, 8192), (48, 768)], (1, 3, 8, 2), strict=True):
        if k % quants.TYPES[type_id].block_size:
            continue
        made = [make(gpu, type_id, N_EXPERT, n_out, k, seed=i)[0] for i in range(2)]
        x, ids = inputs(rng, n_rows, k) / 16, loads(rng, n_rows)["free"]
        gate, up = products(gpu, "decode", made, x, ids, False)
        width = N_USED * n_out
        a, b, want = gpu.buffer(gate.reshape(n_rows, width)), gpu.buffer(up.reshape(n_rows, width)), None
        want = gpu.empty((n_rows, width))
        p = params("PointwiseParams", a=a, b=b, out=want, a_stride=width, b_stride=width, out_stride=width, n=width,
                   kind=CONSTANTS["GLU_SWIGLU_OAI"])  # fmt: skip
        gpu.launch(gpu.kernel("pointwise", "glu"), (-(-width // 1024), n_rows), 256, p)
        out = gpu.empty((n_rows, width))
        pairs = List(gpu, ids.size, N_EXPERT).set(ids, N_EXPERT, expert_layout.DECODE_ROWS)
        for grid in (None, 1, 5):
            Decode(gpu, made, gpu.buffer(x), [(out.ptr, width)] * 2, n_rows, N_USED, False, pairs, grid,
                   CONSTANTS["GLU_SWIGLU_OAI"]).run()  # fmt: skip
            assert np.array_equal(out.to_numpy(), want.to_numpy()), f"{n_out} x {k}, {n_rows} rows, grid {grid}"


@every_type
@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_a_row_does_not_depend_on_the_others(gpu, type_id, kind):
    k, n_out, most = 768, 100, 64 if kind == "decode" else 300
    made = [make(gpu, type_id, N_EXPERT, n_out, k, seed=i, bias=False)[0] for i in range(2)]
    rng = np.random.default_rng(1)
    x = inputs(rng, most, k)
    ids = loads(rng, most)["one"]

    def run(rows):
        return products(gpu, 64 if kind == "prompt" else kind, made, x[rows], ids[rows], False)

    everything = run(np.arange(most))
    for n in (1, 2, 4, 5, 16, 17, 33, 63):
        rows = np.random.default_rng(n).permutation(most)[:n]
        assert np.array_equal(run(rows), everything[:, rows]), f"{n} rows alone differ from the same among {most}"
    assert np.array_equal(run(np.arange(most)), everything), "two runs differ"


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "MXFP4", "Q4_K"])
@pytest.mark.parametrize(("n_expert", "n_used", "k"), [(8, 4, 256), (32, 4, 2816), (130, 8, 768), (256, 32, 256)])
def test_one_launch_routes_few_rows_as_many_do(gpu, name, n_expert, n_used, k):
    """Norm, router, choice, list and conversion: the same bits, and those that the formula gives."""
    type_id, rng = quants.BY_NAME[name].id, np.random.default_rng(n_expert)
    router, w, bias = make(gpu, type_id, 1, n_expert, k)
    weight, eps = rng.uniform(0.5, 2.0, k).astype(np.float32), 1e-5
    x = inputs(rng, 8, k)
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + eps) * weight
    logits = normed @ w[0].T + bias
    for n_rows in (1, 2, 5, 8):
        results = []
        for few in (False, True, True):
            route = Route(gpu, router, gpu.buffer(x[:n_rows]), n_rows, n_used, 16)
            route.norm(gpu.buffer(weight), eps)
            if few:
                route.run_few()
                assert route.arrived.to_numpy() == 0, "the counter is not ready for the next launch"
                route.run_few()
            else:
                route.converted.run()
                route.run(one_block=True)
            items, pairs, _ = route.list.get()
            results.append([route.ids.to_numpy(), route.gates.to_numpy(), items, pairs[: n_rows * n_used],
                            route.converted.rows.to_numpy(), route.roots.to_numpy()])  # fmt: skip
        for one, other in zip(results[0], results[1], strict=True):
            assert np.array_equal(one, other), f"{n_rows} rows"
        for one, other in zip(results[1], results[2], strict=True):
            assert np.array_equal(one, other), f"{n_rows} rows again"
        ids, gates = results[0][0].astype(int), results[0][1]
        chosen = np.take_along_axis(logits[:n_rows], ids, 1)
        best = -np.sort(-logits[:n_rows], axis=1)[:, :n_used]
        assert np.abs(chosen - best).max() < 1e-4 * np.abs(logits).max()
        e = np.exp(chosen - chosen.max(1, keepdims=True))
        check_nmse(gates, e / e.sum(1, keepdims=True), 1e-6, f"{n_rows} rows")


@every_type
@pytest.mark.parametrize("per_slot", [False, True])
def test_products_of_floats_are_those_of_converted_rows(gpu, type_id, per_slot):
    rng = np.random.default_rng(type_id)
    for (n_out, k), n_rows in shapes_of(type_id, (1, 3, 8)):
        experts, _, _ = make(gpu, type_id, N_EXPERT, n_out, k)
        ids, width = loads(rng, n_rows)["free"], N_USED * n_out
        x = gpu.buffer(inputs(rng, n_rows, k * (N_USED if per_slot else 1)))
        pairs = List(gpu, ids.size, N_EXPERT).set(ids, N_EXPERT, expert_layout.DECODE_ROWS)
        results = []
        for floats in (False, True):
            out = gpu.empty((n_rows, width))
            run = Decode(gpu, [experts], x, [(out.ptr, width)], n_rows, N_USED, per_slot, pairs, floats=floats)
            assert run.converts == floats
            run.run()
            results.append(out.to_numpy())
        assert np.array_equal(*results), f"{n_out} x {k}, {n_rows} rows"


@every_type
@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_slots_are_summed_as_by_a_launch_of_its_own(gpu, type_id, n_rows):
    """Whatever blocks there are, and whichever of them comes last."""
    rng, n_out, k = np.random.default_rng(type_id), 100, 512
    experts, _, _ = make(gpu, type_id, N_EXPERT, n_out, k)
    ids, width = loads(rng, n_rows)["one"], N_USED * n_out
    x, gates = gpu.buffer(inputs(rng, n_rows, N_USED * k)), gpu.buffer(rng.random((n_rows, N_USED)).astype(np.float32))
    stream = rng.standard_normal((n_rows, n_out + 4)).astype(np.float32)
    pairs = List(gpu, ids.size, N_EXPERT).set(ids, N_EXPERT, expert_layout.DECODE_ROWS)
    out, want = gpu.empty((n_rows, width)), gpu.buffer(stream)
    args = (gpu, [experts], x, [(out.ptr, width)], n_rows, N_USED, True, pairs)
    Decode(*args).run()
    p = params("ExpertSumParams", x=out, gates=gates, out=want, x_stride=width, out_stride=n_out + 4, n=n_out,
               n_used=N_USED, add=1)  # fmt: skip
    gpu.launch(gpu.kernel("route", "expert_sum"), (1, n_rows), 256, p)
    counters = gpu.buffer(np.zeros(-(-n_out // 16), np.uint32))
    for grid in (None, 1, 2, 5, 64):
        got = gpu.buffer(stream)
        Decode(*args, grid=grid, floats=True, mix=(gates, got, counters)).run()
        assert np.array_equal(got.to_numpy(), want.to_numpy()), f"grid {grid}"
        assert not counters.to_numpy().any(), "the counters are not ready for the next launch"


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "Q6_K", "MXFP4"])
@pytest.mark.parametrize("max_smem", [227 << 10, 99 << 10])
def test_rows_with_more_chunks_than_a_block_has_warps(gpu, monkeypatch, name, max_smem):
    """And blocks with less shared memory: the bits of prompt rows."""
    type_id, n_out, rng, fewer = quants.BY_NAME[name].id, 40, np.random.default_rng(2), False
    monkeypatch.setattr(gpu, "max_smem", min(max_smem, gpu.max_smem))
    monkeypatch.setattr(expert_layout, "FEW_THREADS", 384)
    for k in (2880, 3584, 4096, 5120):
        if k % quants.TYPES[type_id].block_size:
            continue
        experts, _, _ = make(gpu, type_id, N_EXPERT, n_out, k)
        for n_rows in (1, 8):
            sizes = {"n_sm": gpu.n_sm, "max_smem": gpu.max_smem}
            launch = expert_layout.few_launch(type_id, k, n_out, n_rows, N_USED, N_EXPERT, **sizes)
            fewer |= launch.n_warps < layout.n_chunks(k)
            x, ids = inputs(rng, n_rows, k), loads(rng, n_rows)["free"]
            got, want = (products(gpu, kind, [experts], x, ids, False) for kind in ("decode", 16))
            assert np.array_equal(got, want), f"{k} columns, {n_rows} rows"
    assert fewer


@pytest.mark.parametrize("n_rows", [2, 40])
def test_decode_results_do_not_depend_on_the_grid(gpu, n_rows):
    """Fewer blocks than items, one block, one for each row tile: the same bits."""
    type_id, k, n_out = quants.BY_NAME["MXFP4"].id, 512, 200
    experts, w, bias = make(gpu, type_id, N_EXPERT, n_out, k)
    rng = np.random.default_rng(2)
    x, ids = inputs(rng, n_rows, k), loads(rng, n_rows)["free"]
    want = products(gpu, "decode", [experts], x, ids, False)
    nmse_by_pair(want[0], reference(w, bias, x, ids, k, False), limits.EXPERTS_NMSE, f"{n_rows} rows")
    for grid in (1, 2, 5, 7, 64, 500):
        assert np.array_equal(products(gpu, "decode", [experts], x, ids, False, grid), want), f"grid {grid}"


@pytest.mark.parametrize("name", ["MXFP4", "Q8_0", "Q5_0", "F16"])
def test_gpt_oss_shapes(gpu, name):
    """2880 columns and outputs: a multiple of 64, not of 128."""
    type_id, n, n_expert, n_used = quants.BY_NAME[name].id, 2880, 5, 4
    made = [make(gpu, type_id, n_expert, n, n, seed=i) for i in range(2)]
    rng = np.random.default_rng(3)
    for kind, row_counts in (("decode", (1, 4, 20)), (16, (20,)), (64, (150,))):
        limit = limits.EXPERTS_NMSE
        for n_rows in row_counts:
            ids = loads(rng, n_rows, n_expert, n_used)["free"]
            x = inputs(rng, n_rows, n)
            got = products(gpu, kind, [m for m, _, _ in made], x, ids, False)
            for i, (_, w, bias) in enumerate(made):
                nmse_by_pair(got[i], reference(w, bias, x, ids, n, False), limit, f"{name} {kind} {n_rows} rows")
            x = inputs(rng, n_rows, n_used * n)
            got = products(gpu, kind, [made[0][0]], x, ids, True)
            nmse_by_pair(got[0], reference(*made[0][1:], x, ids, n, True), limit, f"{name} {kind} {n_rows} rows down")


@pytest.mark.parametrize("kind", ["decode", 16, 64])
def test_no_items_write_nothing(gpu, kind):
    experts, _, _ = make(gpu, quants.BY_NAME["Q4_0"].id, N_EXPERT, 40, 64)
    out, pairs = gpu.empty((5, N_USED * 40)), List(gpu, 5 * N_USED, N_EXPERT)
    pairs.buffer.set(np.zeros(pairs.buffer.shape, np.int32))
    x = gpu.buffer(np.ones((5, 64), np.float32))
    args = (gpu, [experts], x, [(out.ptr, out.shape[1])], 5, N_USED, False, pairs)
    (Decode(*args) if kind == "decode" else Prefill(*args, item_rows=kind)).run()
    assert np.isnan(out.to_numpy()).all()


def test_sum_is_in_slot_order(gpu):
    rng = np.random.default_rng(4)
    for n_rows, n_used, n in [(1, 4, 2880), (7, 3, 32), (300, 8, 1028)]:
        x = rng.standard_normal((n_rows, n_used * n)).astype(np.float32)
        gates = rng.random((n_rows, n_used)).astype(np.float32)
        out = gpu.empty((n_rows, n + 4))
        p = params("ExpertSumParams", x=gpu.buffer(x), gates=gpu.buffer(gates), out=out, x_stride=n_used * n,
                   out_stride=n + 4, n=n, n_used=n_used)  # fmt: skip
        gpu.launch(gpu.kernel("route", "expert_sum"), (-(-n // 1024), n_rows), 256, p)
        got = out.to_numpy()
        want = (gates.astype(np.float64)[:, :, None] * x.reshape(n_rows, n_used, n)).sum(1)
        check_nmse(got[:, :n], want, 1e-12, f"{n_rows} rows, {n_used} of {n}")
        assert np.isnan(got[:, n:]).all()


@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_a_launch_that_has_its_list_waits_for_its_rows(gpu, n_rows):
    """Three launches a layer, each beginning before the one before has ended, against one after the other."""
    type_id, n, n_expert, n_used = quants.BY_NAME["MXFP4"].id, 512, 8, 4
    router, _, _ = make(gpu, quants.BY_NAME["F32"].id, 1, n_expert, n)
    gate, up, down = (make(gpu, type_id, n_expert, n, n, seed=i)[0] for i in range(3))
    x = np.random.default_rng(5).standard_normal((n_rows, n)).astype(np.float32)
    norm, results = gpu.buffer(np.full(n, 0.7, np.float32)), []
    for pdl in (False, True, True):
        dx, hidden, out = gpu.buffer(x), gpu.empty((n_rows, n_used * n)), gpu.empty((n_rows, n_used * n))
        counters = gpu.buffer(np.zeros(n // 16, np.uint32))
        route = Route(gpu, router, dx, n_rows, n_used, 16)
        route.norm(norm, 1e-5)
        a = Decode(gpu, [gate, up], dx, [(hidden.ptr, n_used * n)] * 2, n_rows, n_used, False, route.list,
                   glu=CONSTANTS["GLU_SILU"], leads=True)  # fmt: skip
        a.converted, a.converts = route.converted, True  # by the routing
        for *_, p in a.launches:
            p.rows = route.converted.rows.ptr
        b = Decode(gpu, [down], hidden, [(out.ptr, n_used * n)], n_rows, n_used, True, route.list, floats=True,
                   mix=(route.gates, dx, counters), follows=True)  # fmt: skip
        for _ in range(3):
            route.run_few(pdl)
            a.run(pdl)
            b.run(pdl)
        results.append(dx.to_numpy())
    assert np.isfinite(results[0]).all() and not np.array_equal(results[0], x)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("n_rows", [1, 3, 20])
def test_dependent_launches_wait(gpu, n_rows):
    """Routing, products of two layers and the lists between them, with and without programmatic launch."""
    type_id, n, n_expert, n_used = quants.BY_NAME["MXFP4"].id, 512, 8, 4
    router, _, _ = make(gpu, quants.BY_NAME["F32"].id, 1, n_expert, n)
    up, _, _ = make(gpu, type_id, n_expert, n, n, seed=1)
    down, _, _ = make(gpu, type_id, n_expert, n, n, seed=2)
    x = np.random.default_rng(5).standard_normal((n_rows, n)).astype(np.float32)
    results = []
    for pdl in (False, True, True):
        dx, hidden, out = gpu.buffer(x), gpu.empty((n_rows, n_used * n)), gpu.empty((n_rows, n_used * n))
        route = Route(gpu, router, dx, n_rows, n_used, 16)
        a = Decode(gpu, [up], dx, [(hidden.ptr, n_used * n)], n_rows, n_used, False, route.list)
        b = Decode(gpu, [down], hidden, [(out.ptr, n_used * n)], n_rows, n_used, True, route.list)
        p = params("ExpertSumParams", x=out, gates=route.gates, out=dx, x_stride=n_used * n, out_stride=n, n=n,
                   n_used=n_used)  # fmt: skip
        for _ in range(3):
            route.run(True, pdl)
            a.run(pdl)
            b.run(pdl)
            gpu.launch(gpu.kernel("route", "expert_sum"), (1, n_rows), 256, p, pdl=pdl)
        results.append(dx.to_numpy())
    assert np.isfinite(results[0]).all()
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
