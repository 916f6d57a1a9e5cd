"""Device memory: used as planned, back after close, refused with both numbers where it is not there."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import limits
import pytest
from gpu.scripts import run_cli, run_script

from worker_orcd import _driver
from worker_orcd.cuda import memory
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import CudaError, InsufficientVram
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

pytestmark = [pytest.mark.slow_gpu, pytest.mark.timeout(300)]
#: what a ballast leaves free: too little for any model, since loading alone needs more
LEFT = memory.STAGING_BYTES // 2


@pytest.fixture(scope="module")
def measured(goldens_dir, gpu):
    return run_script("memory", goldens_dir / "qwen2-Q8_0.gguf", gpu)


def test_used_is_as_planned(measured):
    for i, r in enumerate(measured["rounds"]):
        beside = r["used"] - r["resident"]
        off = abs(r["used"] - r["planned"]) / r["planned"]
        print(
            f"round {i}: planned {r['planned']:,}, used {r['used']:,}: {100 * off:.2f} % off (limit 2 %); beside the "
            f"arenas {beside:,} of the {memory.RESERVE_BYTES:,} that are planned for it"
        )
        assert off <= limits.VRAM_PLAN_SHARE
        assert 0 <= beside <= memory.RESERVE_BYTES
        assert r["labels"] == ["kv", "weights", "workspace"], "staging is freed after the load"
        assert r["faults"] == []


def test_the_plan_is_told_before_anything_is_taken(measured):
    assert measured["rounds"][0]["free_when_planned"] == measured["free"][0]


def test_memory_comes_back(measured):
    first, second, third = measured["free"]
    print(
        f"free before {first:,}; after close {second:,}, {third:,}; kept {first - second:,} "
        f"(limit {limits.DRIVER_KEEPS_BYTES:,})"
    )
    assert first - second <= limits.DRIVER_KEEPS_BYTES
    assert third >= second, "the second engine leaves what the first left"
    assert abs(measured["free_at_end"] - third) <= 8 << 20


def test_a_hundred_generations_take_nothing(measured):
    assert measured["taken_by_100_generations"] == 0 and measured["same_ids"]


def test_a_kv_cache_that_does_not_fit(goldens_dir, gpu):
    from worker_orcd._engine import CudaEngine

    gc.collect()
    with _driver.Context(gpu) as context, ModelFile(str(goldens_dir / "llama-Q4_0.gguf")) as mf:
        before, total = context.memory()
        p = plan.build(mf)
        told = []
        config = EngineConfig(4, 128, 256, (2 * total // (32 << 10),) * len(p.kv_groups))
        with pytest.raises(InsufficientVram, match="would fit") as e:
            CudaEngine(mf, p, config, device=gpu, on_plan=lambda plan, free: told.append((plan.required, free)))
        fields = e.value.fields
        assert fields["bytes_required"] > 2 * total and fields["bytes_available"] == before
        assert told == [(fields["bytes_required"], before)], "the plan is shown even where it is refused"
        assert context.memory()[0] == before


CHILD_FREE = "from worker_orcd import _driver; import sys; print(_driver.Context(int(sys.argv[1])).memory()[0])"


def free_in_a_child(gpu: int) -> int:
    return int(
        subprocess.run(
            [sys.executable, "-c", CHILD_FREE, str(gpu)], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    )


@pytest.fixture
def ballast(gpu):
    """A function: take so much that another process finds about this many bytes free."""
    gc.collect()
    taken = []
    with _driver.Context(gpu) as context:

        def leave(nbytes: int) -> None:
            taken.append(context.allocate(free_in_a_child(gpu) - nbytes, "ballast"))

        yield leave


def refused(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_model_beside_a_ballast_is_refused_with_both_numbers(command, ballast, goldens_dir, gpu):
    ballast(LEFT)
    left = free_in_a_child(gpu)
    args = ["--prompt", "a", "--max-tokens", 1] if command == "generate" else ["-p", "16", "-n", 0]
    done = run_cli(command, "--model", goldens_dir / "qwen2-Q8_0.gguf", "--device", f"cuda:{gpu}", "-v", *args)
    line = refused(done)
    print(line)
    assert line.startswith("error: INSUFFICIENT_VRAM: ")
    assert f"{left:,}" in line, f"{left:,} bytes are free"
    assert free_in_a_child(gpu) == left, "nothing is left behind"


def test_serve_beside_a_ballast_is_one_error_and_exit_1(ballast, goldens_dir, gpu):
    ballast(LEFT)
    done = run_cli(
        "serve",
        "--model",
        goldens_dir / "qwen2-Q8_0.gguf",
        "--device",
        f"cuda:{gpu}",
        "--port",
        0,
        "--log-format",
        "json",
    )
    log = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    errors = [e for e in log if e["event"] == "error"]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert errors[0]["code"] == "INSUFFICIENT_VRAM"
    assert 0 < errors[0]["bytes_available"] < errors[0]["bytes_required"]


def test_no_memory_for_a_context_is_an_error_too(goldens_dir, gpu):
    gc.collect()
    with _driver.Context(gpu) as context:
        step, kept = context.memory()[0], []
        while step >= 4 << 20:  # all there is
            try:
                kept.append(context.allocate(step))
            except CudaError:
                step //= 2
        done = run_cli(
            "generate", "--model", goldens_dir / "qwen2-Q8_0.gguf", "--device", f"cuda:{gpu}", "--prompt", "a"
        )
        line = refused(done)
        print(line)
        assert line.startswith(("error: CUDA_ERROR: ", "error: INSUFFICIENT_VRAM: "))


def test_the_plan_is_shown_to_who_asks(goldens_dir, gpu):
    done = run_cli(
        "generate",
        "--model",
        goldens_dir / "qwen2-Q8_0.gguf",
        "--device",
        f"cuda:{gpu}",
        "-v",
        "--prompt",
        "a",
        "--max-tokens",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == [
        "weights",
        "KV",
        "workspace",
        "reserve",
        "required",
        "free",
    ]
