"""The arenas before and after they are allocated: regions one after the other, the same names with addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise

import limits
import pytest

from worker_orcd._engine import plan_memory
from worker_orcd.cuda import layout, memory
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


def is_vector(weight: ops.Weight) -> bool:
    return weight.kind in ("vector", "expert_vectors")


def aligns(built, arena) -> Iterator[tuple[memory.Region, int]]:
    """The regions of an arena and the alignment that each needs."""
    weights = iter(arena.tensors) if isinstance(arena, memory.Weights) else iter(())
    for region in regions(arena):
        name = next(weights, None)
        vector = name is not None and is_vector(built.weights[name])
        yield region, memory.ALIGN if name is None else memory.VECTOR_ALIGN if vector else memory.MATRIX_ALIGN


def test_regions_lie_one_after_the_other(built, arenas):
    """Each aligned, none over another, no gap larger than the alignment asks for."""
    for arena in arenas:
        end = 0
        for region, align in aligns(built, arena):
            assert region.nbytes > 0 and region.offset % align == 0 and 0 <= region.offset - end < align
            end = region.offset + region.nbytes
        assert end <= arena.nbytes < end + memory.ALIGN


def test_matrices_come_first_and_without_gaps(built, arenas):
    """So what follows in the plan lies as one: q, k and v, gate and up, and their biases."""
    tensors = arenas.weights.tensors
    kinds = [is_vector(built.weights[name]) for name in tensors]
    assert kinds == sorted(kinds) and set(kinds) == {False, True}
    matrices = [region for name, region in tensors.items() if not is_vector(built.weights[name])]
    for a, b in pairwise(matrices):
        assert b.offset == a.offset + a.nbytes
    for layer in range(built.n_layer):
        names = [f"blk.{layer}.attn_{which}" for which in "qkv"]
        for kind in ("weight", "bias"):
            found = [tensors[f"{name}.{kind}"] for name in names if f"{name}.{kind}" in tensors]
            if "phi3" in built.arch or (kind == "bias" and "gpt-oss" not in built.arch):
                assert not found
                continue
            assert len(found) == 3
            for a, b in pairwise(found):
                assert b.offset == a.offset + a.nbytes


def test_regions_are_those_of_the_plan(built, arenas):
    by_kind = sorted(built.weights, key=lambda name: is_vector(built.weights[name]))
    assert list(arenas.weights.tensors) == by_kind
    assert {name: r.nbytes for name, r in arenas.weights.tensors.items()} == {
        name: memory.weight_bytes(w) for name, w in built.weights.items()}  # fmt: skip
    assert len(arenas.kv.layers) == built.n_layer
    assert {r.nbytes for r in arenas.kv.layers} == {7 * memory.kv_block_bytes(built)}
    for name, buffer in built.buffers.items():
        rows = 128 if buffer.rows == "tokens" else memory.OUTPUT_ROWS
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


def test_converted_rows_have_room_for_the_widest_input(built, arenas):
    """Decode rows, then prompt rows in whole tiles of the prefill kernels; with experts every slot's row of its own."""
    widest = max(
        (op.n_used if isinstance(op, ops.ExpertMatMul) and op.per_slot else 1)
        * layout.x_f16_bytes(built.weights[op.weight].shape[0])
        for op in built.ops if isinstance(op, ops.MatMul | ops.ExpertMatMul)
    )  # fmt: skip
    rows = 128
    for n_decode in range(layout.MATVEC_ROWS + 1):
        n_prompt = rows - n_decode
        padded = n_decode + -(-n_prompt // layout.MATMUL_TILE_ROWS) * layout.MATMUL_TILE_ROWS
        assert arenas.workspace.converted.nbytes >= padded * widest


def test_more_sequences_take_room_for_themselves_alone(built):
    """A row of output counts for each beyond 64 only; nothing else than tables and what each is sampled by grows."""
    config = EngineConfig(64, 2048, 4096, tuple(7 for _ in built.kv_groups))
    workspaces = [plan_memory(built, replace(config, max_seqs=n)).workspace for n in (8, 64, 256)]
    for name, buffer in built.buffers.items():
        rows = (2048, 2048, 2048) if buffer.rows == "tokens" else (64, 64, 256)
        assert [w.buffers[name].nbytes for w in workspaces] == [4 * n * buffer.width for n in rows]
    for few, usual, many in zip(*map(regions, workspaces), strict=True):
        assert few.nbytes <= usual.nbytes <= 8 * few.nbytes and usual.nbytes <= many.nbytes <= 4 * usual.nbytes


def test_the_workspace_of_64_sequences(model_path):
    """Of a real model, 2,048 tokens of a step and the whole context: what it had when 64 were the most."""
    with ModelFile(model_path("qwen")) as file:
        the_plan = plan.build(file)
    nbytes = plan_memory(the_plan, EngineConfig(64, 2048, the_plan.context_length, (1,))).workspace.nbytes
    print(f"{nbytes:,} bytes (limit {limits.WORKSPACE_64_BYTES:,})")
    assert nbytes <= limits.WORKSPACE_64_BYTES
