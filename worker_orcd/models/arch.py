"""Architectures as data: one row per `general.architecture`, and the hyperparameters read with it.

A row says which norm, rotation, attention and feed-forward a model has and how its GGUF names them; `plan.py` turns it
into ops. Supporting a new architecture is a row here, a golden case, and an op only where the op is new.
This module knows no engine; it reads the metadata of a `ModelFile` through its typed getters, which name the key and
the byte offset when a value is out of range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from worker_orcd.errors import ModelLoadError

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile


@dataclass(frozen=True)
class Arch:
    """One architecture row.

    Attributes:
        name: value of `general.architecture` and prefix of its keys.
        norm: "rms" or "layer" (with bias).
        rope_type: "interleaved" (pairs of neighbours) or "neox" (halves); "" = no rotation (learned positions).
        fused_qkv: one `attn_qkv` tensor (q rows, then k, then v) instead of three.
        qkv_bias, out_bias, ffn_bias: "no", "maybe" (used where the file has it) or "yes" (required).
        ffn: "glu" (gate, up, down), "glu_fused" (gate rows then up rows in `ffn_up`), "mlp" (up, down), "moe".
        act: "silu", "gelu_tanh" or "swiglu_oai".
        ffn_norm: tensor name of the norm before the feed-forward.
        qk_norm: per-head norms of q and k before the rotation.
        sinks: one learned logit per head in the softmax denominator.
        window: which layers slide, where the file gives a window: "none", "all" or "even".
        yarn_truncate: whether YaRN's correction range is rounded to whole pairs.
    """

    name: str
    norm: str = "rms"
    rope_type: str = "neox"
    fused_qkv: bool = False
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


ROWS: dict[str, Arch] = {
    row.name: row
    for row in (
        Arch("llama", rope_type="interleaved", qkv_bias="maybe", out_bias="maybe", ffn_bias="maybe"),
        Arch("qwen2", qkv_bias="yes"),
        Arch("qwen3", qk_norm=True),
        Arch("phi3", fused_qkv=True, ffn="glu_fused", window="all"),
        Arch("gpt2", norm="layer", rope_type="", fused_qkv=True, qkv_bias="yes", out_bias="yes", ffn_bias="yes",
             ffn="mlp", act="gelu_tanh"),
        Arch("gpt-oss", qkv_bias="yes", out_bias="yes", ffn_bias="yes", ffn="moe", act="swiglu_oai",
             ffn_norm="post_attention_norm", sinks=True, window="even", yarn_truncate=False),
    )
}  # fmt: skip

MAX_LAYERS = 512
MAX_CONTEXT = 1 << 24
MAX_WIDTH = 1 << 20


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


def row_of(mf: ModelFile) -> Arch:
    """The architecture row of a file.

    Raises:
        ModelLoadError: an architecture without a row, named with those supported.
    """
    row = ROWS.get(mf.arch)
    if row is None:
        raise ModelLoadError(f"unsupported architecture {mf.arch!r} (supported: {', '.join(ROWS)})", mf.path)
    return row


def hparams(mf: ModelFile, context_length: int | None = None) -> HParams:
    """Read and check the hyperparameters of a model file.

    Args:
        mf: the open file.
        context_length: positions that will be served, where that is known: a window that is as wide masks nothing.

    Raises:
        ModelLoadError: a key is missing, of the wrong type, out of range or at odds with another; names it.
    """
    row = row_of(mf)
    a = row.name

    def bad(key: str, why: str) -> ModelLoadError:
        return mf.error(f"{a}.{key}", why)

    n_layer = mf.get_int(f"{a}.block_count", 1, MAX_LAYERS)
    n_embd = mf.get_int(f"{a}.embedding_length", 1, MAX_WIDTH)
    n_head = mf.get_int(f"{a}.attention.head_count", 1, 4096)
    n_head_kv = mf.get_int(f"{a}.attention.head_count_kv", 1, 4096, n_head)
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
    n_ff = 0
    if row.ffn == "moe":
        n_expert = mf.get_int(f"{a}.expert_count", 1, 1024)
        n_used = mf.get_int(f"{a}.expert_used_count", 1, 64)
        if n_used > n_expert:
            raise bad("expert_used_count", f"is {n_used}, of {n_expert} experts")
        n_ff = mf.get_int(f"{a}.expert_feed_forward_length", 1, MAX_WIDTH)
    else:
        n_ff = mf.get_int(f"{a}.feed_forward_length", 1, MAX_WIDTH)
        if mf.get_int(f"{a}.expert_count", 0, 1024, 0):
            raise bad("expert_count", f"is set, but architecture {a} has no experts")
    trained = mf.get_int(f"{a}.context_length", 1, MAX_CONTEXT)
    window = mf.get_int(f"{a}.attention.sliding_window", 0, MAX_CONTEXT, 0) if row.window != "none" else 0
    if window >= (context_length or trained):
        window = 0  # masks nothing
    n_rot, theta, rope = 0, 0.0, _RopeTable((), 1.0)
    if row.rope_type:
        n_rot = mf.get_int(f"{a}.rope.dimension_count", 2, head_dim, head_dim)
        if n_rot % 2:
            raise bad("rope.dimension_count", f"is {n_rot}, which is odd")
        theta = mf.get_float(f"{a}.rope.freq_base", 1.0, 1e12, 10000.0)
        rope = _rope_table(mf, row, n_rot, theta, trained)
    return HParams(
        arch=row, n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim,
        context_length=trained, norm_eps=mf.get_float(f"{a}.{eps_key}", 0.0, 1.0), n_rot=n_rot, rope_theta=theta,
        inv_freq=rope.inv_freq, inv_freq_long=rope.inv_freq_long, rope_orig_context=rope.rope_orig_context,
        rope_mscale=rope.mscale, window=window,
        n_expert=n_expert, n_expert_used=n_used,
    )  # fmt: skip


class _RopeTable(NamedTuple):
    """Frequencies [n_rot/2] and the factor on cos and sin; LongRoPE: also those past the original context."""

    inv_freq: tuple[float, ...]
    mscale: float
    inv_freq_long: tuple[float, ...] = ()
    rope_orig_context: int = 0


def _rope_table(mf: ModelFile, row: Arch, n_rot: int, theta: float, trained: int) -> _RopeTable:
    """The rotary frequencies with the file's rope scaling applied.

    Sources: linear (position interpolation), YaRN (Peng et al. 2023, eq. 17-22), LongRoPE (Ding et al. 2024) as in
    the models' published configurations; `rope_freqs.weight` holds Llama 3's per-pair divisors.
    """
    a = row.name
    half = n_rot // 2
    base = [theta ** (-2.0 * p / n_rot) for p in range(half)]
    factor = mf.get_float(f"{a}.rope.scaling.factor", 1e-3, 1e6, 1.0)
    original = mf.get_int(f"{a}.rope.scaling.original_context_length", 1, MAX_CONTEXT, trained)
    attn_factor = mf.get_float(f"{a}.rope.scaling.attn_factor", 0.0, 1e3, 0.0)  # 0: as the method says
    kind = mf.get_str(f"{a}.rope.scaling.type", "none")
    mscale = 1.0
    if "rope_factors_long.weight" in mf.tensors or "rope_factors_short.weight" in mf.tensors:
        divisors = (_divisors(mf, f"rope_factors_{name}.weight", half) for name in ("short", "long"))
        short, long = (tuple(f / d for f, d in zip(base, ds, strict=True)) for ds in divisors)
        ratio = trained / original
        mscale = attn_factor or (math.sqrt(1.0 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0)
        return _RopeTable(short, mscale, long, original)
    if "rope_freqs.weight" in mf.tensors:
        base = [f / d for f, d in zip(base, _divisors(mf, "rope_freqs.weight", half), strict=True)]
    elif kind == "linear":
        base = [f / factor for f in base]
    elif kind == "yarn":
        fast = mf.get_float(f"{a}.rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0)
        slow = mf.get_float(f"{a}.rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0)
        low, high = (n_rot * math.log(original / (b * 2 * math.pi)) / (2 * math.log(theta)) for b in (fast, slow))
        if row.yarn_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, n_rot - 1)
        span = max(high - low, 1e-3)
        ramp = [min(max((p - low) / span, 0.0), 1.0) for p in range(half)]
        base = [f * (1 - r) + f / factor * r for f, r in zip(base, ramp, strict=True)]
        mscale = attn_factor or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    elif kind != "none":
        raise mf.error(f"{a}.rope.scaling.type", f"is {kind!r}, which is not supported (supported: none, linear, yarn)")
    return _RopeTable(tuple(base), mscale)


def _divisors(mf: ModelFile, name: str, n: int) -> list[float]:
    """The n positive divisors of the rotary frequencies in tensor `name` (float32)."""
    info = mf.tensors.get(name)
    if info is None or info.shape != (n,) or info.type_id != 0:
        raise ModelLoadError(f"tensor {name!r}: expected float32 of shape ({n},)", mf.path,
                             info.offset if info else None, field=name)  # fmt: skip
    values = list(memoryview(mf.view(name)).cast("B").cast("f"))
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise ModelLoadError(f"tensor {name!r}: divisors must be positive", mf.path, info.offset, field=name)
    return values
