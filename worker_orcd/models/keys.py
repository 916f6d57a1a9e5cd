"""What becomes of every metadata key that can change numbers: one table.

A key is applied (a hyperparameter holds what it says), harmless (nothing that is computed here depends on it), or
refused unless its value changes nothing. A key of the architecture's namespace that the table does not name is refused,
as a tensor is that no op reads: what a file asks for is done or said not to be. docs/gguf.md shows the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker_orcd.errors import excerpt, quoted
from worker_orcd.models.rope import YARN_KEYS

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile
    from worker_orcd.models.hparams import Arch, HParams

#: elements of an array that are looked at: of a value for each layer or each section
_MAX_ELEMENTS = 4096
#: of those, elements that a message shows
_MAX_SHOWN = 8


@dataclass(frozen=True)
class Applied:
    """The key is read; `field` of `HParams` or `Plan` depends on it."""

    field: str


@dataclass(frozen=True)
class Harmless:
    """Nothing that is computed depends on the key; `why`."""

    why: str


@dataclass(frozen=True)
class Unless:
    """The key is refused, unless its value (of an array: every element) is one of those that change nothing.

    Attributes:
        values: what changes nothing, for every model.
        of: what changes nothing in a model of these hyperparameters.
    """

    values: tuple[bool | int | float | str, ...] = ()
    of: Callable[[HParams], object] | None = None

    def passes(self, hp: HParams, value: object) -> bool:
        """Whether a file may hold `value`."""
        if isinstance(value, list):
            return all(self.passes(hp, element) for element in value)
        return any(_same(value, neutral) for neutral in self.neutral(hp))

    def neutral(self, hp: HParams) -> tuple[object, ...]:
        """The values that change nothing in a model of these hyperparameters."""
        return self.values if self.of is None else (*self.values, self.of(hp))


@dataclass(frozen=True)
class SameLayers(Unless):
    """A sliding-window pattern, refused unless it says what the row says: layers slide, or every n-th does not."""

    def passes(self, hp: HParams, value: object) -> bool:
        """As in `Unless`; the pattern is one truth a layer, or the number n (0: every layer slides, 1: none)."""
        slides = [hp.layer_window(layer) > 0 for layer in range(hp.n_layer)]
        if isinstance(value, list):
            return not any(slides) or [bool(v) for v in value] == slides
        if not isinstance(value, int) or value < 0:
            return False
        return not any(slides) or slides == [value == 0 or i % value < value - 1 for i in range(hp.n_layer)]


Rule = Applied | Harmless | Unless

_OFF = Unless((0,))
_OFF_OR_ONE = Unless((0, 1))
_NO_ROTATION = "positions are learned, nothing turns"

#: keys below the architecture's name of which every row says the same
_COMMON: dict[str, Rule] = {
    # sizes
    "block_count": Applied("n_layer"),
    "context_length": Applied("context_length"),
    "embedding_length": Applied("n_embd"),
    "embedding_length_out": Unless((0,), lambda hp: hp.n_embd),
    "vocab_size": Applied("n_vocab"),
    "features_length": _OFF,
    "attention.head_count": Applied("n_head"),
    "attention.head_count_kv": Applied("n_head_kv"),
    "attention.key_length": Applied("head_dim"),
    "attention.value_length": Applied("head_dim"),
    "attention.key_length_swa": Unless((), lambda hp: hp.head_dim),
    "attention.value_length_swa": Unless((), lambda hp: hp.head_dim),
    "attention.head_dim": Unless((), lambda hp: hp.head_dim),  # Ollama's converter, beside key_length
    # attention
    "attention.causal": Unless((True,)),
    "attention.scale": Unless((0,), lambda hp: hp.head_dim**-0.5),
    "attention.output_scale": _OFF_OR_ONE,
    "attention.clamp_kqv": _OFF,
    "attention.max_alibi_bias": _OFF,
    "attention.sliding_window": Applied("window"),
    "attention.sliding_window_pattern": SameLayers(),
    "attention.temperature_length": _OFF,
    "attention.temperature_scale": _OFF,
    "attention.shared_kv_layers": _OFF,
    "attention.group_norm_epsilon": _OFF,
    "attention.group_norm_groups": _OFF,
    "attention.relative_buckets_count": _OFF,
    "attn_logit_softcapping": _OFF,
    "full_attention_interval": _OFF_OR_ONE,
    # the residual stream and the logits
    "embedding_scale": _OFF_OR_ONE,
    "residual_scale": _OFF_OR_ONE,
    "logit_scale": _OFF_OR_ONE,
    "final_logit_softcapping": _OFF,
    "swin_norm": _OFF,
    "swiglu_clamp_exp": _OFF,
    "swiglu_clamp_shexp": _OFF,
    "activation_sparsity_scale": _OFF,
    "rescale_every_n_layers": _OFF,
    "embedding_length_per_layer_input": _OFF,
    "nextn_predict_layers": _OFF,
    "n_deepstack_layers": _OFF,
    # experts
    "router_logit_softcapping": _OFF,
    "expert_shared_count": _OFF,
    "expert_group_count": _OFF_OR_ONE,
    "expert_group_used_count": _OFF_OR_ONE,
    "expert_group_scale": _OFF_OR_ONE,
    "expert_weights_scale": _OFF_OR_ONE,
    "experts_per_group": _OFF_OR_ONE,
    "moe_every_n_layers": _OFF_OR_ONE,
    "interleave_moe_layer_step": _OFF_OR_ONE,
    "moe_latent_size": _OFF,
    "leading_dense_block_count": _OFF,
    "expert_chunk_feed_forward_length": _OFF,
    # rotation
    "rope.dimension_sections": _OFF,
    "rope.mrope_section": _OFF,  # the same by Ollama's converter, which writes it empty too
    "rope.dimension_count_swa": Unless((), lambda hp: hp.n_rot),
    "rope.freq_base_swa": Unless((), lambda hp: hp.rope_theta),
    "rope.scaling.alpha": _OFF_OR_ONE,
    "rope.scaling.finetuned": Harmless("says how the model was trained"),
    "rope.scaling.yarn_ext_factor": Unless((1,)),
    "rope.scaling.yarn_log_multiplier": _OFF,
    # what other programs make of the model
    "decoder_start_token_id": Unless((-1, 2**32 - 1)),
    "pooling_type": Harmless("says how embeddings are made of hidden states; none are given"),
    "classifier.output_labels": Harmless("names classes; tensors of a classifier are refused"),
    "use_parallel_residual": Harmless("of GPT-NeoX; converters of 2023 and early 2024 wrote true into every file"),
}

#: keys of kinds of models that are not here
_OF_OTHER_KINDS: dict[str, Rule] = dict.fromkeys(
    (
        "decoder_block_count", "altup.active_idx", "altup.num_inputs", "time_mix_extra_dim", "time_decay_extra_dim",
        "token_shift_count", "dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out",
        *(f"attention.{key}" for key in (
            "q_lora_rank", "kv_lora_rank", "decay_lora_rank", "iclr_lora_rank", "value_residual_mix_lora_rank",
            "gate_lora_rank", "key_length_mla", "value_length_mla", "indexer.head_count", "indexer.key_length",
            "indexer.top_k")),
        *(f"ssm.{key}" for key in (
            "conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count", "dt_b_c_rms")),
        "kda.head_dim", "wkv.head_size", "posnet.embedding_length", "posnet.block_count", "convnext.embedding_length",
        "convnext.block_count", "shortconv.l_cache",
    ),
    _OFF,
)  # fmt: skip

#: keys without the architecture's name that can change numbers; "quantization_version" only where a type is quantized
_GENERAL: dict[str, Rule] = {
    "general.quantization_version": Unless((2,)),
    "diffusion.shift_logits": _OFF,
    "xielu.alpha_p": Unless(),
    "xielu.alpha_n": Unless(),
    "xielu.beta": Unless(),
    "xielu.eps": Unless(),
    **{
        f"general.sampling.{key}": Harmless("what the file recommends to requests; no logit depends on it")
        for key in ("temp", "top_k", "top_p", "min_p", "penalty_repeat", "penalty_last_n")
    },
    **{
        f"general.sampling.{key}": Harmless("recommends a sampler, or an order of samplers, that is not here")
        for key in ("sequence", "xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta")
    },
}


def rules(row: Arch) -> dict[str, Rule]:
    """The rule of every key that is known, below the name of the row's architecture; of others: refused."""
    eps, other_eps = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    if row.norm == "layer":
        eps, other_eps = other_eps, eps
    table = (
        _COMMON
        | _OF_OTHER_KINDS
        | {eps: Applied("norm_eps"), other_eps: Harmless("of a norm that the architecture has not")}
    )
    # interleaved rows of q and k, as the first converters called them
    table["tensor_data_layout"] = Unless(("Meta AI original pth",) if row.rope_type == "interleaved" else ())
    return table | _expert_rules(row.ffn == "moe") | _rope_rules(bool(row.rope_type))


