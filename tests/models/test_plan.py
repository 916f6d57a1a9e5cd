"""Plans of the families (llama, qwen, phi3, gpt2), composed of models.blocks: the ops of each architecture, and what a
file must not say (hparams, tensors)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.fake_file import FakeFile

from worker_orcd.engine import kv_blocks
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan, registry
from worker_orcd.models.ops import MatMul, Rope, View

GOLDENS = [
    "llama-Q4_0", "llama-Q4_K_M", "qwen2-Q8_0", "phi3-Q8_0", "phi3-swa-Q8_0", "gpt2-Q8_0", "gpt-oss-MXFP4",
]  # fmt: skip


def test_plan_of_llama_names_every_record_once():
    p = plan.build(FakeFile())
    names = [op.name for op in p.ops]
    assert len(names) == len(set(names))
    assert names[0] == "embed" and names[-1] == "logits"
    assert p.rope_limits == () and p.rope_table(1 << 20) == 0
    assert isinstance(p.ops[-1], MatMul) and p.ops[-1].weight == "token_embd.weight"
    assert p.kv_groups == (plan.KvGroup(0, (0, 1)),)
    assert kv_blocks.position_bytes(p) == 2 * 32 * 2


@pytest.mark.goldens
@pytest.mark.parametrize("name", GOLDENS)
def test_every_view_lies_in_its_buffer(name, goldens_dir):
    with ModelFile(str(goldens_dir / f"{name}.gguf")) as mf:
        p = plan.build(mf)
    for op in p.ops:
        for value in vars(op).values():
            if isinstance(value, View):
                assert value.offset >= 0 and value.offset + value.width <= p.buffers[value.buf].width


def test_window_covering_the_context_is_no_window(goldens_dir):
    with ModelFile(str(goldens_dir / "phi3-Q8_0.gguf")) as mf:
        assert plan.build(mf).kv_groups[0].window == 0
    with ModelFile(str(goldens_dir / "phi3-swa-Q8_0.gguf")) as mf:
        assert plan.build(mf).kv_groups[0].window == 40
    with ModelFile(str(goldens_dir / "gpt-oss-MXFP4.gguf")) as mf:
        assert [g.window for g in plan.build(mf).kv_groups] == [0, 24]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"block_count": 0}, "block_count"),
        ({"block_count": 513}, "block_count"),
        ({"attention__head_count": 0}, "head_count"),
        ({"attention__head_count_kv": 3}, "head_count_kv"),
        ({"attention__head_count_kv": 8}, "head_count_kv"),
        ({"rope__dimension_count": 15}, "dimension_count"),
        ({"rope__dimension_count": 32}, "dimension_count"),
        ({"expert_count": 4}, "expert_count"),
        ({"context_length": 0}, "context_length"),
        ({"context_length": 1 << 40}, "context_length"),
        ({"vocab_size": 99}, "vocab_size"),
        ({"rope__scaling__type": "ntk"}, "rope.scaling.type"),
        ({"attention__value_length": 8}, "value_length"),
    ],
)
def test_hyperparameters_out_of_line_are_named(change, word):
    with pytest.raises(ModelLoadError, match=word):
        plan.build(FakeFile(**change))


def test_tensors_missing_extra_and_misshapen_are_named():
    mf = FakeFile()
    del mf.tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ModelLoadError, match=r"blk.1.ffn_up.weight.*missing"):
        plan.build(mf)
    mf = FakeFile()
    mf.tensors["blk.2.ffn_up.weight"] = mf.tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ModelLoadError, match=r"blk.2.ffn_up.weight.*no place"):
        plan.build(mf)
    mf = FakeFile()
    mf.tensors["blk.0.attn_k.weight"].shape = (64, 64)
    with pytest.raises(ModelLoadError, match=r"blk.0.attn_k.weight.*shape"):
        plan.build(mf)
    mf = FakeFile()
    mf.tensors["output_norm.weight"].type_id = 8
    with pytest.raises(ModelLoadError, match=r"output_norm.weight.*vector"):
        plan.build(mf)


def test_unsupported_architecture_is_named_with_those_supported():
    with pytest.raises(ModelLoadError, match=r"'mamba'.*llama.*gpt-oss"):
        plan.build(FakeFile("mamba"))


def test_rope_scaling_formulas():
    linear = registry.hparams_of(FakeFile(rope__scaling__type="linear", rope__scaling__factor=4.0))
    plain = registry.hparams_of(FakeFile())
    assert np.allclose(np.array(plain.inv_freq) / 4, linear.inv_freq)
    assert plain.inv_freq[1] == pytest.approx(10000 ** (-2 / 16))
    yarn = registry.hparams_of(FakeFile(rope__scaling__type="yarn", rope__scaling__factor=32.0,
                                 rope__scaling__original_context_length=64))  # fmt: skip
    assert yarn.rope_mscale == pytest.approx(0.1 * math.log(32) + 1)
    assert yarn.inv_freq[-1] == pytest.approx(plain.inv_freq[-1] / 32)


def test_gpt_oss_yarn_range_is_not_rounded():
    """The published correction range of gpt-oss: 8.0928 to 17.3980 of 32 pairs, cos and sin times 1.34657."""
    mf = FakeFile("gpt-oss", attention__key_length=64, expert_count=4, expert_used_count=2,
                  expert_feed_forward_length=32, rope__freq_base=150000.0, context_length=131072,
                  rope__scaling__type="yarn", rope__scaling__factor=32.0,
                  rope__scaling__original_context_length=4096)  # fmt: skip
    hp = registry.hparams_of(mf)
    base = [150000 ** (-2 * p / 64) for p in range(32)]
    ramp = [(b - f) / (b - b / 32) for b, f in zip(base, hp.inv_freq, strict=True)]
    assert ramp[8] == 0 and ramp[9] == pytest.approx((9 - 8.0928) / (17.3980 - 8.0928), abs=1e-4)
    assert ramp[17] == pytest.approx((17 - 8.0928) / (17.3980 - 8.0928), abs=1e-4) and ramp[18] == pytest.approx(1)
    assert hp.rope_mscale == pytest.approx(1.34657, abs=1e-5)


def phi3_long(context: int = 131072, original: int = 4096) -> FakeFile:
    """A phi3 file with LongRoPE divisors: 1 for short contexts, 2 for long ones."""
    mf = FakeFile("phi3", context_length=context, rope__scaling__original_context_length=original)
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
            del mf.tensors[f"blk.{layer}.{name}.weight"]
        mf.tensors[f"blk.{layer}.attn_qkv.weight"] = type(mf.tensors["token_embd.weight"])(
            shape=(64, 128), type_id=0, offset=32)  # fmt: skip
        mf.tensors[f"blk.{layer}.ffn_up.weight"].shape = (64, 192)
    mf.data = {}
    for name, value in (("rope_factors_short.weight", 1.0), ("rope_factors_long.weight", 2.0)):
        mf.tensors[name] = type(mf.tensors["token_embd.weight"])(shape=(8,), type_id=0, offset=32)
        mf.data[name] = np.full(8, value, np.float32).tobytes()
    return mf


def test_long_rope_has_frequencies_for_short_and_for_long_sequences():
    """LongRoPE: per-pair divisors, and cos and sin times sqrt(1 + ln(131072/4096) / ln(4096))."""
    hp, the_plan = registry.hparams_of(phi3_long()), plan.build(phi3_long())
    assert hp.inv_freq[1] == pytest.approx(10000 ** (-2 / 16))
    assert np.allclose(np.array(hp.inv_freq) / 2, hp.inv_freq_long)
    assert hp.rope_mscale == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert the_plan.rope_orig_context == hp.rope_orig_context == 4096
    assert [the_plan.rope_table(n) for n in (1, 4096, 4097, 131072)] == [0, 0, 1, 1]
    assert the_plan.rope_limits == (4096,)
    turns = {(op.inv_freq, op.inv_freq_long) for op in the_plan.ops if isinstance(op, Rope)}
    assert turns == {(hp.inv_freq, hp.inv_freq_long)}
    assert [op.out.width for op in the_plan.ops if op.name == "blk.0.attn_qkv"] == [128]


def test_long_rope_divisors_must_be_there_and_positive():
    mf = phi3_long()
    del mf.tensors["rope_factors_short.weight"]
    with pytest.raises(ModelLoadError, match="rope_factors_short"):
        registry.hparams_of(mf)
    mf = phi3_long()
    mf.data["rope_factors_long.weight"] = np.zeros(8, np.float32).tobytes()
    with pytest.raises(ModelLoadError, match="rope_factors_long"):
        registry.hparams_of(mf)
