"""What an answer is does not depend on the prefix cache, on a GPU: ids, and log-probabilities to the bit.

`--schedules N` runs so many random schedules of each model instead of a few.
"""

from __future__ import annotations

import pytest
from helpers import long_rope
from helpers.prefix_schedules import FEW, MANY, Schedules

MODELS = ["llama-Q4_0", "qwen2-Q4_K_M", "phi3-swa-Q8_0", "gpt-oss-MXFP4_MOE", "long-rope"]


@pytest.fixture(params=MODELS)
def model_file(request, goldens_dir, tmp_path):
    if request.param == "long-rope":
        return long_rope.write(goldens_dir / "phi3-Q8_0.gguf", tmp_path / "long.gguf")
    return goldens_dir / f"{request.param}.gguf"


def run(path, gpu, n, size):
    schedules = Schedules(path, f"cuda:{gpu}", seed=n, size=size)
    try:
        for _ in range(n):
            schedules.run()
        schedules.check(n)
        if size is not FEW:
            schedules.check_crowds()
    finally:
        schedules.close()


def test_answers_are_those_of_a_prompt_alone_and_cold(model_file, gpu, request):
    run(model_file, gpu, request.config.getoption("schedules") or 15, FEW)


def test_so_they_are_among_256(model_file, gpu, request):
    run(model_file, gpu, -(-(request.config.getoption("schedules") or 1) // 20), MANY)