def _expert_rules(moe: bool) -> dict[str, Rule]:
    if moe:
        return {
            "feed_forward_length": Harmless("every layer has experts, of expert_feed_forward_length"),
            "expert_count": Applied("n_expert"),
            "expert_used_count": Applied("n_expert_used"),
            "expert_feed_forward_length": Applied("n_ff"),
            "expert_shared_feed_forward_length": Harmless("expert_shared_count says that there are none"),
            "expert_gating_func": Unless((0, 3)),  # unset, softmax over the chosen
            "expert_weights_norm": Harmless("a softmax over the chosen has the sum 1"),
        }
    return {
        "feed_forward_length": Applied("n_ff"),
        "expert_count": _OFF,
        "expert_used_count": _OFF,
        "expert_feed_forward_length": _OFF,
        "expert_shared_feed_forward_length": _OFF,
        "expert_gating_func": _OFF,
        "expert_weights_norm": _OFF,
    }


def _rope_rules(rotates: bool) -> dict[str, Rule]:
    if rotates:
        scaling: dict[str, Rule] = dict.fromkeys(("type", "factor", "original_context_length"), Applied("inv_freq"))
        scaling |= dict.fromkeys(YARN_KEYS, Applied("inv_freq"))
        scaling |= dict.fromkeys(("attn_factor", "yarn_attn_factor"), Applied("rope_mscale"))
        own: dict[str, Rule] = {
            "rope.dimension_count": Applied("n_rot"),
            "rope.freq_base": Applied("rope_theta"),
            "rope.scale_linear": Applied("inv_freq"),
        }
    else:
        scaling = {"type": Unless(("none", "linear")), "original_context_length": Harmless(_NO_ROTATION)}
        scaling |= dict.fromkeys(("factor", "attn_factor", "yarn_attn_factor"), _OFF_OR_ONE)
        scaling |= {key: Unless((0, usual)) for key, usual in YARN_KEYS.items()}
        own = dict.fromkeys(("rope.dimension_count", "rope.freq_base"), Harmless(_NO_ROTATION))
        own["rope.scale_linear"] = _OFF_OR_ONE
    return own | {f"rope.scaling.{key}": rule for key, rule in scaling.items()}


