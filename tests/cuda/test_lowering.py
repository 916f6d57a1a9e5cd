"""Lowering: fewer ops, the same computation, checked on the ops themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.fake_file import FakeFile

from worker_orcd.cuda.lowering import MatMulGroup, RopeKv, RopeKvAttention, lower
from worker_orcd.models import plan
from worker_orcd.models.ops import Add, Attention, Rope


def test_llama_layer_becomes_eight_ops():
    p = plan.build(FakeFile())
    layer = [op for op in lower(p) if op.name.startswith("blk.1.")]
    kinds = [type(op).__name__ for op in layer]
    assert kinds == [
        "Norm",
        "MatMulGroup",
        "RopeKvAttention",
        "MatMulGroup",
        "Norm",
        "MatMulGroup",
        "Glu",
        "MatMulGroup",
    ]
    assert [len(op.parts) for op in layer if isinstance(op, MatMulGroup)] == [3, 1, 2, 1]
    assert [op.residual for op in layer if isinstance(op, MatMulGroup)] == [False, True, False, True]
    residual = next(op for op in layer if isinstance(op, MatMulGroup) and op.residual)
    assert residual.parts[0].out.buf == "x" and residual.parts[0].name == "blk.1.attn_output"


def test_no_op_is_lost():
    p = plan.build(FakeFile())
    seen = []
    for op in lower(p):
        if isinstance(op, MatMulGroup):
            seen += [part.name for part in op.parts] + (["+"] if op.residual else [])
        elif isinstance(op, RopeKvAttention):
            seen += [part.name for part in (op.rope.rope_q, op.rope.rope_k, op.rope.kv, op.attention) if part]
        else:
            seen.append(op.name)
    wanted = ["+" if isinstance(op, Add) else op.name for op in p.ops]
    assert seen == wanted


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


def test_products_of_different_types_do_not_share_a_launch():
    mf = FakeFile()
    mf.tensors["blk.0.attn_v.weight"].type_id = 8
    groups = [op for op in lower(plan.build(mf)) if isinstance(op, MatMulGroup)]
    assert [[part.name for part in g.parts] for g in groups][:2] == [["blk.0.attn_q", "blk.0.attn_k"], ["blk.0.attn_v"]]
