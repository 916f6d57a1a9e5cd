"""An architecture's row, and the hyperparameters of a file read by it.

A row says which norm, rotation, attention and feed-forward a model has, how its GGUF names them, and which function
composes them into ops. Values are read through the typed getters of a `ModelFile`, which name the key and the byte
offset when one is out of range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker_orcd.models import ops
from worker_orcd.models.rope import MAX_CONTEXT, RopeTables, rope_tables

if TYPE_CHECKING:
    from worker_orcd.errors import ModelLoadError
    from worker_orcd.gguf.model_file import ModelFile
    from worker_orcd.models.blocks import Builder

MAX_LAYERS = 512
MAX_WIDTH = 1 << 20
MAX_WINDOW = (1 << 63) - 1  # some files write the largest number they have for "no window"

_RULES = ("no", "maybe", "yes")
#: feed-forward -> the activations it can have
_ACTIVATIONS = {
    "glu": ops.GLU_ACTIVATIONS,
    "moe": ops.GLU_ACTIVATIONS,
    "mlp": ops.ACT_ACTIVATIONS,
}
_CHOICES = {
    "norm": ("rms", "layer"), "rope_type": ("interleaved", "neox", ""), "qkv_bias": _RULES, "out_bias": _RULES,
    "ffn_bias": _RULES, "ffn": tuple(_ACTIVATIONS), "window": ("none", "all", "even"),
}  # fmt: skip


@dataclass(frozen=True)
class Arch:
    """One architecture row. Whether q, k and v, or gate and up, are one tensor or several is the file's choice.

    Attributes:
        name: value of `general.architecture` and prefix of its keys.
        compose: writes the model's ops into a builder, from the embedding to the logits.
        norm: "rms" or "layer" (with bias).
        rope_type: "interleaved" (pairs of neighbours) or "neox" (halves); "" = no rotation (learned positions).
        qkv_bias, out_bias, ffn_bias: "no", "maybe" (used where the file has it; of q, k and v all or none) or "yes"
            (required).
        ffn: "glu" (gate, up, down), "mlp" (up, down), "moe".
        act: one of `ops.GLU_ACTIVATIONS`; of an "mlp" one of `ops.ACT_ACTIVATIONS`.
        ffn_norm: tensor name of the norm before the feed-forward.
        qk_norm: per-head norms of q and k before the rotation.
        sinks: one learned logit per head in the softmax denominator.
        window: which layers slide, where the file gives a window: "none", "all" or "even".
        yarn_truncate: whether YaRN's correction range is rounded to whole pairs.

    Raises:
        ValueError: a value that is none of those; names the field.
    """

    name: str
    compose: Callable[[Builder, HParams], None]
    norm: str = "rms"
    rope_type: str = "neox"
    qkv_bias: str = "no"
    out_bias: str = "no"
    ffn_bias: str = "no"
    ffn: str = "glu"
    act: str = "silu"
    ffn_norm: str = "ffn_norm"
    qk_norm: bool = False
    sinks: bool = False
    window: str = "none"
    yarn_truncate: bool = True

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            self._require(field, choices)
        self._require("act", _ACTIVATIONS[self.ffn])

    def _require(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            raise ValueError(f"architecture {self.name}: {field} {value!r} is none of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class HParams:
    """Hyperparameters of one model, checked against each other. Widths in elements, positions in tokens.

    `inv_freq` are the n_rot/2 rotary frequencies in radians per position, scaling applied; `rope_mscale` multiplies cos
    and sin. A LongRoPE model also has `inv_freq_long`, for sequences of more than `rope_orig_context` positions; 0: it
    has none.
    """

    arch: Arch
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    context_length: int
    norm_eps: float
    n_rot: int
    rope_theta: float
    inv_freq: tuple[float, ...]
    inv_freq_long: tuple[float, ...]
    rope_orig_context: int
    rope_mscale: float
    window: int
    n_expert: int
    n_expert_used: int

    def layer_window(self, layer: int) -> int:
        """Sliding window of a layer in positions; 0: full attention."""
        if self.arch.window == "all" or (self.arch.window == "even" and layer % 2 == 0):
            return self.window
        return 0


def read(mf: ModelFile, row: Arch, context_length: int | None = None) -> HParams:
    """Read and check the hyperparameters of a model file.

    Args:
        mf: the open file.
        row: of its architecture.
        context_length: positions that will be served, where that is known: a window that is as wide masks nothing.

    Raises:
        ModelLoadError: a key is missing, of the wrong type, out of range or at odds with another; names it.
    """
    a = row.name

    def bad(key: str, why: str) -> ModelLoadError:
        return mf.error(f"{a}.{key}", why)

    n_layer = mf.get_int(f"{a}.block_count", 1, MAX_LAYERS)
    n_embd = mf.get_int(f"{a}.embedding_length", 1, MAX_WIDTH)
    n_head = mf.get_int_of_layers(f"{a}.attention.head_count", 1, 4096, n_layer)
    n_head_kv = mf.get_int_of_layers(f"{a}.attention.head_count_kv", 1, 4096, n_layer, n_head)
    if n_head_kv > n_head or n_head % n_head_kv:
        raise bad("attention.head_count_kv", f"is {n_head_kv}, which does not divide head_count {n_head}")
    if n_embd % n_head and f"{a}.attention.key_length" not in mf.metadata:
        raise bad("embedding_length", f"is {n_embd}, no multiple of head_count {n_head}")
    head_dim = mf.get_int(f"{a}.attention.key_length", 1, 1024, n_embd // n_head)
    if mf.get_int(f"{a}.attention.value_length", 1, 1024, head_dim) != head_dim:
        raise bad("attention.value_length", f"differs from the key length {head_dim}")
    if head_dim % 2:
        raise bad("attention.key_length", f"makes heads of width {head_dim}, which is odd")
    eps_key = "attention.layer_norm_rms_epsilon" if row.norm == "rms" else "attention.layer_norm_epsilon"
    n_expert = n_used = 0
    if row.ffn == "moe":
        n_expert = mf.get_int(f"{a}.expert_count", 1, 1024)
        n_used = mf.get_int(f"{a}.expert_used_count", 1, 64)
        if n_used > n_expert:
            raise bad("expert_used_count", f"is {n_used}, of {n_expert} experts")
        n_ff = mf.get_int_of_layers(f"{a}.expert_feed_forward_length", 1, MAX_WIDTH, n_layer)
    else:
        n_ff = mf.get_int_of_layers(f"{a}.feed_forward_length", 1, MAX_WIDTH, n_layer)
    trained = mf.get_int(f"{a}.context_length", 1, MAX_CONTEXT)
    window = mf.get_int(f"{a}.attention.sliding_window", 0, MAX_WINDOW, 0)
    if window >= (context_length or trained):
        window = 0  # masks nothing
    if window and row.window == "none":
        raise bad("attention.sliding_window", f"is {window}, but architecture {a} does not slide: only a context of at "
                                              f"most {window} positions would be right")  # fmt: skip
    n_rot, theta, rope = 0, 0.0, RopeTables((), 1.0)
    if row.rope_type:
        n_rot = mf.get_int(f"{a}.rope.dimension_count", 2, head_dim, head_dim)
        if n_rot % 2:
            raise bad("rope.dimension_count", f"is {n_rot}, which is odd")
        theta = mf.get_float(f"{a}.rope.freq_base", 1.0, 1e12, 10000.0)
        rope = rope_tables(mf, n_rot, theta, trained, row.yarn_truncate)
    return HParams(
        arch=row, n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim,
        context_length=trained, norm_eps=mf.get_float(f"{a}.{eps_key}", 0.0, 1.0), n_rot=n_rot, rope_theta=theta,
        inv_freq=rope.inv_freq, inv_freq_long=rope.inv_freq_long, rope_orig_context=rope.orig_context,
        rope_mscale=rope.mscale, window=window, n_expert=n_expert, n_expert_used=n_used,
    )  # fmt: skip
