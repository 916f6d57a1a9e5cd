"""The arenas before and after they are allocated: regions one after the other, the same names with addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest

from worker_orcd._engine import plan_memory
from worker_orcd.cuda import memory
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import ops, plan


def regions(value: object) -> Iterator[memory.Region]:
    if isinstance(value, memory.Region):
        yield value
    elif isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from regions(item)
    elif is_dataclass(value):
        for f in fields(value):
            yield from regions(getattr(value, f.name))


@pytest.fixture(params=["llama-Q4_K_M", "gpt-oss-MXFP4", "phi3-Q4_K_M"])
def built(request, goldens_dir):
    with ModelFile(goldens_dir / f"{request.param}.gguf") as file:
        yield plan.build(file)


@pytest.fixture
def arenas(built):
    return plan_memory(built, EngineConfig(5, 100, 300, tuple(7 for _ in built.kv_groups)))


def test_regions_lie_one_after_the_other(arenas):
    for arena in arenas:
        end = 0
        for region in regions(arena):
            assert region.offset == end and region.nbytes > 0
            end += -(-region.nbytes // memory.ALIGN) * memory.ALIGN
        assert end == arena.nbytes


def test_regions_are_those_of_the_plan(built, arenas):
    assert list(arenas.weights.tensors) == list(built.weights)
    assert len(arenas.kv.layers) == built.n_layer
    assert {r.nbytes for r in arenas.kv.layers} == {7 * memory.kv_block_bytes(built)}
    for name, buffer in built.buffers.items():
        rows = 128 if buffer.rows == "tokens" else memory.MAX_OUT
        assert arenas.workspace.buffers[name].nbytes == 4 * rows * buffer.width
    assert (arenas.workspace.routing is None) == ("gpt-oss" not in built.arch)
    for op in (op for op in built.ops if isinstance(op, ops.Rope)):
        table = op.inv_freq + op.inv_freq_long
        assert arenas.weights.inv_freq[memory.inv_freq_tables(built).index(table)].nbytes == 4 * len(table)


def test_an_allocated_arena_has_addresses(arenas):
    for arena in arenas:
        placed = arena.at(1 << 40)
        assert type(placed) is type(arena) and placed.nbytes == arena.nbytes
        assert [r.address - (1 << 40) for r in regions(placed)] == [r.offset for r in regions(arena)]
        with pytest.raises(ValueError, match="not allocated"):
            next(regions(arena)).address  # noqa: B018
