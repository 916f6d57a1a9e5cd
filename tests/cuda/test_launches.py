"""Launches without a GPU: every op has a row in the table, and parameters are complete or refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from helpers.fake_file import FakeFile

from worker_orcd._engine import plan_memory
from worker_orcd._nodes import GLU_KINDS, NORM_KINDS, ROPE_TYPES, RowNode
from worker_orcd.cuda import launches, lowering
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import InternalError
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
