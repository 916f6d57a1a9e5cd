"""Every op of a plan on the CPU against the NumPy oracle, buffer by buffer."""

from __future__ import annotations

import dataclasses

import limits
import numpy as np
import pytest
from helpers.cpu_engines import CODE_TYPES, ISAS, LEAST_CODE_ROWS, make_engine, open_engine, rows
from helpers.synthetic_plan import N_VOCAB, every_op
from oracle.numpy_engine import NumpyEngine

from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan as P
from worker_orcd.models import registry
from worker_orcd.models.ops import GLU_ACTIVATIONS, ExpertMatMul, Glu, MatMul, Op, Route, output_of


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    assert np.isfinite(exact).all() and ours.shape == exact.shape
    return float(((ours - exact) ** 2).mean() / max((exact**2).mean(), 1e-30))


def is_product_of_codes(engine, plan, op) -> bool:
    if engine.isa == "baseline" or not isinstance(op, MatMul | ExpertMatMul | Route):
        return False
    w = plan.weights[op.weight]
    return quants.TYPES[w.type_id].name in CODE_TYPES and w.shape[1] >= LEAST_CODE_ROWS


def compare(engine, oracle, plan, batches, ops):
    """Run the batches on both; compare the view each op writes in the last batch."""
    for batch in batches[:-1]:
        engine.forward(batch)
        oracle.run(batch.tokens, batch.positions, batch.slots, batch.output_indices)
    last, worst, limit = batches[-1], {}, limits.CPU_OP_NMSE
    for op in plan.ops:
        kind = type(op).__name__
        if is_product_of_codes(engine, plan, op):
            limit = max(limit, limits.CPU_CODES_NMSE)
        limit = limits.CPU_OP_NMSE_PAST_CACHE if kind == "Attention" else limit
        if op.name not in ops:
            continue
        view = output_of(op)
        columns = slice(view.offset, view.offset + view.width)
        exact = oracle.run(last.tokens, last.positions, last.slots, last.output_indices, op.name)[:, columns]
        ours = engine.forward(last, stop_after=op.name)
        assert ours.dtype == np.float32 and ours.shape[1] == plan.buffers[view.buf].width
        e = error(ours[:, columns], exact)
        worst[kind] = max(worst.get(kind, 0), e)
        assert e <= limit, f"{op.name}: NMSE {e:.3g}, limit {limit:.0e}"
    print(
        ", ".join(f"{k} {v:.1e}" for k, v in worst.items()),
        f"(limits {limits.CPU_OP_NMSE:.0e}, {limits.CPU_CODES_NMSE:.1e}, {limits.CPU_OP_NMSE_PAST_CACHE:.0e})",
    )


def prompts(n_vocab):
    """Three chunks of two sequences: ragged, crossing blocks of 64 and the window of 40, rows of both in each."""
    rng = np.random.default_rng(11)
    a, b = rng.integers(0, n_vocab, 150), rng.integers(0, n_vocab, 90)
    return [rows((0, 0, a[:70]), (2, 0, b[:33])), rows((2, 33, b[33:89]), (0, 70, a[70:71])),
            rows((2, 89, b[89:]), (0, 71, a[71:]))]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_every_record_at_odd_sizes(isa, monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_CPU_ISA", isa)
    mf, plan = every_op()
    engine = make_engine(mf, plan, n_threads=2)
    assert engine.isa == isa
    compare(engine, NumpyEngine(mf, plan), plan, prompts(N_VOCAB), {op.name for op in plan.ops})
    ops = {c.__name__ for c in Op.__subclasses__() if c.__module__ == Op.__module__}
    assert {type(op).__name__ for op in plan.ops} == ops


def test_slots_of_long_sequences_turn_by_the_long_frequencies():
    mf, plan = every_op()
    engine, oracle = make_engine(mf, plan, n_threads=2), NumpyEngine(mf, plan)
    plain = engine.forward(prompts(N_VOCAB)[0])
    engine.rope_tables[2] = 1
    oracle.rope_tables[2] = 1
    compare(engine, oracle, plan, prompts(N_VOCAB), {"rope_q", "rope_k", "attention.1", "logits"})
    long = engine.forward(prompts(N_VOCAB)[0])
    assert (plain[:70] == long[:70]).all() and (plain[71:] != long[71:]).any(axis=1).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_rows(n):
    """One row takes the kernel without panels, a few fill no tile."""
    mf, plan = every_op(seed=n)
    engine = make_engine(mf, plan, n_threads=1)
    batch = rows((1, 0, np.arange(n) % N_VOCAB))
    compare(engine, NumpyEngine(mf, plan), plan, [batch], {op.name for op in plan.ops})


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "qwen2-Q8_0", "phi3-swa-Q8_0", "gpt2-Q4_K_M", "gpt-oss-MXFP4_MOE"])
def test_records_of_golden_models(name, goldens_dir):
    with np.load(goldens_dir / f"{name}.npz") as z:
        tokens = z["tokens"][0]
    with ModelFile(str(goldens_dir / f"{name}.gguf")) as mf:
        plan = P.build(mf)
        engine = make_engine(mf, plan)
        ops = {op.name for op in plan.ops if not op.name.startswith("blk.1.")}
        compare(engine, NumpyEngine(mf, plan), plan, [rows((0, 0, tokens[:30])), rows((0, 30, tokens[30:]))], ops)
        engine.close()


@pytest.mark.parametrize("act", GLU_ACTIVATIONS)
def test_a_row_of_another_activation_is_a_flag(act, goldens_dir, monkeypatch):
    """An activation has one name from the row to the kernel."""
    monkeypatch.setitem(registry.ROWS, "qwen2", dataclasses.replace(registry.ROWS["qwen2"], act=act))
    with np.load(goldens_dir / "qwen2-Q8_0.npz") as z:
        tokens = z["tokens"][0]
    with ModelFile(str(goldens_dir / "qwen2-Q8_0.gguf")) as mf:
        plan = P.build(mf)
        assert {op.kind for op in plan.ops if isinstance(op, Glu)} == {act}
        engine = make_engine(mf, plan)
        compare(engine, NumpyEngine(mf, plan), plan, [rows((0, 0, tokens))], {op.name for op in plan.ops})
        engine.close()


@pytest.mark.parametrize("name", [
    "llama-F16", "llama-Q4_0", "qwen2-Q4_0", "qwen2-Q4_K_M", "phi3-Q4_K_M", "phi3-swa-Q8_0", "gpt2-Q4_K_M",
    "gpt-oss-MXFP4", "gpt-oss-Q4_K_M",
])  # fmt: skip
def test_reference_logits(name, goldens_dir):
    limit = limits.by_prefix(limits.ORACLE_NMSE, name)
    with np.load(goldens_dir / f"{name}.npz") as z:
        tokens, reference = z["tokens"][0], z["logits"][0]
    engine = open_engine(goldens_dir / f"{name}.gguf")
    e = error(engine.forward(rows((0, 0, tokens))), reference)
    print(f"{name}: NMSE {e:.2e}, limit {limit:.0e}")
    assert e <= limit
