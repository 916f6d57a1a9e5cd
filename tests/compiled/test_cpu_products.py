"""Products of integer codes on the CPU: every type and instruction set against float64, and what must not change bits.

The rows of an embedding of float32 are the activations, so a token is a row of any numbers one likes.
"""

from __future__ import annotations

import limits
import numpy as np
import pytest
from helpers.cpu_engines import CODE_TYPES, ISAS, LEAST_CODE_ROWS, make_engine, rows
from helpers.quant_blocks import dequantized, random_blocks
from helpers.synthetic_plan import MemoryFile

from worker_orcd._cpu import dequantize
from worker_orcd.gguf import quants
from worker_orcd.models.ops import Act, Buffer, Embed, Gather, Glu, MatMul, View, Weight
from worker_orcd.models.plan import KvGroup, Plan

#: outputs of a matrix: too few for codes, just enough, and a rest of every kind
N_OUT = (15, 16, 17, 33, 100)
BLOCKED = [t.name for t in quants.TYPES.values() if t.block_size > 1]
FAST = [isa for isa in ISAS if isa != "baseline"]


class Products:
    """An engine that multiplies rows `x` by matrices: name -> (raw blocks, type name), all of the width of `x`."""

    def __init__(self, x, matrices, extra_ops=(), extra_buffers=(), **kwargs):
        n_rows, n_in = x.shape
        mf, weights = MemoryFile(), {}

        def put(name, raw, type_name, *shape):
            mf.data[name] = raw.tobytes()
            weights[name] = Weight(name, "matrix" if len(shape) == 2 else "vector", shape, quants.BY_NAME[type_name].id)

        put("x", x.astype(np.float32), "F32", n_in, n_rows)
        put("head", np.zeros((n_rows, n_in), np.float32), "F32", n_in, n_rows)
        buffers = {"x": Buffer("x", n_in, "tokens"), "out": Buffer("out", n_in, "outputs"),
                   "logits": Buffer("logits", n_rows, "outputs")}  # fmt: skip
        ops = [Embed("embed", "x", View("x", 0, n_in), 1.0, None)]
        for name, (raw, type_name) in matrices.items():
            put(name, raw, type_name, n_in, len(raw))
            buffers[f"y_{name}"] = Buffer(f"y_{name}", len(raw), "tokens")
            ops.append(MatMul(name, name, None, View("x", 0, n_in), View(f"y_{name}", 0, len(raw))))
        buffers |= {b.name: b for b in extra_buffers}
        ops = [*ops, *extra_ops, Gather("gather", View("x", 0, n_in), View("out", 0, n_in)),
               MatMul("logits", "head", None, View("out", 0, n_in), View("logits", 0, n_rows))]  # fmt: skip
        plan = Plan("products", n_embd=n_in, n_layer=1, n_head_kv=1, head_dim=16, n_vocab=n_rows, context_length=4096,
                    max_positions=None, buffers=buffers, weights=weights, ops=tuple(ops),
                    kv_groups=(KvGroup(0, (0,)),), kv_group_of=(0,), rope_orig_context=4096)  # fmt: skip
        self.n_rows, self.engine = n_rows, make_engine(mf, plan, **kwargs)

    def __call__(self, name, order=None, chunk=256):
        """What op `name` writes for rows `order` (all) in steps of `chunk` rows."""
        order = np.arange(self.n_rows) if order is None else np.asarray(order)
        parts = [self.engine.forward(rows((0, 0, order[i : i + chunk]), out="none"), stop_after=name)
                 for i in range(0, len(order), chunk)]  # fmt: skip
        return np.concatenate(parts)


def blocks(type_name, n_out, n_in, seed=0):
    return random_blocks(quants.BY_NAME[type_name].id, n_out, n_in, np.random.default_rng(seed), (116, 122))


def bits(a):
    return np.ascontiguousarray(a).view(np.uint32)


def same_bits(a, b, what=""):
    """To the bit; NaN where the other has NaN."""
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b), what)
    np.testing.assert_array_equal(np.where(np.isnan(a), 0, bits(a)), np.where(np.isnan(b), 0, bits(b)), what)


