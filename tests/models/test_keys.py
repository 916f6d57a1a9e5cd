"""The table of metadata keys: it names all keys of the format, and does with each what it says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import gguf
import pytest
from helpers import gguf_forge as g
from helpers.fake_file import FakeFile
from helpers.golden_forge import take_apart

from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import keys, plan, registry
from worker_orcd.models.hparams import HParams

ROOT = Path(__file__).resolve().parents[2]
ROWS = list(registry.ROWS.values())
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)

#: a reference file of each architecture
FILES = {
    "llama": "llama-Q4_0", "qwen2": "qwen2-Q8_0", "qwen3": "arch/qwen3-F16", "phi3": "phi3-Q8_0", "gpt2": "gpt2-Q8_0",
    "gpt-oss": "gpt-oss-MXFP4",
}  # fmt: skip


def keys_of_the_format(owner: type = gguf.constants.Keys) -> set[str]:
    """Every key of the format that is written below an architecture's name, without it."""
    found: set[str] = set()
    for name, value in vars(owner).items():
        if isinstance(value, type):
            found |= keys_of_the_format(value)
        elif not name.startswith("_") and isinstance(value, str) and value.startswith("{arch}."):
            found |= {value.removeprefix("{arch}.").replace("{dense}", dense) for dense in ("dense_2", "dense_3")}
    return found


def fake(name: str, **changes: object) -> FakeFile:
    more = {"attention__layer_norm_epsilon": 1e-5}
    if registry.ROWS[name].ffn == "moe":
        more |= {"expert_count": 8, "expert_used_count": 4, "expert_feed_forward_length": 96}
    return FakeFile(name, **(more | changes))


@every_row
def test_every_key_of_the_format_has_a_rule(row):
    known, table = keys_of_the_format(), keys.rules(row)
    assert len(known) > 100
    assert known - table.keys() == set()
    # beside the format's: an old name, and two that only Ollama's converter writes
    assert table.keys() - known == {"rope.scale_linear", "attention.head_dim", "rope.mrope_section"}
    fields = {f.name for owner in (HParams, plan.Plan) for f in dataclasses.fields(owner)}
    assert {rule.field for rule in table.values() if isinstance(rule, keys.Applied)} <= fields
    assert all(rule.why for rule in table.values() if isinstance(rule, keys.Harmless))


class Watched(FakeFile):
    """Notes which keys are read."""

    def get_int(self, key, lo, hi, default=None):
        self.read.add(key)
        return super().get_int(key, lo, hi, default)

    def get_float(self, key, lo, hi, default=None):
        self.read.add(key)
        return super().get_float(key, lo, hi, default)

    def get_str(self, key, default=None):
        self.read.add(key)
        return super().get_str(key, default)


@every_row
def test_applied_keys_are_those_that_are_read(row):
    watched = Watched(row.name, **{k.removeprefix(f"{row.name}.").replace(".", "__"): v
                                   for k, v in fake(row.name).metadata.items()})  # fmt: skip
    watched.read = set()
    if row.rope_type:
        watched.metadata[f"{row.name}.rope.scaling.type"] = "yarn"
    if not row.rope_type:
        watched.tensors["position_embd.weight"] = watched.tensors["token_embd.weight"]
    registry.hparams_of(watched)
    with pytest.raises(ModelLoadError):  # the tensors are those of llama; vocab_size is read before it finds out
        watched.tensors.pop("blk.1.attn_norm.weight")
        plan.build(watched)
    applied = {f"{row.name}.{key}" for key, rule in keys.rules(row).items() if isinstance(rule, keys.Applied)}
    assert watched.read == applied


def others(rule: keys.Unless, hp: HParams) -> list[object]:
    """Values that a rule must refuse."""
    neutral = rule.neutral(hp)
    tried = (0.37, 7, -3, "text", [0, 5], [0.3], math.nan, math.inf, 1 << 63, True)
    return [v for v in tried if not any(keys._same(v, n) for n in neutral)]


