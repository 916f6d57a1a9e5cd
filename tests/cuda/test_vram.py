"""The VRAM plan: sums, limits and words."""

from __future__ import annotations

import pytest
from helpers.fake_file import FakeFile

from worker_orcd._engine import plan_memory
from worker_orcd.cuda import memory
from worker_orcd.cuda.vram import CONTEXT_BYTES, MARGIN_BYTES, Allowance, VramPlan
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import InsufficientVram
from worker_orcd.models import plan

PLAN = VramPlan(weights=12_000_000_000, kv=2_000_000_000, workspace=100_000_000, reserve=300, staging=200)


def test_sums():
    assert PLAN.resident == 14_100_000_000
    assert PLAN.required == 14_100_000_300
    assert VramPlan(1, 2, 3, reserve=10, staging=20).required == 26, "staging is freed before the reserve is taken"


def test_of_arenas():
    built = plan.build(FakeFile())
    config = EngineConfig(4, 64, 256, tuple(16 for _ in built.kv_groups))
    arenas = plan_memory(built, config)
    assert VramPlan.of(arenas) == VramPlan(arenas.weights.nbytes, arenas.kv.nbytes, arenas.workspace.nbytes)
    assert arenas.kv.nbytes == 16 * built.n_layer * memory.kv_block_bytes(built)


def test_exactly_enough_is_enough_and_one_byte_less_is_not():
    PLAN.check(PLAN.required, "cuda:0", "m.gguf")
    with pytest.raises(InsufficientVram) as e:
        PLAN.check(PLAN.required - 1, "cuda:3", "m.gguf")
    fields = e.value.fields
    assert (fields["bytes_required"], fields["bytes_available"]) == (PLAN.required, PLAN.required - 1)
    assert fields["device"] == "cuda:3" and fields["path"] == "m.gguf"
    for part in ("14,100,000,300", "14,100,000,299", "weights 12,000,000,000", "KV cache 2,000,000,000", "cuda:3"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("free", [0, 12_100_000_300, 12_100_000_556, 13_000_000_000, 20_000_000_000])
def test_the_largest_kv_cache_fits_and_no_larger_one(free: int):
    most = PLAN.largest_kv(free)
    assert most % memory.ALIGN == 0
    for kv, fits in ((most, free >= 12_100_000_300), (most + memory.ALIGN, False)):
        other = VramPlan(PLAN.weights, kv, PLAN.workspace, PLAN.reserve, PLAN.staging)
        assert (other.required <= free) == fits


def test_the_error_says_what_kv_cache_would_fit():
    with pytest.raises(InsufficientVram, match=r"KV cache of up to 899,999,488 bytes would fit"):
        PLAN.check(13_000_000_000, "cuda:0", "m.gguf")
    with pytest.raises(InsufficientVram) as e:
        PLAN.check(1000, "cuda:0", "m.gguf")
    assert "would fit" not in str(e.value)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "utilization", "limit", "allowed", "why"),
    [
        (79 * GIB, 0.5, None, 40 * GIB - CONTEXT_BYTES, "gpu_memory_utilization is 0.5"),
        (80 * GIB - 1000, 0.5, None, 40 * GIB - 1000, "gpu_memory_utilization is 0.5"),
        (30 * GIB, 0.5, None, 30 * GIB - MARGIN_BYTES, "268,435,456 stay free"),
        (79 * GIB, 1.0, None, 79 * GIB - MARGIN_BYTES, "268,435,456 stay free"),
        (79 * GIB, 0.5, 10 * GIB, 10 * GIB, f"the limit is {10 * GIB:,}"),
        (5 * GIB, 0.5, 10 * GIB, 5 * GIB - MARGIN_BYTES, "268,435,456 stay free"),
        (1000, 0.5, None, 0, "268,435,456 stay free"),
        (79 * GIB, 0.001, None, 0, "gpu_memory_utilization is 0.001"),
    ],
)
def test_what_may_be_taken(free, utilization, limit, allowed, why):
    allowance = Allowance(free, 80 * GIB, utilization, limit)
    assert allowance.nbytes == allowed
    assert f"{free:,}" in str(allowance) and why in str(allowance) and f"{allowed:,}" in str(allowance)
    with pytest.raises(InsufficientVram) as e:
        VramPlan(allowed + 1, 0, 0, 0, 0).check(allowance, "cuda:0", "m.gguf")
    assert (e.value.fields["bytes_required"], e.value.fields["bytes_available"]) == (allowed + 1, allowed)
    assert why in e.value.message
    VramPlan(allowed, 0, 0, 0, 0).check(allowance, "cuda:0", "m.gguf")


def test_table():
    lines = PLAN.table(free=80_000_000_000).splitlines()
    assert [line.split()[0] for line in lines] == ["weights", "KV", "workspace", "reserve", "required", "free"]
    assert lines[4].split()[1:] == ["14,100,000,300", "B", "14,100.0", "MB"]
    assert len({len(line) for line in lines}) == 1


def test_the_numbers_by_name():
    assert PLAN.to_dict() == {
        "weights_bytes": PLAN.weights,
        "kv_bytes": PLAN.kv,
        "workspace_bytes": PLAN.workspace,
        "reserve_bytes": 300,
        "bytes_required": PLAN.required,
    }


def test_inspect_shows_the_plan_of_every_model_a_gpu_can_run(goldens_dir):
    from worker_orcd.diagnose import inspect

    facts = inspect.inspect(str(goldens_dir / "qwen2-Q4_K_M.gguf"))
    vram = facts["memory"]["vram_plan"]
    parts = [vram[f"{part}_bytes"] for part in ("weights", "kv", "workspace", "reserve")]
    assert vram["bytes_required"] == sum(parts) and min(parts) > 0
    assert f"{vram['bytes_required']:,d}" in inspect.as_text(facts)