def errors(y, x, w):
    """Mean squared error of each row over the mean square of what its products come to, signs aside (sums cancel)."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    return ((y - x @ w.T) ** 2).mean(axis=1) / np.maximum((x**2 @ w.T**2).mean(axis=1), 1e-300)


def widths(type_name):
    block = quants.BY_NAME[type_name].block_size
    return [block, 3 * block, 256, 1280] if block == 32 else [256, 768, 2304]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type_name", BLOCKED)
def test_error_and_bits_of_every_type_and_shape(type_name, isa, monkeypatch):
    """Against float64; then the same rows alone, in chunks and in another order, with other threads: the same bits."""
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
    codes = type_name in CODE_TYPES and isa != "baseline"
    worst = 0.0
    for n_in in widths(type_name):
        rng = np.random.default_rng(n_in)
        x = rng.standard_normal((31, n_in)).astype(np.float32)
        x[7] *= np.exp(1.5 * rng.standard_normal(n_in))  # a few columns far above the others
        x[8, n_in // 2 :] = 0
        x[9] = 0
        matrices = {f"m{n}": (blocks(type_name, n, n_in, n), type_name) for n in N_OUT}
        products = Products(x, matrices, n_threads=2)
        assert products.engine.isa == isa
        for n in N_OUT:
            y = products(f"m{n}")
            error = errors(y, x, dequantized(quants.BY_NAME[type_name].id, matrices[f"m{n}"][0])).mean()
            limit = limits.CPU_CODES_NMSE if codes and n >= LEAST_CODE_ROWS else limits.CPU_OP_NMSE
            assert error <= limit, f"{n_in} x {n}: NMSE {error:.3g}, limit {limit:.1e}"
            assert not y[9].any(), "zeros give zeros"
            worst = max(worst, error)
            for chunk in (1, 2, 5, 13):
                same_bits(products(f"m{n}", chunk=chunk), y, f"{n_in} x {n} in chunks of {chunk}")
            order = rng.permutation(31)
            same_bits(products(f"m{n}", order), y[order], f"{n_in} x {n} in another order")
        for n_threads in (1, 3):
            other = Products(x, matrices, n_threads=n_threads)
            same_bits(other("m100"), products("m100"), f"{n_threads} threads")
            same_bits(other("m100", chunk=1), products("m100"), f"{n_threads} threads, one row at a time")
    print(f"{type_name} on {isa}: NMSE {worst:.1e} (limits {limits.CPU_CODES_NMSE:.1e}, {limits.CPU_OP_NMSE:.0e})")


@pytest.mark.skipif(len(FAST) < 2, reason="needs a processor with AVX-512")
@pytest.mark.parametrize("type_name", BLOCKED)
def test_instruction_sets_give_the_same_bits(type_name, monkeypatch):
    x = np.random.default_rng(1).standard_normal((14, 768)).astype(np.float32)
    found = []
    for isa in FAST:
        monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
        products = Products(x, {"m": (blocks(type_name, 37, 768), type_name)})
        found += [products("m"), products("m", chunk=1)]
    for other in found[1:]:
        same_bits(found[0], other)


def hard_rows(n_in):
    """Rows that 16 bits with a scale for 32 columns cannot say, each by a single number or all over."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((12, n_in)).astype(np.float32)
    with np.errstate(over="ignore"):
        x[0, 5], x[1, n_in - 1], x[2, 17] = np.nan, np.inf, -np.inf
        x[3, :] = np.nan
        x[4] *= np.float32(1e36)
        x[5] *= np.float32(1e-40)  # denormals
        x[6, -32:] *= np.float32(1e-38)
        x[7, 0] = np.finfo(np.float32).max
        x[8, 3], x[8, 4] = np.inf, np.nan
        x[9, 32:] = 0
        x[9, :32] = np.float32(1e-45)
        x[10, :32] = np.float32(-(2.0**-101))
        x[11, -1] = np.float32(2.0**111)
    return x


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("type_name", BLOCKED)
def test_rows_that_cannot_be_encoded_are_multiplied_as_floats(type_name, isa, monkeypatch):
    """To the bit what the float kernels give, which multiply the same rows of weights where there are only 15; and
    such a row leaves the bits of those beside it alone, in the kernel of one token and of many."""
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
    n_in = 256
    hard = hard_rows(n_in)
    plain = np.random.default_rng(4).standard_normal((13, n_in)).astype(np.float32)
    x = np.concatenate([hard, plain])
    raw = blocks(type_name, 30, n_in)
    products = Products(x, {"all": (raw, type_name), "first": (raw[:15], type_name), "last": (raw[15:], type_name)})
    mixed = np.random.default_rng(5).permutation(len(x))
    y = np.empty((len(x), 30), np.float32)
    y[mixed] = products("all", mixed)
    floats = np.concatenate([products("first"), products("last")], axis=1)
    same_bits(y[: len(hard)], floats[: len(hard)])
    assert np.isnan(y[[0, 3, 8]]).all() and not np.isfinite(y[[1, 2]]).any()
    same_bits(products("all", chunk=1), y, "one row at a time")
    same_bits(products("all", np.arange(len(hard), len(x))), y[len(hard) :], "without the hard rows")
    if type_name in CODE_TYPES:
        assert (bits(y[len(hard) :]) != bits(floats[len(hard) :])).any(), "the others are multiplied as codes"


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("magnitude", [2.0**-99, 1e-20, 1e30, 2.0**109])
def test_large_and_small_rows_keep_their_error(magnitude, isa, monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
    x = (np.random.default_rng(6).uniform(-1, 1, (7, 256)) * magnitude).astype(np.float32)
    matrices = {name: (blocks(name, 48, 256), name) for name in sorted(CODE_TYPES)}
    products = Products(x, matrices)
    for name in matrices:
        y = products(name)
        w = dequantized(quants.BY_NAME[name].id, matrices[name][0])
        error = errors(y / magnitude, x / np.float64(magnitude), w).mean()
        assert error <= limits.CPU_CODES_NMSE, f"{name}: NMSE {error:.3g}"
        same_bits(products(name, chunk=1), y)


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("type_name", sorted(CODE_TYPES))
def test_the_largest_sums_do_not_overflow(type_name, isa, monkeypatch):
    """All bits of the codes set or none, activations all at the end of the range with the signs that add up."""
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
    t = quants.BY_NAME[type_name]
    for byte in (0x00, 0x7F, 0x80, 0x81, 0x77, 0xFF):
        raw = np.full((16, t.type_size), byte, np.uint8)
        for offset in t.number_at:
            if t.number == "F16":
                raw[:, offset : offset + 2] = np.array([1.5], np.float16).view(np.uint8)
            else:
                raw[:, offset] = 120
        w = dequantize(t.id, raw, 16 * t.block_size, isa="baseline").reshape(16, -1).astype(np.float64)
        signs = np.sign(w[0]) + (w[0] == 0)
        x = np.stack([signs, -signs, np.ones_like(signs)]).astype(np.float32)
        products = Products(x, {"m": (raw, type_name)})
        for y in (products("m"), products("m", chunk=1)):
            np.testing.assert_allclose(y, x @ w.T, rtol=1e-6, atol=1e-6 * np.abs(w).sum(axis=1).max())


@pytest.mark.parametrize("isa", ISAS)
def test_ops_that_run_together_give_what_each_gives_alone(isa, monkeypatch):
    """Two products of one input and their GLU are one call; with another op between them they are three. Rows that
    cannot be encoded take the other way through."""
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
    n_in, n_out = 256, 100
    x = np.concatenate([np.random.default_rng(8).standard_normal((20, n_in)).astype(np.float32), hard_rows(n_in)])
    matrices = {"gate": (blocks("Q5_0", n_out, n_in, 1), "Q5_0"), "up": (blocks("Q4_K", n_out, n_in, 2), "Q4_K")}
    for in_place in (True, False):
        glu = Buffer("glu", n_out, "tokens")
        out = View("y_gate", 0, n_out) if in_place else View("glu", 0, n_out)
        last = Glu("last", "silu", View("y_gate", 0, n_out), View("y_up", 0, n_out), out)
        other = Act("other", "gelu_tanh", View("spare", 0, n_out), View("spare", 0, n_out))
        spare = Buffer("spare", n_out, "tokens")
        together = Products(x, matrices, [last], [glu, spare])
        apart = Products(x, matrices, [other, last], [glu, spare])
        with np.errstate(all="ignore"):
            for order in (np.arange(20), np.arange(32), np.arange(31, -1, -1)):
                for chunk in (1, 7, 32):
                    same_bits(together("last", order, chunk), apart("last", order, chunk), f"{in_place} {chunk}")
                    same_bits(together("gate", order, chunk), apart("gate", order, chunk))
                    same_bits(together("up", order, chunk), apart("up", order, chunk))
        assert np.isfinite(together("last", np.arange(20))).all()
