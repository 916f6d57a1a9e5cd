"""Sizes and launches of the expert kernels: as the headers say, large enough for any load, small enough for any GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from worker_orcd.cuda import expert_layout, layout, lowering, memory
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.models.ops import Attention, ExpertMatMul

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
    assert list((ctypes.c_int * 4).in_dll(lib, "constants")) == [
        e.ROUTE_SLICES, e.ROUTE_ROWS, e.DECODE_ROWS, e.MAX_MATRICES]  # fmt: skip


@pytest.mark.parametrize(
    ("n_rows", "n_used", "n_expert"), [(1, 4, 32), (64, 4, 32), (2048, 4, 32), (100, 8, 128), (9, 1, 1)]
)
def test_lists_hold_every_load(n_rows, n_used, n_expert):
    rng = np.random.default_rng(n_rows)
    n_pairs = n_rows * n_used
    for spread in (0.0, 0.5, 3.0):
        weights = rng.exponential(1.0, n_expert) ** spread
        counts = rng.multinomial(n_pairs, weights / weights.sum())
        for item_rows in (expert_layout.DECODE_ROWS, *expert_layout.PREFILL_ROWS):
            n_items = int((-(-counts // item_rows)).sum())
            most = expert_layout.max_items(n_pairs, n_expert, item_rows)
            assert n_items <= most
            _, items, pairs = expert_layout.list_parts(256, n_pairs, n_expert)
            assert items % 16 == 0 and items + 16 * most <= pairs
            assert pairs + 4 * n_pairs == 256 + expert_layout.list_bytes(n_pairs, n_expert)


def test_most_items_can_be_reached():
    """One more than whole items for every expert."""
    assert expert_layout.max_items(4 * 17, 4, 16) == 8
    assert expert_layout.max_items(3, 32, 16) == 3


@every_type
def test_decode_launches_fit_the_smallest_gpu(type_id):
    for n_out, k in [(2880, 2880), (256, 256), (5, 32), (768, 16384)]:
        k = -(-k // quants.TYPES[type_id].block_size) * quants.TYPES[type_id].block_size
        for n_rows in (1, 4, 5, 64):
            launch = expert_layout.decode_launch(type_id, k, n_out, 2, n_rows, 4, 32, n_sm=132)
            assert launch.smem + 64 <= layout.SMEM_SMALL and launch.block <= 256 and launch.grid[0] >= 1
            assert launch.needs_split == launch.kernel.endswith("_2")
            assert n_rows <= expert_layout.CONVERT_IN_BLOCK or launch.needs_split
            room = launch.smem - launch.ring_bytes - 2 * launch.block // 32 * 512
            assert room == (0 if launch.needs_split else n_rows * layout.x_split_bytes(type_id, k))


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
    type_id = built.weights[down.weight].type_id
    assert arena.x_split.nbytes >= 64 * down.n_used * layout.x_split_bytes(type_id, down.n_in)
    assert arena.x_half.nbytes >= 100 * down.n_used * layout.x_f16_bytes(type_id, down.n_in)
    assert arena.x_half_scale.nbytes >= 100 * down.n_used * 4
    assert arena.routing.prefill_list.nbytes >= expert_layout.list_bytes(128 * down.n_used, down.n_expert)