@every_row
def test_a_key_that_is_not_applied_is_refused_by_name_unless_it_changes_nothing(row):
    hp = registry.hparams_of(fake(row.name))
    for key, rule in keys.rules(row).items():
        if not isinstance(rule, keys.Unless) or isinstance(rule, keys.SameLayers):
            continue
        name = key.replace(".", "__")
        for value in rule.neutral(hp):
            assert registry.hparams_of(fake(row.name, **{name: value})) == hp
            assert registry.hparams_of(fake(row.name, **{name: [value, value]})) == hp
        for value in others(rule, hp):
            with pytest.raises(ModelLoadError, match=rf"{row.name}.{key} is ") as caught:
                registry.hparams_of(fake(row.name, **{name: value}))
            assert "not supported" in caught.value.message and caught.value.fields["field"] == f"{row.name}.{key}"


@every_row
def test_harmless_keys_change_nothing(row):
    hp = registry.hparams_of(fake(row.name))
    for key, rule in keys.rules(row).items():
        if isinstance(rule, keys.Harmless) and key != "rope.scaling.original_context_length":
            assert registry.hparams_of(fake(row.name, **{key.replace(".", "__"): 3})) == hp


@every_row
def test_a_key_that_nobody_knows_is_refused(row, goldens_dir, tmp_path):
    forge = take_apart(goldens_dir / f"{FILES[row.name]}.gguf", vocabulary=False)
    forge.put("other.attention.gain", g.F32, 2.0).put("general.surprise", g.STR, "x")
    forge.put("quantize.imatrix.file", g.STR, "x")
    for key in ("attention.gain", "a" * 500, "rope"):
        changed = dataclasses.replace(forge, keys=dict(forge.keys)).put(f"{row.name}.{key}", g.STR, "long \n" * 100)
        (tmp_path / "f.gguf").write_bytes(changed.build())
        with ModelFile(tmp_path / "f.gguf") as mf, pytest.raises(ModelLoadError, match="no such key") as caught:
            plan.build(mf)
        message = caught.value.fields["reason"]
        assert message.isprintable() and len(message) < 300 and f"{row.name}.{key}"[:60] in message
        assert caught.value.fields["offset"] == mf.metadata.offset(f"{row.name}.{key}")
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf:
        plan.build(mf)


def saved_by_llama_cpp(forge: g.Forge, arch: str) -> g.Forge:
    """Add what llama.cpp writes when it saves a model: every hyperparameter it has, at its default."""
    for key in ("leading_dense_block_count", "expert_shared_count", "time_mix_extra_dim", "time_decay_extra_dim",
                "rescale_every_n_layers", "attention.q_lora_rank", "attention.kv_lora_rank",
                "attention.relative_buckets_count", "ssm.inner_size", "ssm.conv_kernel", "ssm.state_size",
                "ssm.time_step_rank", "wkv.head_size", "pooling_type"):  # fmt: skip
        forge.put(f"{arch}.{key}", g.U32, 0)
    for key in ("expert_weights_scale", "logit_scale", "residual_scale", "embedding_scale", "attention.max_alibi_bias",
                "attention.clamp_kqv", "attention.scale", "rope.scaling.yarn_log_multiplier"):  # fmt: skip
        forge.put(f"{arch}.{key}", g.F32, 0.0)
    for key in ("use_parallel_residual", "swin_norm", "ssm.dt_b_c_rms", "rope.scaling.finetuned"):
        forge.put(f"{arch}.{key}", g.BOOL, False)
    forge.put(f"{arch}.attention.causal", g.BOOL, True)
    forge.put(f"{arch}.decoder_start_token_id", g.U32, 2**32 - 1)
    for key, usual in (
        ("attention.layer_norm_epsilon", 1e-5),
        ("attention.layer_norm_rms_epsilon", 1e-5),
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 0.0),
        ("rope.scaling.attn_factor", 1.0),
    ):
        name = f"{arch}.{key}"
        if name not in forge.keys:
            forge.put(name, g.STR if isinstance(usual, str) else g.F32, usual)
    return forge


