"""A tiny LongRoPE model, and what it must answer by the oracle."""

from __future__ import annotations

from pathlib import Path

import gguf
import limits
import numpy as np
import requantize
from oracle.numpy_engine import NumpyEngine

from worker_orcd import LLM, SamplingParams
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

#: positions from which on a sequence is a long one
ORIG_CONTEXT = 64
KEY = "phi3.rope.scaling.original_context_length"


def write(source: Path, target: Path) -> Path:
    """A copy of a phi3 file with divisors of 1 for short sequences and of up to 16 for long ones."""
    with ModelFile(source) as model:
        n_rot = model.get_int("phi3.rope.dimension_count", 2, 1024)
        tensors = {name: (t.shape, t.type_id, np.frombuffer(model.view(name), np.uint8).copy())
                   for name, t in model.tensors.items()}  # fmt: skip
        for name, factors in (("short", np.ones(n_rot // 2)), ("long", np.linspace(1, 16, n_rot // 2))):
            tensors[f"rope_factors_{name}.weight"] = ((n_rot // 2,), 0, factors.astype(np.float32).view(np.uint8))
        writer = gguf.GGUFWriter(target, model.arch)
        requantize.copy_metadata(model, writer)
        writer.kv_data[0][KEY].value = ORIG_CONTEXT
        for name, (shape, type_id, data) in tensors.items():
            rows = data.reshape(*reversed(shape[1:]), -1)
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType(type_id))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def exact_logits(model: ModelFile, ids: list[int]) -> np.ndarray:
    """float64 [n, n_vocab] of all positions of one sequence."""
    the_plan = plan.build(model)
    assert the_plan.rope_limits == (ORIG_CONTEXT,)
    oracle = NumpyEngine(model, the_plan)
    oracle.rope_tables[0] = 1 if len(ids) > ORIG_CONTEXT else 0
    n = len(ids)
    return oracle.run(ids, np.arange(n), np.zeros(n, int), np.arange(n))


def exact_next(model: ModelFile, ids: list[int]) -> np.ndarray:
    """float64 [n, n_vocab]: row i is the last one of `exact_logits` of ids[0..i], which no later token changes."""
    return np.concatenate([exact_logits(model, ids[:ORIG_CONTEXT]), exact_logits(model, ids)[ORIG_CONTEXT:]])


def check(path: Path, device: str) -> None:
    """Teacher-forced and greedy across the limit, alone and in a crowd."""
    rng = np.random.default_rng(5)
    with LLM(path, device=device, context_length=256, progress=False) as llm, ModelFile(path) as model:
        ids = rng.integers(3, llm.info.n_vocab, ORIG_CONTEXT + 20).tolist()
        for n in (ORIG_CONTEXT - 1, ORIG_CONTEXT, ORIG_CONTEXT + 1, ORIG_CONTEXT + 20):
            exact = exact_logits(model, ids[:n])
            error = ((llm.logits(ids[:n]) - exact) ** 2).mean() / (exact**2).mean()
            assert error < limits.LONG_ROPE_NMSE, f"{n} positions: NMSE {error:.1e}"
        short, long = exact_logits(model, ids[:ORIG_CONTEXT]), exact_logits(model, ids[: ORIG_CONTEXT + 1])
        assert ((short - long[:-1]) ** 2).mean() / (short**2).mean() > 1e-3, "the divisors make no difference"

        # what goes by the tokens generated so far goes by all of them, those before the limit too
        least = SamplingParams(max_tokens=40, temperature=0.9, seed=2, min_tokens=39, stop_token_ids=tuple(range(128)),
                               frequency_penalty=2.0)  # fmt: skip
        prompts = [ids[:50], ids[:30]]
        crowd = [c.token_ids for c in llm.generate(prompts, least)]
        assert [llm.generate([p], least)[0].token_ids for p in prompts] == crowd
        for answer in crowd:
            assert len(answer) >= 39 and min(answer[:39]) >= 128, "no stop token before there are 39"

        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        prompts = [ids[:50], ids[:ORIG_CONTEXT], ids[: ORIG_CONTEXT + 1], ids[5:70], ids[:10]]
        alone = [llm.generate([p], params)[0].token_ids for p in prompts]
        assert [c.token_ids for c in llm.generate(prompts, params)] == alone
        for prompt, answer in zip(prompts[:3], alone, strict=False):
            exact = exact_next(model, [*prompt, *answer])
            for i, token in enumerate(answer):
                best = exact[len(prompt) + i - 1]
                assert best.max() - best[token] < limits.LONG_ROPE_MARGIN * best.std(), (
                    f"prompt of {len(prompt)}, token {i}"
                )
