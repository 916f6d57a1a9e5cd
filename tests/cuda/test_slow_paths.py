"""Slow paths: what slows a matrix down is read off its launch, named once, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.fake_file import FakeFile

from worker_orcd.cuda import layout
from worker_orcd.cuda.slow_paths import SMEM_LARGE, SlowPath, slow_paths
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.models.ops import ExpertMatMul, MatMul


def golden(goldens_dir, name):
    with ModelFile(str(goldens_dir / f"{name}.gguf")) as mf:
        return plan.build(mf)


def widened(p: plan.Plan, name: str, k: int, type_name: str | None = None) -> plan.Plan:
    """The plan with rows of `k` columns in the weight `name`, or in all that end so."""
    weights = {
        w.name: replace(w, shape=(k, *w.shape[1:]), type_id=quants.BY_NAME[type_name].id if type_name else w.type_id)
        if w.name.endswith(name)
        else w
        for w in p.weights.values()
    }
    return replace(p, weights=weights)


def test_a_model_of_common_types_and_sizes_has_none(goldens_dir):
    for name in ("llama-Q4_0", "qwen2-Q8_0", "phi3-Q4_K_M", "gpt-oss-MXFP4"):
        assert slow_paths(golden(goldens_dir, name)) == ()


def test_unquantized_types_are_named(goldens_dir):
    p = golden(goldens_dir, "llama-F16")
    (found,) = slow_paths(p)
    assert "decodes weights before" in found.reason and found.types == ("F16",)
    multiplied = {op.weight for op in p.ops if isinstance(op, MatMul)}
    assert sum(n for _, n in found.tensors) == len(multiplied)
    assert ("blk.*.attn_q.weight", p.n_layer) in found.tensors


@pytest.mark.parametrize(("k", "is_long"), [(4864, False), (5120, True), (5376, True), (8192, True), (14336, True)])
def test_long_rows_are_named(k, is_long, goldens_dir):
    p = widened(golden(goldens_dir, "llama-Q4_0"), "ffn_down.weight", k)
    found = slow_paths(p)
    assert bool(found) == is_long
    if is_long:
        assert [str(path) for path in found] == [
            f"Q4_0 blk.*.ffn_down.weight (2): rows of {k:,} columns are too long for a block to take at once (kernels "
            "decode_*_long)"
        ]


def test_long_rows_of_experts_are_named(goldens_dir):
    p = golden(goldens_dir, "gpt-oss-MXFP4")
    name = next(op.weight for op in p.ops if isinstance(op, ExpertMatMul))
    (found,) = slow_paths(widened(p, name, 8192))
    assert found.tensors == ((name.replace("blk.0.", "blk.*."), 1),) and "expert_few_*_long" in found.reason


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "F32"])
def test_little_shared_memory_is_named_where_it_costs_warps(type_name, goldens_dir):
    type_id = quants.BY_NAME[type_name].id
    for k in (1024, 4096, 16384):
        p = widened(golden(goldens_dir, "llama-Q4_0"), "blk.1.ffn_down.weight", k, type_name)
        large, small = (layout.decode_launch(type_id, k, 256, 1, n_sm=132, max_smem=m) for m in (SMEM_LARGE, 50_000))
        found = [path for path in slow_paths(p, 50_000) if "50,000 bytes" in path.reason and type_name in path.types]
        assert bool(found) == ((large.kernel, large.block) != (small.kernel, small.block)), k
        assert not [path for path in slow_paths(p) if "fewer warps" in path.reason]


def test_rows_that_no_kernel_holds_are_refused():
    p = widened(plan.build(FakeFile()), "blk.1.ffn_down.weight", 1 << 20)
    with pytest.raises(ModelLoadError, match=r"'blk\.1\.ffn_down\.weight': rows of 1,048,576 .*--device cpu") as e:
        slow_paths(p)
    assert e.value.fields["field"] == "blk.1.ffn_down.weight"


def test_several_types_of_one_input_are_named(goldens_dir):
    p = golden(goldens_dir, "qwen2-Q4_K_M")
    assert slow_paths(p) == ()  # there is a kernel for its two types
    names = [name for name, w in p.weights.items() if "attn_v." in name and quants.TYPES[w.type_id].name == "Q6_K"]
    others = {name: replace(p.weights[name], type_id=quants.BY_NAME["Q5_K"].id) for name in names}
    p = replace(p, weights={**p.weights, **others})
    (found,) = slow_paths(p)
    assert "several types" in found.reason and len(found.types) == 2
    assert [name for name, _ in found.tensors] == [f"blk.*.attn_{x}.weight" for x in "qkv"]
    assert slow_paths(p, fuse=False) == ()


def test_a_path_as_text():
    path = SlowPath("it is so", ("Q4_0", "Q8_0"), (("a", 1), ("blk.*.b", 12)))
    assert str(path) == "Q4_0, Q8_0 a, blk.*.b (12): it is so"
