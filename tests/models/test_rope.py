"""Rotary scaling: every way a file can name one, against published logits, the oracle and formulas written anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import cpu_engines, long_rope
from helpers import gguf_forge as g
from helpers.fake_file import FakeFile
from helpers.golden_forge import take_apart

from worker_orcd.errors import ModelLoadError
from worker_orcd.models import registry
from worker_orcd.models.rope import DIVISOR_TENSORS


def test_short_and_long_sequences_on_the_cpu(goldens_dir, tmp_path):
    long_rope.check(long_rope.write(goldens_dir / "phi3-Q8_0.gguf", tmp_path / "long.gguf"), "cpu")


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean() / (b**2).mean())


class Case:
    """A reference file, changed, and its reference logits."""

    def __init__(self, goldens_dir, tmp_path, name: str) -> None:
        self.forge = take_apart(goldens_dir / f"{name}.gguf", vocabulary=False)
        self.path = tmp_path / "f.gguf"
        with np.load(goldens_dir / f"{name}.npz") as z:
            self.tokens, self.reference = z["tokens"][0], z["logits"][0]

    def logits(self) -> np.ndarray:
        self.path.write_bytes(self.forge.build())
        return cpu_engines.open_engine(self.path).forward(cpu_engines.rows((0, 0, self.tokens)))

    def error(self) -> float:
        return nmse(self.logits(), self.reference)


LIMIT = 1e-5


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_divides_positions(key, goldens_dir, tmp_path):
    """The reference logits are of a model whose positions are divided by 4."""
    case = Case(goldens_dir, tmp_path, "arch/llama-linear-F16")
    assert case.error() < LIMIT
    case.forge.drop("llama.rope.scaling.type", "llama.rope.scaling.factor")
    assert case.error() > 1e-3
    case.forge.put(f"llama.{key}", g.F32, 4.0)
    assert case.error() < LIMIT
    case.forge.put("llama.rope.scaling.factor", g.F32, 4.0).put("llama.rope.scale_linear", g.F32, 4.0)
    assert case.error() < LIMIT


@pytest.mark.parametrize("kind", [None, "none", "linear", "yarn"])
def test_a_factor_of_0_is_none(kind, goldens_dir, tmp_path):
    case = Case(goldens_dir, tmp_path, "llama-F16")
    plain = case.logits()
    case.forge.put("llama.rope.scaling.factor", g.F32, 0.0).put("llama.rope.scale_linear", g.F32, 0.0)
    if kind is not None:
        case.forge.put("llama.rope.scaling.type", g.STR, kind)
    assert nmse(case.logits(), plain) < 1e-9


#: what YaRN multiplies cos and sin by when positions are stretched by 4
YARN_OF_4 = 0.1 * math.log(4) + 1


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"attn_factor": 1.0}, True),
        ({"yarn_attn_factor": YARN_OF_4}, True),
        ({"yarn_attn_factor": 1.0, "attn_factor": YARN_OF_4}, True),
        ({"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_ext_factor": 1.0}, True),
        ({"yarn_beta_fast": 0.0, "yarn_beta_slow": 0.0}, True),  # not set
        ({"yarn_attn_factor": 1.0}, False),
        ({"attn_factor": YARN_OF_4}, False),
        ({"yarn_beta_slow": 3.0}, False),
    ],
)
def test_keys_of_yarn_are_read_as_published_configurations_mean_them(changes, right, goldens_dir, tmp_path):
    case = Case(goldens_dir, tmp_path, "arch/qwen2-yarn-F16")
    for key, value in changes.items():
        case.forge.put(f"qwen2.rope.scaling.{key}", g.F32, value)
    error = case.error()
    print(f"{changes}: NMSE {error:.1e}")
    assert error < LIMIT if right else error > 2 * LIMIT


@pytest.mark.parametrize("kind", ["none", "linear", None])
def test_attn_factor_multiplies_cos_and_sin_without_yarn_too(kind, goldens_dir, tmp_path):
    """q and k by 2 each: the same as q four times as large, which float16 weights hold exactly."""
    case = Case(goldens_dir, tmp_path, "llama-F16")
    plain = case.logits()
    case.forge.put("llama.rope.scaling.attn_factor", g.F32, 2.0)
    if kind is not None:
        case.forge.put("llama.rope.scaling.type", g.STR, kind)
    scaled = case.logits()
    assert nmse(scaled, plain) > 1e-3
    case.forge.drop("llama.rope.scaling.attn_factor")
    for layer in range(2):
        q = case.forge.tensor(f"blk.{layer}.attn_q.weight")
        q.data = (np.frombuffer(q.data, np.float16) * np.float16(4)).tobytes()
    assert nmse(scaled, case.logits()) < 1e-6


def test_divisors_of_llama_3_and_a_linear_factor_both_apply(goldens_dir, tmp_path):
    case = Case(goldens_dir, tmp_path, "arch/llama-rope3-F16")
    assert case.error() < LIMIT
    case.forge.put("llama.rope.scaling.factor", g.F32, 4.0)
    both = case.logits()
    assert nmse(both, case.reference) > 1e-3
    case.forge.drop("llama.rope.scaling.factor")
    divisors = case.forge.tensor("rope_freqs.weight")
    divisors.data = (np.frombuffer(divisors.data, np.float32) * np.float32(4)).tobytes()
    assert nmse(both, case.logits()) < 1e-9


# -- formulas


def published_yarn(base, n_rot, factor, original, fast=32.0, slow=1.0):
    """Peng et al. 2023, eq. 17-20, as the models' reference code rounds it."""
    pairs = np.arange(n_rot // 2)
    freq = base ** (-2.0 * pairs / n_rot)
    turns_at = [n_rot * np.log(original / (2 * np.pi * turns)) / (2 * np.log(base)) for turns in (fast, slow)]
    low, high = max(np.floor(turns_at[0]), 0), min(np.ceil(turns_at[1]), n_rot - 1)
    interpolated = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    return freq * (1 - interpolated) + freq / factor * interpolated


@pytest.mark.parametrize(
    ("factor", "original", "betas"),
    [(4.0, 32768, {}), (32.0, 64, {}), (1.5, 4096, {"yarn_beta_fast": 8.0}),
     (8.0, 512, {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0})],
)  # fmt: skip
def test_yarn_follows_the_published_formula(factor, original, betas):
    named = {"factor": factor, "original_context_length": original, "type": "yarn", **betas}
    hp = registry.hparams_of(FakeFile("qwen2", rope__freq_base=1e6, attention__key_length=64,
                                      **{f"rope__scaling__{k}": v for k, v in named.items()}))  # fmt: skip
    fast_slow = {k.removeprefix("yarn_beta_"): v for k, v in betas.items()}
    assert np.allclose(hp.inv_freq, published_yarn(1e6, 64, factor, original, **fast_slow), rtol=1e-12)
    assert hp.rope_mscale == pytest.approx(0.1 * math.log(factor) + 1)


def scaled(**keys: object):
    tensors = keys.pop("tensors", ())
    above = {"scale_linear", "freq_base"}
    file = FakeFile("phi3", **{f"rope__{k}" if k in above else f"rope__scaling__{k}": v for k, v in keys.items()})
    file.data = {}
    for name in tensors:
        file.tensors[name] = type(file.tensors["token_embd.weight"])(shape=(8,), type_id=0, offset=32)
        file.data[name] = np.full(8, 2, np.float32).tobytes()
    return registry.hparams_of(file)


LONG = ("rope_factors_short.weight", "rope_factors_long.weight")


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        # two that both apply and are not the same
        ({"factor": 4.0, "scale_linear": 2.0}, "rope.scale_linear is 2.0"),
        ({"factor": 1.0, "scale_linear": 2.0}, "rope.scale_linear is 2.0"),
        ({"type": "yarn", "factor": 4.0, "tensors": ["rope_freqs.weight"]}, "rope.scaling.type is 'yarn'"),
        ({"type": "yarn", "factor": 4.0, "tensors": LONG}, "rope.scaling.type is 'yarn'"),
        ({"factor": 4.0, "tensors": LONG}, "rope.scaling.factor is 4.0"),
        ({"scale_linear": 4.0, "tensors": LONG}, "rope.scale_linear is 4.0"),
        ({"tensors": sorted(DIVISOR_TENSORS)}, "rope.scaling.type"),
        # that cannot be applied
        ({"type": "none", "factor": 4.0}, "rope.scaling.factor is 4.0"),
        ({"type": "longrope"}, "rope_factors_long.weight are missing"),
        ({"type": "dynamic", "factor": 4.0}, "'dynamic', which is not supported"),
        ({"type": "", "factor": 4.0}, "'', which is not supported"),
        ({"type": "linear", "factor": 4.0, "yarn_beta_fast": 16.0}, "yarn_beta_fast is 16.0"),
        ({"type": "linear", "factor": 4.0, "yarn_attn_factor": 1.5}, "yarn_attn_factor is 1.5"),
        ({"yarn_beta_slow": 2.0}, "yarn_beta_slow is 2.0"),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
        ({"alpha": 2.0}, "rope.scaling.alpha is 2"),
        ({"attn_factor": 0.0}, "attn_factor"),
        # outside of what the formulas can take
        ({"type": "yarn", "factor": 4.0, "freq_base": 1.0}, "rope.freq_base is 1.0"),
        ({"type": "yarn", "factor": 4.0, "yarn_beta_fast": 1.0, "yarn_beta_slow": 32.0}, "yarn_beta_slow is 32.0"),
        ({"type": "yarn", "factor": 4.0, "yarn_beta_slow": 1e-9}, "yarn_beta_slow"),
        ({"original_context_length": 1, "tensors": LONG}, "original_context_length is 1"),
        ({"factor": 1e-9}, "rope.scaling.factor"),
    ],
)  # fmt: skip
def test_a_scaling_that_cannot_be_applied_is_refused_by_name(keys, names):
    with pytest.raises(ModelLoadError) as caught:
        scaled(**keys)
    assert names in caught.value.message


@pytest.mark.parametrize("kind", [None, "none", "linear", "longrope"])
def test_the_factor_of_long_rope_is_the_files_or_follows_from_its_lengths(kind):
    named = {"original_context_length": 32, "tensors": LONG} | ({} if kind is None else {"type": kind})
    assert scaled(**named).rope_mscale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    assert scaled(**named, attn_factor=1.25, factor=1.0).rope_mscale == 1.25
