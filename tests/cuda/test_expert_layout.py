"""Sizes and launches of the expert kernels: as the headers say, large enough for any load, small enough for any GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from worker_orcd.cuda import expert_layout, layout, lowering, memory
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.models.ops import Add, Attention, ExpertMatMul, ExpertSum, Glu, Op, Route, View

ROOT = Path(__file__).resolve().parents[2]
TYPES = sorted(quants.TYPES)
every_type = pytest.mark.parametrize("type_id", TYPES, ids=[quants.TYPES[t].name for t in TYPES])


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("experts") / "experts.so"
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    source = ROOT / "tests" / "helpers" / "expert_layout_host.cpp"
    subprocess.run(
        ["g++", *flags, "-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "cuda"), str(source), "-o", str(out)],
        check=True,
    )
    return ctypes.CDLL(str(out))


@every_type
def test_shared_memory_is_that_of_the_kernels(lib, type_id):
    suffix = layout.kernel_suffix(type_id)
    for rows in expert_layout.PREFILL_ROWS:
        smem = expert_layout.prefill_smem(type_id, rows)
        assert getattr(lib, f"prompt_smem_{suffix}")(rows) == smem <= layout.SMEM_SMALL
    assert getattr(lib, f"decode_row_tiles_{suffix}")() == layout.matvec_shape(type_id, 1).row_tiles == 1


def test_constants_are_those_of_the_header(lib):
    e = expert_layout
    assert list((ctypes.c_int * 6).in_dll(lib, "constants")) == [
        e.ROUTE_SLICES, e.ROUTE_ROWS, e.ROUTE_FEW_ROWS, e.DECODE_ROWS, e.MAX_MATRICES, e.GATHERED_ROWS]  # fmt: skip


@pytest.mark.parametrize(
    ("n_rows", "n_used", "n_expert"), [(1, 4, 32), (64, 4, 32), (2048, 4, 32), (100, 8, 128), (9, 1, 1)]
)
def test_lists_hold_every_load(n_rows, n_used, n_expert):
    rng = np.random.default_rng(n_rows)
    n_pairs = n_rows * n_used
    for spread in (0.0, 0.5, 3.0):
        weights = rng.exponential(1.0, n_expert) ** spread
        counts = rng.multinomial(n_pairs, weights / weights.sum())
        n_places = expert_layout.n_places(n_pairs, n_expert)
        assert n_places % 8 == 0 and int((-(-counts // 8)).sum()) * 8 <= n_places
        for item_rows in (expert_layout.DECODE_ROWS, *expert_layout.PREFILL_ROWS, *layout.WGMMA_EXPERT_TILES):
            n_items = int((-(-counts // item_rows)).sum())
            most = expert_layout.max_items(n_pairs, n_expert, item_rows)
            assert n_items <= most
            _, items, pairs, places = expert_layout.list_parts(256, n_pairs, n_expert)
            assert items % 16 == 0 and items + 16 * most <= places and places + 4 * n_pairs == pairs
            assert pairs + 4 * n_places == 256 + expert_layout.list_bytes(n_pairs, n_expert)


def test_most_items_can_be_reached():
    """One more than whole items for every expert."""
    assert expert_layout.max_items(4 * 17, 4, 16) == 8
    assert expert_layout.max_items(3, 32, 16) == 3


@every_type
def test_decode_launches_fit_the_smallest_gpu(type_id):
    for n_out, k in [(2880, 2880), (256, 256), (5, 32), (768, 16384)]:
        k = -(-k // quants.TYPES[type_id].block_size) * quants.TYPES[type_id].block_size
        for n_rows in (9, 16, 17, 64):
            launch = expert_layout.decode_launch(type_id, k, n_out, 2, n_rows, 4, 32, n_sm=132)
            assert launch.smem + 64 <= layout.SMEM_SMALL and launch.block <= 256 and launch.grid[0] >= 1
            tiles = int(launch.kernel.rpartition("_")[2])
            assert min(n_rows, expert_layout.DECODE_ROWS) <= 8 * tiles
            # two sets of sums, factors, sums so far
            rest = 2 * launch.block // 32 * 512 + layout.n_chunks(k) * 32 * tiles + tiles * 512
            assert launch.smem == launch.ring_bytes + rest


@every_type
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("max_smem", [layout.SMEM_SMALL, 227 << 10])
def test_launches_of_few_rows_are_what_the_kernel_takes(type_id, glu, max_smem):
    """experts_few.cu, with the sizes written out as the kernel has them."""
    prefix = f"expert_few_{layout.kernel_suffix(type_id)}_"
    for n_out, k in [(2880, 2880), (256, 256), (5, 32), (48, 576), (1408, 2048), (14336, 4096), (4096, 14336)]:
        k = -(-k // quants.TYPES[type_id].block_size) * quants.TYPES[type_id].block_size
        chunk, chunks = layout.chunk_columns(k), layout.n_chunks(k)
        for n_rows in range(1, 9):
            launch = expert_layout.few_launch(type_id, k, n_out, n_rows, 4, 32, n_sm=132, glu=glu, max_smem=max_smem)
            variant, warps = launch.kernel.removeprefix(prefix), launch.n_warps * launch.n_groups
            assert (variant == "long" or int(variant) == chunk) and 1 <= launch.n_warps <= chunks
            most = expert_layout.FEW_LONG_THREADS if variant == "long" else expert_layout.FEW_THREADS
            assert launch.block == 32 * warps <= most and launch.grid[0] >= 1
            unit = layout.decode_unit_bytes(type_id, variant)
            assert launch.batch % launch.n_groups == 0 and launch.batch % 2 == 0
            assert 2 <= launch.batch * (1 if n_rows == 1 else 8) <= expert_layout.FEW_BATCH
            assert not glu or launch.n_groups == 1 or launch.n_groups % 2 == 0
            sums = 4 * chunks * (16 if n_rows == 1 else 8 * 20)
            assert launch.depth >= 1 and launch.ring_bytes == warps * launch.depth * unit
            x = 0 if variant == "long" else n_rows * (512 * -(-k // 256) + 64)
            assert launch.x_smem == x and launch.ring_bytes % 16 == 0
            assert launch.factors == launch.ring_bytes + x + 2 * launch.batch * sums
            assert launch.barriers >= launch.factors + 32 * chunks and launch.barriers % 8 == 0
            # and pairs and flags beside it
            assert launch.barriers + 8 * warps * launch.depth <= launch.smem <= max_smem - 32 - expert_layout.FEW_BATCH


def test_a_launch_of_few_rows_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expert_few_q8_0 for 1048576 columns needs more than 101376 bytes"):
        expert_layout.few_launch(quants.BY_NAME["Q8_0"].id, 1 << 20, 64, 1, 4, 32, n_sm=132)
    name = {quants.TYPES[t].name: t for t in TYPES}
    for type_id, k in ((name["F32"], 28672), (name["Q6_K"], 32768), (name["Q8_0"], 32768)):
        launch = expert_layout.few_launch(type_id, k, 64, 8, 4, 32, n_sm=132)
        assert launch.smem <= layout.SMEM_SMALL - expert_layout.FEW_STATIC_SMEM


def test_gate_and_up_share_a_launch_and_down_has_room(goldens_dir):
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as file:
        built = plan.build(file)
    groups = [op for op in lowering.lower(built) if isinstance(op, lowering.ExpertGroup)]
    assert [[part.name for part in g.parts] for g in groups[:2]] == [
        ["blk.0.ffn_gate_exps", "blk.0.ffn_up_exps"], ["blk.0.ffn_down_exps"]]  # fmt: skip
    alone = [op.name for op in lowering.lower(built, fuse=False)]
    assert alone == [op.name for op in built.ops]
    config = EngineConfig(4, 100, 256, tuple(16 for _ in built.kv_groups))
    splits = {op.window: 4 for op in built.ops if isinstance(op, Attention)}
    arena = memory.workspace_arena(built, config, splits, 4, 32, memory.SampleScratch(0, 0, 0, 0, 0, 0))
    down = next(op for op in built.ops if isinstance(op, ExpertMatMul) and op.per_slot)
    rows = 128 + layout.MATMUL_TILE_ROWS
    assert arena.converted.nbytes >= rows * down.n_used * layout.x_f16_bytes(down.n_in)
    assert arena.routing.prefill_list.nbytes >= expert_layout.list_bytes(128 * down.n_used, down.n_expert)


def test_the_activation_of_experts_and_their_sum_are_folded_where_nothing_else_reads(goldens_dir):
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as file:
        built = plan.build(file)
    ops = lowering.lower(built)
    assert not any(isinstance(op, Glu | ExpertSum | lowering.ExpertSumAdd) for op in ops)
    groups = [op for op in ops if isinstance(op, lowering.ExpertGroup)]
    assert [op.glu is not None for op in groups] == [True, False] * built.n_layer
    assert [op.is_converted for op in groups] == [True, False] * built.n_layer
    sums = [op.sum for op in groups if op.sum is not None]
    assert len(sums) == built.n_layer and all(op.out != op.sum.out for op in sums)
    routes = [op for op in ops if isinstance(op, lowering.NormRoute)]
    assert len(routes) == built.n_layer and all(op.inp == op.norm.inp != op.route.inp for op in routes)
    spans = lowering.spans(built, ops)
    assert sum(spans, ()) == built.ops
    for op, span in zip(ops, spans, strict=True):
        if isinstance(op, lowering.NormRoute):
            assert span == (op.norm, op.route)
        elif isinstance(op, lowering.ExpertGroup):
            assert span[: len(op.parts)] == op.parts
            assert span[len(op.parts) :][:1] == ((op.glu,) if op.glu else (op.sum.sum,))

    def with_reader_of(kind: type[Op], view: str) -> tuple[Op, ...]:
        """Lowered with an op that reads `view` of the first op of `kind`, behind the op after that."""
        at = next(i for i, op in enumerate(built.ops) if isinstance(op, kind))
        read = getattr(built.ops[at], view)
        x = next(op.out for op in built.ops if isinstance(op, Add))
        spy = Add("spy", View(read.buf, read.offset, x.width), x)
        return lowering.lower(replace(built, ops=(*built.ops[: at + 2], spy, *built.ops[at + 2 :])))

    # a router whose norm something else reads: its experts convert their own rows
    at = [i for i, op in enumerate(built.ops) if isinstance(op, Route)][1]
    spy = Add("spy", built.ops[at].inp, next(op.out for op in built.ops if isinstance(op, Add)))
    ops = lowering.lower(replace(built, ops=(*built.ops[: at + 4], spy, *built.ops[at + 4 :])))
    groups = [op for op in ops if isinstance(op, lowering.ExpertGroup)]
    assert [op.is_converted for op in groups] == [True, False, False, False] + [True, False] * (built.n_layer - 2)

    for view in ("gate", "up"):
        left = [op for op in with_reader_of(Glu, view) if isinstance(op, Glu)]
        glu = next(op for op in built.ops if isinstance(op, Glu))
        assert left == ([] if getattr(glu, view) == glu.out else [glu])
    assert sum(isinstance(op, ExpertSum) for op in with_reader_of(ExpertSum, "out")) == 1
