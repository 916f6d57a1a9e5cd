"""Launches without a GPU: every op has a row in the table, and parameters are complete or refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from helpers.fake_file import FakeFile

from worker_orcd._engine import plan_memory
from worker_orcd._nodes import (
    GLU_KINDS,
    NORM_KINDS,
    ROPE_TYPES,
    RowNode,
    decode_grid,
    decode_partial_rows,
    decode_shapes,
)
from worker_orcd.cuda import launches, layout, lowering
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import InternalError
from worker_orcd.gguf import quants
from worker_orcd.models import ops, plan, registry

NORM = {"x": 256, "weight": 512, "bias": 0, "out": 256, "x_stride": 64, "out_stride": 64, "n": 64, "kind": 0,
        "n_group": 0, "eps": 1e-5}  # fmt: skip


def op_classes(base: type[ops.Op] = ops.Op) -> set[type[ops.Op]]:
    """Every op of the package, those of plans and those that lowering makes."""
    found = set()
    for op in base.__subclasses__():
        if op.__module__.startswith("worker_orcd."):
            found |= {op} | op_classes(op)
    return found


def test_every_op_that_lowering_makes_has_launches():
    replaced = {ops.MatMul, ops.ExpertMatMul}  # always part of a group
    assert set(launches.MAKERS) == op_classes() - replaced


@pytest.mark.parametrize("fuse", [True, False])
def test_lowering_leaves_no_op_that_is_replaced(fuse: bool):
    assert {type(op) for op in lowering.lower(plan.build(FakeFile()), fuse=fuse)} <= set(launches.MAKERS)


def test_the_words_of_the_plan_are_those_of_the_kernels():
    assert set(GLU_KINDS) == set(ops.GLU_ACTIVATIONS)
    assert {row.norm for row in registry.ROWS.values()} <= set(NORM_KINDS)
    assert {row.rope_type for row in registry.ROWS.values()} - {""} <= set(ROPE_TYPES)


def test_an_op_without_a_row_is_named():
    @dataclass(frozen=True)
    class Convolve(ops.Op):
        pass

    built = plan.build(FakeFile())
    config = EngineConfig(1, 64, 64, tuple(1 for _ in built.kv_groups))
    made = launches.Launches(built, config, None, plan_memory(built, config))
    with pytest.raises(InternalError, match=r"'blk\.0\.conv' \(Convolve\)"):
        made.nodes((Convolve("blk.0.conv"),))


def row_node(struct: str, fields: dict[str, object]) -> RowNode:
    return RowNode("op", None, struct, fields, (0, 1), 256)


def test_parameters_are_taken_by_name():
    assert row_node("NormParams", NORM).name == "op"
    with pytest.raises(TypeError, match=r"NormParams takes the fields x, weight.* eps; not x"):
        row_node("NormParams", {name: value for name, value in NORM.items() if name != "n_group"})
    with pytest.raises(TypeError, match="nonsense"):
        row_node("NormParams", {**NORM, "nonsense": 1})
    with pytest.raises(TypeError, match="no struct AbnormParams"):
        row_node("AbnormParams", NORM)


@pytest.mark.parametrize("changed", [{"n": 1 << 31}, {"x": -1}, {"x": 1 << 64}])
def test_numbers_that_do_not_fit_are_refused(changed: dict[str, int]):
    with pytest.raises(OverflowError):
        row_node("NormParams", {**NORM, **changed})


def test_an_op_names_its_layer(monkeypatch):
    """A cache region that the plan's layer lacks is an error of the layer and not a wrong address."""
    built = plan.build(FakeFile())
    config = EngineConfig(1, 64, 64, tuple(1 for _ in built.kv_groups))
    arenas = plan_memory(built, config)
    placed = type(arenas)(*(arena.at(1 << 30) for arena in arenas))
    made = launches.Launches(built, config, None, placed)
    monkeypatch.setattr(made, "kernel", lambda image, name, smem=0: None)
    write = next(op for op in built.ops if isinstance(op, ops.KvWrite))
    assert len(made.nodes((write,))) == 1
    with pytest.raises(IndexError):
        made.nodes((replace(write, layer=built.n_layer),))


# ---- matrices that decode_* takes as one -----------------------------------------------------------------------------

K, STRIDE = 512, 900
Q4_K, Q8_0 = quants.BY_NAME["Q4_K"].id, quants.BY_NAME["Q8_0"].id


def side_by_side(type_id: int, *n_outs: int, bias: bool = False) -> list[dict[str, int]]:
    """Matrices one after the other in memory, with biases and results that lie so too."""
    found, w, b, out = [], 1 << 20, 1 << 30, 1 << 40
    for n in n_outs:
        found.append({"w": w, "bias": b if bias else 0, "out": out, "out_stride": STRIDE, "n_out": n})
        w, b, out = w + layout.packed_bytes(type_id, n, K), b + 4 * n, out + 4 * n
    return found


