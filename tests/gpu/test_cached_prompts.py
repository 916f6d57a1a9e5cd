"""What an answer is does not depend on the prefix cache, on a GPU: ids, and log-probabilities to the bit.

`--schedules N` runs so many random schedules of each model instead of a few.
"""

from __future__ import annotations

import pytest
from helpers import long_rope
from helpers.prefix_schedules import Schedules

MODELS = ["llama-Q4_0", "qwen2-Q4_K_M", "phi3-swa-Q8_0", "gpt-oss-MXFP4_MOE", "long-rope"]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_a_prompt_alone_and_cold(name, gpu, goldens_dir, tmp_path, request):
    path = goldens_dir / f"{name}.gguf"
    if name == "long-rope":
        path = long_rope.write(goldens_dir / "phi3-Q8_0.gguf", tmp_path / "long.gguf")
    n = request.config.getoption("schedules") or 10
    schedules = Schedules(path, f"cuda:{gpu}", seed=n)
    try:
        for _ in range(n):
            schedules.run()
        schedules.check(n)
    finally:
        schedules.close()
