"""The CUDA kernels and the CUDA engine run on the CPU: a part of tests/gpu, and kernels with mistakes, which must show.

Each run is a process of its own with the stand-in driver in place, in the background of all other tests (conftest.py).
Left out are tests that need a real GPU: test_device_driver.py, test_device_memory.py, test_faults.py and test_upload.py
(its images, memory, faults and speed), test_a_counting_thread_keeps_half_its_speed; and, by their names here, tests
that take long.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from kernels_on_cpu import build

from worker_orcd.cuda import lowering

HERE = Path(__file__).resolve().parent
GPU = HERE.parent / "gpu"
SAME_BITS = f"{GPU}/test_engine.py::test_a_text_has_the_same_bits_however_it_comes"

#: name -> arguments of pytest; the slowest first. Every kernel file is run by one of them.
RUNS = {
    "engine, experts": [f"{SAME_BITS}[gpt-oss-MXFP4_MOE]"],
    "experts": [
        str(GPU / "test_experts.py"),
        "-k",
        "(same_bits and False and (MXFP4 or Q8_0)) or (decode_products and False-MXFP4) or (gated and MXFP4) or sum or "
        "ties or items or (list and not 2048) or (test_route and (F32 or Q4_K)) or dependent",
    ],
    "products": [
        str(GPU / "test_matmul.py"),
        "-k",
        "decode_product or prefill_product or dequant or (rows_of and 16) or "
        "((bias or SILU or others) and (Q4_K or Q8_0)) or dependent",
    ],
    "engine, sliding window": [f"{SAME_BITS}[phi3-swa-Q8_0]"],
    "engine, layer norm": [f"{SAME_BITS}[gpt2-Q8_0]"],
    "engine, biases": [f"{SAME_BITS}[qwen2-Q4_K_M]"],
    "engine, RMS norm": [f"{SAME_BITS}[llama-Q4_0]"],
    "engine, kernels of other GPUs": [f"{SAME_BITS}[llama-Q4_0]", f"{SAME_BITS}[gpt-oss-MXFP4_MOE]"],
    "attention": [
        str(GPU / "test_attention.py"),
        "-k",
        "(test_decode and not 131072) or (test_prefill and not chunks) or other_widths or nan or rules or large_logits",
    ],
    "sampling": [str(GPU / "test_sample.py"), "-k", "(not filters_on_rows and not frequencies) or (filters and 300-)"],
    "norm, rotation": [str(GPU / "test_norm_rope.py")],
    "products of warpgroups": [str(GPU / "test_matmul.py"), "-k", "warpgroups and (Q4_K or MXFP4)"],
    "experts of warpgroups": [str(GPU / "test_experts.py"), "-k", "products_of_warpgroups and MXFP4"],
    "mistakes": [str(HERE / "bad_kernel_cases.py")],
}
#: run -> what it is to find in the environment
ENVIRONMENTS = {"engine, kernels of other GPUs": {lowering.MANY_ROWS_VARIABLE: "mma"}}
#: runs that come again with blocks, warps and threads in another order
IN_ANOTHER_ORDER = {
    "mistakes": RUNS["mistakes"],
    "products": [str(GPU / "test_matmul.py"), "-k", "(decode_product or prefill_product) and (Q4_K or Q8_0 or F16)"],
    "products of warpgroups": [str(GPU / "test_matmul.py"), "-k", "warpgroups and Q4_K"],
    "experts of warpgroups": [str(GPU / "test_experts.py"), "-k", "products_of_warpgroups and Q8_0"],
    "attention": [str(GPU / "test_attention.py"), "-k", "test_decode and not 131072"],
    "experts": [str(GPU / "test_experts.py"), "-k", "(list and not 2048) or (gated and MXFP4)"],
    "sampling": [str(GPU / "test_sample.py"), "-k", "test_tokens_follow_the_rule and not 151936 and not 201088"],
    "norm, rotation": [str(GPU / "test_norm_rope.py"), "-k", "896 or rope"],
}
CASES = {name: (name, "") for name in RUNS} | {f"{name}, in another order": (name, "7") for name in IN_ANOTHER_ORDER}


def command(name: str, order: str) -> tuple[list[str], dict[str, str]]:
    """The pytest of a run, and its environment."""
    arguments = IN_ANOTHER_ORDER[name] if order else RUNS[name]
    environment = {**os.environ, **build.environment(), "WORKER_ORCD_TEST_EVERY": "1",
                   **ENVIRONMENTS.get(name, {})}  # fmt: skip
    environment.pop("WORKER_ORCD_REQUIRE_GPU", None)
    environment.pop("KERNELS_ON_CPU_ORDER", None)
    if order:
        environment["KERNELS_ON_CPU_ORDER"] = order
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], environment


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_the_cpu(case, background):
    done = background.result(case)
    print(done.stdout[-6000:], done.stderr[-3000:])
    assert done.returncode == 0
    counts = dict(re.findall(r"(\d+) (passed|skipped)", done.stdout.splitlines()[-1]))
    if "passed" not in counts.values():
        pytest.skip(done.stdout.strip().splitlines()[-2])