def spans_of(type_id: int, matrices: list[dict[str, int]]) -> list[tuple[int, int]]:
    """(address of the matrix, its outputs) of each launch; the rest is as the first of its matrices has it."""
    spans = launches._adjacent(type_id, K, matrices)
    by_address = {m["w"]: m for m in matrices}
    for span in spans:
        first = by_address[span["m"][0]["w"]]
        assert span["m"] == [{"w": first["w"], "bias": first["bias"]}, {"w": 0, "bias": 0}]
        assert (span["out"], span["out_stride"]) == (first["out"], first["out_stride"])
    return [(span["m"][0]["w"], span["n_out"]) for span in spans]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("type_id", [Q4_K, Q8_0], ids=["Q4_K", "Q8_0"])
def test_matrices_that_lie_as_one_are_one(type_id: int, bias: bool):
    assert spans_of(type_id, side_by_side(type_id, 512, 128, 128, bias=bias)) == [(1 << 20, 768)]
    last = side_by_side(type_id, 512, 128, 5, bias=bias)
    assert spans_of(type_id, last) == [(1 << 20, 645)], "the last may end within a row tile"


def test_a_matrix_in_the_middle_of_a_row_tile_is_alone():
    matrices = side_by_side(Q8_0, 512, 120, 128)
    assert spans_of(Q8_0, matrices) == [(1 << 20, 632), (matrices[2]["w"], 128)]


@pytest.mark.parametrize("type_name", sorted(layout.ROW_SCALED))
def test_matrices_with_row_scales_stay_apart(type_name: str):
    """Between two of them lie the scales of the first."""
    type_id = quants.BY_NAME[type_name].id
    matrices = side_by_side(type_id, 64, 64, 64)
    assert spans_of(type_id, matrices) == [(m["w"], 64) for m in matrices]


@pytest.mark.parametrize("name", ["w", "bias", "out", "out_stride"])
@pytest.mark.parametrize("at", [1, 2])
def test_matrices_that_lie_otherwise_stay_apart(name: str, at: int):
    """One byte suffices; a bias that only some have, too."""
    for bias in (False, True):
        now = side_by_side(Q4_K, 64, 64, 64, bias=bias)[at][name]
        for other in {now + 1, 0} - {now}:
            matrices = side_by_side(Q4_K, 64, 64, 64, bias=bias)
            matrices[at][name] = other
            assert len(launches._adjacent(Q4_K, K, matrices)) == (2 if at == 2 else 3)
    matrices = side_by_side(Q4_K, 64, 64, 64, bias=True)
    matrices[0]["bias"] = 0
    assert len(spans_of(Q4_K, matrices)) == 2


def test_gate_and_up_are_two_matrices_or_the_halves_of_one():
    gate, up = side_by_side(Q4_K, 96, 96, bias=True)
    (two,) = launches._gated(Q4_K, K, [gate, up])
    (whole,) = side_by_side(Q4_K, 192, bias=True)
    assert launches._gated(Q4_K, K, [whole]) == [two]
    assert two["n_out"] == 96 and two["m"] == [{name: m[name] for name in ("w", "bias")} for m in (gate, up)]
    (without,) = launches._gated(Q4_K, K, side_by_side(Q4_K, 192))
    assert [m["bias"] for m in without["m"]] == [0, 0] and without["m"][1]["w"] == up["w"]
    apart = {**up, "w": 7 << 32}
    assert launches._gated(Q4_K, K, [gate, apart])[0]["m"][1]["w"] == 7 << 32


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("sm_count", "max_smem"), [(132, 232448), (108, 166912), (28, 101376)])
def test_decode_attention_is_launched_as_its_workspace_and_the_gpu_have_room(head_dim, sm_count, max_smem):
    shapes = decode_shapes(head_dim, max_smem)
    assert shapes[0][:2] == (1, 1) and [smem for _, _, smem in shapes] == sorted(smem for _, _, smem in shapes)
    for heads in (1, 2, 8, 32, 40):
        for n_rows in (1, 2, 3, 4, 8, 33, 64):
            for max_splits in (1, 2, 17, 1024):
                splits, *shape = decode_grid(n_rows, heads, max_splits, shapes, sm_count, max_smem)
                assert tuple(shape) in shapes and 1 <= splits <= max_splits
                if splits > 1:
                    groups, _, smem = shape
                    assert n_rows <= decode_partial_rows(heads)
                    assert splits * heads * n_rows <= sm_count * min(2 // groups, max_smem // smem)


def test_decode_attention_of_few_and_of_many_blocks():
    """The largest blocks that there is room for, where they are few; else the least."""
    for head_dim, heads, n_rows, want in [
        (64, 2, 1, (18, 2, 2)), (64, 2, 8, (8, 2, 2)), (64, 2, 16, (8, 1, 1)), (64, 2, 64, (2, 1, 1)),
        (64, 8, 2, (8, 2, 2)), (64, 8, 8, (4, 1, 1)), (96, 32, 1, (4, 2, 2)), (96, 32, 4, (2, 1, 1)),
        (96, 32, 8, (1, 1, 1)), (128, 32, 1, (4, 2, 1)),
    ]:  # fmt: skip
        got = decode_grid(n_rows, heads, 18, decode_shapes(head_dim, 232448), 132, 232448)
        assert got[:3] == want, (head_dim, heads, n_rows, got)
