"""What an answer is does not depend on the prefix cache: on the CPU engine, with every kind of attention.

`--schedules N` runs so many random schedules of each model instead of a few.
"""

from __future__ import annotations

import dataclasses

import pytest
from helpers import long_rope
from helpers.prefix_schedules import FEW, MANY, Schedules

from worker_orcd import LLM, SamplingParams

MODELS = ["llama-Q4_0", "qwen2-Q4_K_M", "phi3-swa-Q8_0", "gpt-oss-MXFP4_MOE", "long-rope"]


@pytest.fixture(params=MODELS)
def model_file(request, goldens_dir, tmp_path):
    if request.param == "long-rope":
        return long_rope.write(goldens_dir / "phi3-Q8_0.gguf", tmp_path / "long.gguf")
    return goldens_dir / f"{request.param}.gguf"


def run(path, n, size):
    schedules = Schedules(path, "cpu", seed=n, size=size)
    try:
        for _ in range(n):
            schedules.run()
        schedules.check(n)
        if size is not FEW:
            schedules.check_crowds()
    finally:
        schedules.close()


def test_answers_are_those_of_a_prompt_alone_and_cold(model_file, request):
    run(model_file, request.config.getoption("schedules") or 6, FEW)


def test_so_they_are_among_256(goldens_dir, request):
    """Of a model whose layers have a window and none."""
    size = dataclasses.replace(MANY, max_tokens=(1, 8, 30, 50, 50), again=0.6)
    n = -(-(request.config.getoption("schedules") or 1) // 20)
    run(goldens_dir / "gpt-oss-MXFP4_MOE.gguf", n, size)


def test_logits_of_every_token_are_the_same_with_a_warm_cache(goldens_dir):
    params = SamplingParams(max_tokens=1, temperature=0.0)
    tokens = [7 * i % 500 + 3 for i in range(200)]
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False) as llm:
        cold = llm.logits(tokens)
        warm = llm.generate([tokens], params)[0]
        assert warm.cached_tokens == 192, "what was teacher-forced is there for others"
        assert (llm.logits(tokens) == cold).all()


def test_without_the_prefix_cache_nothing_is_cached(goldens_dir):
    params = SamplingParams(max_tokens=2, temperature=0.0)
    tokens = [7 * i % 500 + 3 for i in range(200)]
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False, prefix_cache=False) as llm:
        assert [llm.generate([tokens], params)[0].cached_tokens for _ in range(2)] == [0, 0]


def test_a_job_tells_its_cached_tokens_before_its_first_piece(goldens_dir):
    tokens = [7 * i % 500 + 3 for i in range(150)]
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cpu", progress=False) as llm:
        for wanted in (0, 149):
            job = llm.submit(tokens, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
            job.next_event()
            assert job.cached_tokens == wanted == job.completion().cached_tokens
