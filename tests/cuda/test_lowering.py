"""Lowering: fewer ops, the same computation, checked on the ops themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from helpers.fake_file import FakeFile

from worker_orcd.cuda.lowering import MatMulGroup, RopeKv, RopeKvAttention, asked_for, lower, spans
from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.models.ops import Add, Attention, Glu, MatMul, Op, Rope, View


def groups_of(ops: Iterable[Op]) -> list[MatMulGroup]:
    return [op for op in ops if isinstance(op, MatMulGroup)]


def planted(p: plan.Plan, name: str, *after: Op, replaced: Op | None = None) -> plan.Plan:
    """The plan with `after` behind its op `name`, and `replaced` in its place."""
    at = next(i for i, op in enumerate(p.ops) if op.name == name)
    return replace(p, ops=(*p.ops[:at], replaced or p.ops[at], *after, *p.ops[at + 1 :]))


def named(p: plan.Plan, name: str) -> Op:
    return next(op for op in p.ops if op.name == name)


def test_llama_layer_becomes_five_ops():
    p = plan.build(FakeFile())
    layer = [op for op in lower(p) if op.name.startswith("blk.1.")]
    kinds = [type(op).__name__ for op in layer]
    assert kinds == ["MatMulGroup", "RopeKvAttention", "MatMulGroup", "MatMulGroup", "MatMulGroup"]
    groups = groups_of(layer)
    assert [len(op.parts) for op in groups] == [3, 1, 2, 1]
    assert [op.residual for op in groups] == [False, True, False, True]
    assert [op.norm and op.norm.name for op in groups] == ["blk.1.attn_norm", None, "blk.1.ffn_norm", None]
    assert [op.glu is not None for op in groups] == [False, False, True, False]
    for op in groups:
        assert op.inp == (op.norm.inp if op.norm else op.parts[0].inp)
    residual = next(op for op in groups if op.residual)
    assert residual.parts[0].out.buf == "x" and residual.parts[0].name == "blk.1.attn_output"


def test_no_op_is_lost():
    p = plan.build(FakeFile())
    seen = []
    for op in lower(p):
        if isinstance(op, MatMulGroup):
            seen += [op.norm.name] if op.norm else []
            seen += [part.name for part in op.parts] + (["+"] if op.residual else [])
            seen += [op.glu.name] if op.glu else []
        elif isinstance(op, RopeKvAttention):
            seen += [part.name for part in (op.rope.rope_q, op.rope.rope_k, op.rope.kv, op.attention) if part]
        else:
            seen.append(op.name)
    wanted = ["+" if isinstance(op, Add) else op.name for op in p.ops]
    assert seen == wanted


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "gpt2-Q8_0", "gpt-oss-MXFP4", "phi3-Q4_K_M"])
def test_a_lowered_op_knows_what_it_stands_for(name, goldens_dir):
    with ModelFile(str(goldens_dir / f"{name}.gguf")) as mf:
        p = plan.build(mf)
    assert spans(p, lower(p, fuse=False)) == [(op,) for op in p.ops]
    ops = lower(p)
    found = spans(p, ops)
    assert len(ops) == len(found) < len(p.ops) and sum(found, ()) == p.ops
    for op, parts in zip(ops, found, strict=True):
        names = [part.name for part in parts]
        if isinstance(op, MatMulGroup):
            assert isinstance(parts[-1], Add if op.residual else Glu if op.glu else MatMul)
            assert (op.norm is None or parts[0] == op.norm) and {part.name for part in op.parts} <= set(names)
        else:
            assert op.name in names


def test_the_environment_picks_a_lowering(monkeypatch):
    monkeypatch.delenv("WORKER_ORCD_LOWERING", raising=False)
    assert asked_for() == "fused"
    for value, meant in (("", "fused"), ("fused", "fused"), ("plain", "plain")):
        monkeypatch.setenv("WORKER_ORCD_LOWERING", value)
        assert asked_for() == meant
    for value in ("Plain", "none", "1", " plain"):
        monkeypatch.setenv("WORKER_ORCD_LOWERING", value)
        with pytest.raises(InvalidRequest, match="WORKER_ORCD_LOWERING is fused or plain, not") as e:
            asked_for()
        assert e.value.fields["field"] == "WORKER_ORCD_LOWERING"


@pytest.mark.parametrize(
    "other", [{"layer": 1}, {"n_head_kv": 1}, {"head_dim": 4}, {"n_head": 1}, {"q": "k"}], ids=lambda d: next(iter(d))
)
def test_attention_of_something_else_stays_alone(other):
    """What it reads is then rotated and stored by an op of its own."""
    p = plan.build(FakeFile())
    ops = list(p.ops)
    at = next(i for i, op in enumerate(ops) if isinstance(op, Attention))
    if "q" in other:
        other = {"q": ops[at - 1].k}
    ops[at] = replace(ops[at], **other)
    kinds = [type(op) for op in lower(replace(p, ops=tuple(ops)))]
    first = kinds.index(RopeKv)
    assert kinds[first : first + 2] == [RopeKv, Attention] and RopeKvAttention in kinds[first:]


def test_a_cache_write_without_rotation_joins_attention():
    p = plan.build(FakeFile())
    without = tuple(op for op in p.ops if not isinstance(op, Rope))
    fused = [op for op in lower(replace(p, ops=without)) if isinstance(op, RopeKvAttention)]
    assert len(fused) == p.n_layer and all(op.rope.rope_q is None for op in fused)


def test_without_fusing_names_stay_as_they_are():
    p = plan.build(FakeFile())
    assert [op.name for op in lower(p, fuse=False)] == [op.name for op in p.ops]


def test_a_product_read_again_is_not_folded_into_the_residual():
    p = plan.build(FakeFile())
    ops = list(p.ops)
    at = next(i for i, op in enumerate(ops) if op.name == "blk.1.attn_residual")
    spy = Add("spy", ops[at].inp, p.ops[0].out)
    changed = plan.Plan(**{**vars(p), "ops": (*ops[: at + 1], spy, *ops[at + 1 :])})
    group = next(op for op in lower(changed) if op.name == "blk.1.attn_output")
    assert not group.residual


@pytest.mark.parametrize("limit", [1, 2])
def test_group_size_is_bounded(limit):
    p = plan.build(FakeFile())
    assert max(len(op.parts) for op in lower(p, max_group=limit) if isinstance(op, MatMulGroup)) == limit


def test_products_of_different_types_share_a_group():
    """And so the conversion of their input; launches take them by type."""
    mf = FakeFile()
    mf.tensors["blk.0.attn_v.weight"].type_id = 8
    group = groups_of(lower(plan.build(mf)))[0]
    assert [part.name for part in group.parts] == ["blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"]
    assert group.norm is not None and group.norm.name == "blk.0.attn_norm"


# ---- the norm before products ----------------------------------------------------------------------------------------


def test_a_norm_read_again_stays():
    """By an op behind the products, by one further on; not where its columns are written anew before."""
    p = plan.build(FakeFile())
    norm = named(p, "blk.1.attn_norm")
    spy = Add("spy", norm.out, named(p, "blk.1.attn_residual").out)
    for place in ("blk.1.attn_v", "blk.1.kv_write"):
        ops = lower(planted(p, place, spy))
        assert norm in ops and groups_of(op for op in ops if op.name == "blk.1.attn_q")[0].norm is None
    assert named(p, "blk.1.ffn_norm").out == norm.out
    ops = lower(planted(p, "blk.1.ffn_norm", spy))
    assert norm not in ops and named(p, "blk.1.ffn_norm") in ops


def test_nothing_is_stored_where_a_launch_still_reads():
    """The blocks of a product read its input while others store: what is folded in must not be of the same columns."""
    p = plan.build(FakeFile())
    norm, product, add = (named(p, f"blk.1.{name}") for name in ("ffn_norm", "attn_output", "attn_residual"))
    x, other = add.out, View(named(p, "blk.1.ffn_gate").out.buf, 0, add.out.width)
    product, add = replace(product, inp=norm.out, out=other), replace(add, inp=other)
    before = tuple(op for op in p.ops[: p.ops.index(norm)] if op.name not in (product.name, add.name))
    rest = p.ops[p.ops.index(norm) :]
    # x += W norm(x): the norm is folded in, the addition is not
    ops = lower(replace(p, ops=(*before, norm, product, add, *rest)))
    group = next(op for op in groups_of(ops) if op.name == product.name)
    assert group.norm == norm and group.inp == x and not group.residual and add in ops
    # x += W x
    ops = lower(replace(p, ops=(*before, replace(product, inp=x), add, *rest)))
    assert not next(op for op in groups_of(ops) if op.name == product.name).residual and add in ops
    # x = W norm(x)
    ops = lower(replace(p, ops=(*before, norm, replace(product, out=x), *rest)))
    assert ops.count(norm) == 1 and next(op for op in groups_of(ops) if op.name == product.name).norm is None


def test_a_norm_in_place_stays():
    """Where its result is the residual stream, later ops read that."""
    p = plan.build(FakeFile())
    norm = named(p, "blk.1.attn_norm")
    in_place = replace(norm, out=norm.inp)
    changed = planted(p, norm.name, replaced=in_place)
    products = tuple(
        replace(op, inp=norm.inp) if isinstance(op, MatMul) and op.name.startswith("blk.1.attn_") and op.inp == norm.out
        else op for op in changed.ops
    )  # fmt: skip
    ops = lower(replace(changed, ops=products))
    assert in_place in ops
    group = next(op for op in groups_of(ops) if op.name == "blk.1.attn_q")
    assert group.norm is None and group.inp == norm.inp and len(group.parts) == 3


def test_a_norm_of_groups_or_of_something_else_stays():
    p = plan.build(FakeFile())
    norm = named(p, "blk.1.attn_norm")
    grouped = replace(norm, group=norm.inp.width // 2)
    assert grouped in lower(planted(p, norm.name, replaced=grouped))
    elsewhere = replace(norm, out=named(p, "blk.1.ffn_gate").out)
    assert elsewhere in lower(planted(p, norm.name, replaced=elsewhere))


# ---- the gated activation behind products ----------------------------------------------------------------------------


def gated(ops: Iterable[Op]) -> list[str]:
    return [op.name for op in groups_of(ops) if op.glu is not None]


def test_a_gated_activation_of_two_products_joins_them():
    p = plan.build(FakeFile())
    assert gated(lower(p)) == [f"blk.{i}.ffn_gate" for i in range(p.n_layer)]
    glu = named(p, "blk.1.ffn_glu") if any(op.name == "blk.1.ffn_glu" for op in p.ops) else next(
        op for op in p.ops if isinstance(op, Glu) and op.name.startswith("blk.1."))  # fmt: skip
    swapped = replace(glu, gate=glu.up, up=glu.gate)
    assert swapped in lower(planted(p, glu.name, replaced=swapped)), "gate is not the first product"
    x = named(p, "blk.1.attn_residual").out
    for view in {glu.gate, glu.up} - {glu.out}:
        spy = Add("spy", View(view.buf, view.offset, x.width), x)
        assert glu in lower(planted(p, glu.name, spy)), "what is read again must be there"


def test_a_gated_activation_of_two_types_stays():
    mf = FakeFile()
    mf.tensors["blk.0.ffn_up.weight"].type_id = 8
    p = plan.build(mf)
    assert gated(lower(p)) == [f"blk.{i}.ffn_gate" for i in range(1, p.n_layer)]


@pytest.mark.parametrize(("type_name", "splits"), [("Q8_0", True), ("F16", True), ("BF16", False), ("F32", False),
                                                   ("MXFP4", False)])  # fmt: skip
def test_a_gated_activation_of_the_halves_of_one_product(goldens_dir, type_name, splits):
    """Of types whose repacked matrices can be read in halves."""
    with ModelFile(goldens_dir / "phi3-Q8_0.gguf") as file:
        p = plan.build(file)
    type_id = quants.BY_NAME[type_name].id
    p = replace(p, weights={
        name: replace(w, type_id=type_id) if "ffn_up" in name else w for name, w in p.weights.items()})  # fmt: skip
    ops = lower(p)
    assert len(gated(ops)) == (p.n_layer if splits else 0)
    assert sum(isinstance(op, Glu) for op in ops) == (0 if splits else p.n_layer)
    for op in groups_of(ops):
        if op.glu is not None:
            assert len(op.parts) == 1 and op.parts[0].out.width == 2 * op.glu.gate.width == 2 * op.glu.out.width


def test_halves_that_are_no_whole_row_tiles_stay(goldens_dir):
    with ModelFile(goldens_dir / "phi3-Q8_0.gguf") as file:
        p = plan.build(file)
    ops = list(p.ops)
    at = next(i for i, op in enumerate(ops) if isinstance(op, Glu))
    glu, product = ops[at], ops[at - 1]
    n = glu.gate.width - 8
    ops[at - 1] = replace(product, out=replace(product.out, width=2 * n))
    ops[at] = replace(glu, gate=replace(glu.gate, width=n), up=View(glu.up.buf, glu.gate.offset + n, n),
                      out=replace(glu.out, width=n))  # fmt: skip
    lowered = lower(replace(p, ops=tuple(ops)))
    assert ops[at] in lowered and len(gated(lowered)) == p.n_layer - 1
