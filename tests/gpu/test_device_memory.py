"""Device memory: used as planned, back after close, refused with both numbers where it is not there."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import limits
import pytest
from gpu.scripts import run_cli, run_script
from helpers.gguf_patch import with_uint32

from worker_orcd import LLM, SamplingParams, _driver
from worker_orcd.cuda import memory, vram
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import InsufficientVram
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
    left = free_in_a_child(gpu)
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
    # what may be taken: less than is free, since the driver needs some itself
    assert 0 <= errors[0]["bytes_available"] <= left < errors[0]["bytes_required"]
    assert f"{left:,}" in errors[0]["message"]


def test_no_memory_for_a_context_is_an_error_too(goldens_dir, gpu):
    gc.collect()
    with _driver.Context(gpu) as context:
        step, kept = context.memory()[0], []
        while step >= 4 << 20:  # all there is
            try:
                kept.append(context.allocate(step))
            except InsufficientVram:
                step //= 2
        done = run_cli(
            "generate", "--model", goldens_dir / "qwen2-Q8_0.gguf", "--device", f"cuda:{gpu}", "--prompt", "a"
        )
        line = refused(done)
        print(line)
        assert line.startswith("error: INSUFFICIENT_VRAM: ")


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


@pytest.fixture
def large(goldens_dir, tmp_path):
    """A tiny model whose KV cache takes whatever it may: 8 GiB for 64 sequences of 131,072 positions."""
    return with_uint32(goldens_dir / "llama-Q4_0.gguf", tmp_path / "large.gguf", "llama.context_length", 131_072)


def test_a_share_of_the_gpu_is_not_passed(large, gpu):
    """The share is that of the whole process: arenas, kernels, graphs and the driver's context."""
    gc.collect()
    with _driver.Context(gpu) as context:
        free, total = context.memory()
        share = (total - free + (2 << 30)) / total
        with LLM(large, device=f"cuda:{gpu}", progress=False, gpu_memory_utilization=share) as llm:
            taken = free - context.memory()[0]
            print(f"share {share:.4f}: {taken:,} of {int(share * total):,} bytes taken beside the context")
            assert (3 << 29) < taken <= int(share * total) - min(vram.CONTEXT_BYTES, total - free)
            assert llm.info.kv_bytes > 1 << 30
            assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].finish_reason == "length"
        with pytest.raises(InsufficientVram, match=r"gpu_memory_utilization is 0\.01"):
            LLM(large, device=f"cuda:{gpu}", progress=False, gpu_memory_utilization=0.01, kv_cache_bytes=4 << 30)


@pytest.mark.parametrize("left", [3 << 29, 3 << 28], ids=["1536 MiB", "768 MiB"])
def test_another_process_takes_memory_between_plan_and_allocation(large, left, gpu):
    """Sizes of ours get smaller until the model fits what is left; named ones stay, and that is an error."""
    gc.collect()
    shown, hogs = [], []
    with _driver.Context(gpu) as other:

        def take(plan, free):
            shown.append(plan.required)
            if len(shown) == 1:
                hogs.append(other.allocate(free - left, "another process"))

        before = other.memory()[0]
        limits_of = {"device": f"cuda:{gpu}", "progress": False, "vram_limit_bytes": 4 << 30, "on_plan": take}
        with LLM(large, **limits_of) as llm:
            print(f"{left:,} bytes left: planned {shown}, KV cache {llm.info.kv_bytes:,}")
            assert shown[0] > left >= shown[-1] and shown == sorted(shown, reverse=True) and len(shown) <= 12
            assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].finish_reason == "length"
        hogs.pop().close()
        shown.clear()
        named = {"kv_cache_bytes": 2 << 30, "max_seqs": 64, "max_batch_tokens": 2048}
        with pytest.raises(InsufficientVram) as e:
            LLM(large, **limits_of, **named)
        print(e.value.message)
        assert len(shown) == 1 and e.value.fields["bytes_required"] > e.value.fields["bytes_available"] >= 0
        hogs.pop().close()
        gc.collect()
        assert before - other.memory()[0] <= limits.DRIVER_KEEPS_BYTES, "everything of the failed tries is freed"


@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemHostAlloc", "cuLibraryLoadData", "cuGraphInstantiate"])
def test_a_call_that_finds_no_memory_while_loading(call, large, gpu):
    """Planted, one after the other: with sizes of ours the model loads, with named ones both numbers are told."""
    named = {"kv_cache_bytes": 64 << 20, "max_seqs": 4, "max_batch_tokens": 128}
    done = run_cli(
        "generate", "--model", large, "--device", f"cuda:{gpu}", "--prompt", "a", "--max-tokens", 1, "--json",
        "--vram-limit-mb", 512, WORKER_ORCD_FAULTS="1", WORKER_ORCD_FAIL_CALL=f"{call}:2:2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gc.collect()
    script = (
        "import sys\nfrom worker_orcd import LLM, errors\n"
        f"try: LLM(sys.argv[1], device='cuda:{gpu}', progress=False, **{named})\n"
        "except (errors.InsufficientVram, errors.InsufficientMemory) as e: print(e.code, e.fields)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(large)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "WORKER_ORCD_FAULTS": "1", "WORKER_ORCD_FAIL_CALL": f"{call}:1:2"},
    )
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.startswith("INSUFFICIENT_"), done.stderr
    assert "bytes_required" in done.stdout and "bytes_available" in done.stdout