def check(mf: ModelFile, row: Arch, hp: HParams) -> None:
    """Refuse a key that would have to change numbers and does not.

    Raises:
        ModelLoadError: names the first such key and its value.
    """
    table, prefix = rules(row), f"{row.name}."
    for key in mf.metadata:
        inside = key.startswith(prefix)
        rule = table.get(key.removeprefix(prefix)) if inside else _GENERAL.get(key)
        if not isinstance(rule, Unless) and (rule is not None or not inside):
            continue
        if key == "general.quantization_version" and not mf.quantized:
            continue
        value = _value(mf, key)
        if rule is None:
            raise mf.error(key, f"is {_shown(value)}: architecture {row.name} has no such key, it would have no effect")
        if not rule.passes(hp, value):
            neutral = " or ".join(_shown(v) for v in rule.neutral(hp))
            only = f" (only {neutral} would change nothing)" if neutral else ""
            raise mf.error(key, f"is {_shown(value)}, which is not supported in architecture {row.name}{only}")


def _value(mf: ModelFile, key: str) -> object:
    """The value of a key; of an array that is too long to be one value a layer only what it is, as text."""
    kind = mf.metadata.value_type(key)
    if kind.startswith("array") and mf.metadata.array_len(key) > _MAX_ELEMENTS:
        return f"{kind} of {mf.metadata.array_len(key)}"
    value: object = mf.metadata[key]
    return value


def _same(value: object, neutral: object) -> bool:
    """Whether two scalars are the same number (to the precision of a float32) or the same text."""
    if isinstance(value, int | float) and isinstance(neutral, int | float):
        return math.isclose(value, neutral, rel_tol=1e-6)
    return value == neutral


def _shown(value: object) -> str:
    if isinstance(value, list):
        return excerpt(f"[{', '.join(_shown(v) for v in value[:_MAX_SHOWN])}{', ...' * (len(value) > _MAX_SHOWN)}]")
    if isinstance(value, str):
        return quoted(value)
    return f"{value:.7g}" if isinstance(value, float) else repr(value)