@pytest.mark.parametrize("arch", FILES)
def test_what_writers_add_at_its_neutral_value_loads(arch, goldens_dir, tmp_path):
    path = goldens_dir / f"{FILES[arch]}.gguf"
    forge = saved_by_llama_cpp(take_apart(path, vocabulary=False), arch)
    forge.put(f"{arch}.use_parallel_residual", g.BOOL, True)  # converters of 2023 and early 2024, in every file
    forge.put_array(f"{arch}.rope.mrope_section", g.I32, [])  # Ollama's converter, of a rope_type "default"
    if arch == "llama":
        forge.put("llama.attention.head_dim", g.U32, 64)
        forge.put("llama.tensor_data_layout", g.STR, "Meta AI original pth").put("llama.rope.scale_linear", g.F32, 1.0)
        forge.put("llama.attention.sliding_window", g.U32, 4096)
    (tmp_path / "f.gguf").write_bytes(forge.build())
    with ModelFile(tmp_path / "f.gguf") as mf, ModelFile(path) as plain:
        assert plan.build(mf) == plan.build(plain)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_window_that_would_mask_is_refused_where_no_layer_slides(arch):
    file = fake(arch, attention__sliding_window=100)  # of 128 positions
    with pytest.raises(ModelLoadError, match=rf"{arch}.attention.sliding_window is 100.*context of at most 100"):
        registry.hparams_of(file)
    assert registry.hparams_of(file, 100).window == 0
    for window in (0, 128, 2**32 - 1, (1 << 63) - 1):
        assert registry.hparams_of(fake(arch, attention__sliding_window=window)).window == 0
    with pytest.raises(ModelLoadError, match="sliding_window"):
        registry.hparams_of(fake(arch, attention__sliding_window=-1))


@pytest.mark.parametrize(
    ("arch", "good", "bad"),
    [
        ("gpt-oss", (2, [True, False], [1, 0]), (0, 1, 3, [True, True], [False, True], [True], -2, "even")),
        ("phi3", (0, 5, [True, True]), (1, 2, [True, False], [True] * 3)),
        ("llama", (0, 1, 2, [True, False]), (-1, "text")),
    ],
)
def test_a_window_pattern_must_be_that_of_the_architecture(arch, good, bad):
    window = {} if arch == "llama" else {"attention__sliding_window": 16}
    for pattern in good:
        registry.hparams_of(fake(arch, attention__sliding_window_pattern=pattern, **window))
    for pattern in bad:
        with pytest.raises(ModelLoadError, match="sliding_window_pattern"):
            registry.hparams_of(fake(arch, attention__sliding_window_pattern=pattern, **window))


def test_general_keys_that_change_numbers(goldens_dir, tmp_path):
    def load(name: str, key: str, kind: int, value: object) -> None:
        forge = take_apart(goldens_dir / f"{name}.gguf", vocabulary=False).put(key, kind, value)
        (tmp_path / "f.gguf").write_bytes(forge.build())
        with ModelFile(tmp_path / "f.gguf") as mf:
            plan.build(mf)

    load("llama-F16", "general.quantization_version", g.U32, 1)  # nothing is quantized
    load("llama-Q4_0", "general.quantization_version", g.U32, 2)
    load("llama-F16", "diffusion.shift_logits", g.BOOL, False)
    for name, key, kind, value in (
        ("llama-Q4_0", "general.quantization_version", g.U32, 1),
        ("llama-F16", "diffusion.shift_logits", g.BOOL, True),
        ("llama-F16", "xielu.alpha_p", g.F32, 0.0),
    ):
        with pytest.raises(ModelLoadError, match=rf"{key} is "):
            load(name, key, kind, value)


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "gguf.md").read_text()
    for row in ROWS:
        for key, rule in keys.rules(row).items():
            assert f"`{key}`" in page, f"docs/gguf.md lacks {key}: {rule}"
