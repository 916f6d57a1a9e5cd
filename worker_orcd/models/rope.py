"""Rotary frequencies of a model file: the plain geometric series, and the scalings that files name.

Sources: linear (position interpolation, Chen et al. 2023), YaRN (Peng et al. 2023, eq. 17-22), LongRoPE (Ding et al.
2024) as in the models' published configurations; `rope_freqs.weight` holds Llama 3's per-pair divisors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from worker_orcd.errors import ModelLoadError, quoted

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

MAX_CONTEXT = 1 << 24
_MIN_FACTOR = 1e-3
_MAX_FACTOR = 1e6
_MAX_MSCALE = 1e3

#: tensors that hold divisors of frequencies: read here, no weights of the plan
LLAMA3_DIVISORS = "rope_freqs.weight"
LONG_ROPE_DIVISORS = ("rope_factors_short.weight", "rope_factors_long.weight")
DIVISOR_TENSORS = frozenset({LLAMA3_DIVISORS, *LONG_ROPE_DIVISORS})

#: keys of YaRN below `rope.scaling.` -> the value that says what YaRN without the key does
YARN_KEYS = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}


class RopeTables(NamedTuple):
    """Frequencies [n_rot/2] in radians per position and the factor on cos and sin.

    LongRoPE: `inv_freq_long` turns sequences of more than `orig_context` positions; else it is empty and that is 0.
    """

    inv_freq: tuple[float, ...]
    mscale: float
    inv_freq_long: tuple[float, ...] = ()
    orig_context: int = 0


def rope_tables(mf: ModelFile, n_rot: int, theta: float, trained: int, yarn_truncate: bool) -> RopeTables:
    """The rotary frequencies with the file's rope scaling applied; a scaling that cannot be applied is refused.

    A scaling without a type is linear, a factor of 0 is none. Llama 3's divisors and a linear factor both apply.
    `attn_factor` multiplies the factor on cos and sin of every method but LongRoPE, whose whole factor it is;
    `yarn_attn_factor` takes the place of YaRN's own factor (`attention_factor` of a published configuration).

    Args:
        mf: the open file.
        n_rot: columns of a head that turn, even.
        theta: base of the series.
        trained: positions the model was made for.
        yarn_truncate: whether YaRN's correction range is rounded to whole pairs.

    Raises:
        ModelLoadError: a scaling key out of range, of an unknown type or without effect, two scalings that exclude
            each other, divisors missing or not positive.
    """
    half = n_rot // 2
    base = [theta ** (-2.0 * p / n_rot) for p in range(half)]
    prefix = f"{mf.arch}.rope.scaling."
    kind = mf.get_str(f"{prefix}type", "linear")
    factor, factor_key = _factor(mf)
    original = mf.get_int(f"{prefix}original_context_length", 1, MAX_CONTEXT, trained)
    attn_factor = mf.get_float(f"{prefix}attn_factor", _MIN_FACTOR, _MAX_MSCALE, None)
    if kind != "yarn":
        _refuse_yarn_keys(mf, kind)
    if any(name in mf.tensors for name in LONG_ROPE_DIVISORS):
        if kind not in ("none", "linear", "longrope") or LLAMA3_DIVISORS in mf.tensors:
            others = " and ".join(sorted(DIVISOR_TENSORS & set(mf.tensors)))
            raise mf.error(f"{prefix}type", f"is {quoted(kind)} where {others} scale too")
        if factor != 1.0:
            raise mf.error(factor_key, f"is {factor}, but LongRoPE ({LONG_ROPE_DIVISORS[1]}) takes no factor")
        if original < 2:
            raise mf.error(f"{prefix}original_context_length", f"is {original}, LongRoPE needs at least 2")
        short, long = (_divided(base, _divisors(mf, name, half)) for name in LONG_ROPE_DIVISORS)
        return RopeTables(short, attn_factor or long_rope_mscale(trained, original), long, original)
    if LLAMA3_DIVISORS in mf.tensors:
        if kind == "yarn":
            raise mf.error(f"{prefix}type", f"is 'yarn' where {LLAMA3_DIVISORS} scales too")
        base = list(_divided(base, _divisors(mf, LLAMA3_DIVISORS, half)))
    mscale = 1.0 if attn_factor is None else attn_factor
    if kind == "linear":
        return RopeTables(tuple(f / factor for f in base), mscale)
    if kind == "yarn":
        if theta <= 1.0:
            raise mf.error(f"{mf.arch}.rope.freq_base", f"is {theta}, YaRN needs more than 1")
        fast, slow = _yarn_betas(mf)
        own = mf.get_float(f"{prefix}yarn_attn_factor", _MIN_FACTOR, _MAX_MSCALE, yarn_mscale(factor))
        return RopeTables(yarn(base, theta, factor, original, fast, slow, yarn_truncate), own * mscale)
    if kind == "longrope":
        missing = " and ".join(LONG_ROPE_DIVISORS)
        raise mf.error(f"{prefix}type", f"is 'longrope', but the tensors {missing} are missing")
    if kind != "none":
        raise mf.error(f"{prefix}type", f"is {quoted(kind)}, which is not supported (supported: none, linear, yarn)")
    if factor != 1.0:
        raise mf.error(factor_key, f"is {factor}, but rope.scaling.type is 'none': it would have no effect")
    return RopeTables(tuple(base), mscale)


def _factor(mf: ModelFile) -> tuple[float, str]:
    """By how much positions are divided (1: not at all) and the key that says so, of the two names it has had."""
    now, before = f"{mf.arch}.rope.scaling.factor", f"{mf.arch}.rope.scale_linear"
    factor, old = (mf.get_float(key, 0.0, _MAX_FACTOR, 0.0) for key in (now, before))
    for key, value in ((now, factor), (before, old)):
        if 0.0 < value < _MIN_FACTOR:
            raise mf.error(key, f"is {value}, must be 0 (none) or from {_MIN_FACTOR} to {_MAX_FACTOR}")
    if old in (0.0, 1.0):
        return factor or 1.0, now
    if factor not in (0.0, old):
        raise mf.error(before, f"is {old}, but {now} is {factor}")
    return old, before


def _yarn_betas(mf: ModelFile) -> tuple[float, float]:
    """Turns over the original context above which a pair keeps its frequency, and below which it is interpolated."""
    fast_key, slow_key = (f"{mf.arch}.rope.scaling.{name}" for name in YARN_KEYS)
    fast, slow = (
        mf.get_float(key, 0.0, _MAX_FACTOR, 0.0) or usual
        for key, usual in zip((fast_key, slow_key), YARN_KEYS.values(), strict=True)
    )
    if slow < _MIN_FACTOR or fast < slow:
        raise mf.error(slow_key, f"is {slow}, must be from {_MIN_FACTOR} to the {fast} of yarn_beta_fast")
    return fast, slow


def _refuse_yarn_keys(mf: ModelFile, kind: str) -> None:
    """Refuse a key of YaRN that would have no effect with another method."""
    for name, usual in (YARN_KEYS | {"yarn_attn_factor": 1.0}).items():
        key = f"{mf.arch}.rope.scaling.{name}"
        value = mf.get_float(key, 0.0, _MAX_FACTOR, 0.0)
        if value not in (0.0, usual):
            raise mf.error(key, f"is {value}, but rope.scaling.type is {quoted(kind)}: it would have no effect")


def yarn(
    base: list[float], theta: float, factor: float, original: int, fast: float, slow: float, truncate: bool
) -> tuple[float, ...]:
    """YaRN: pairs that turn more than `fast` times over the `original` positions keep their frequency, those that turn
    less than `slow` times are interpolated by `factor`, a ramp lies between."""
    n_rot = 2 * len(base)
    low, high = (n_rot * math.log(original / (b * 2 * math.pi)) / (2 * math.log(theta)) for b in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_rot - 1)
    # no pair between the two (an original context of a few positions): a step. Hugging Face's ramp runs backwards there
    span = max(high - low, 1e-3)
    ramp = [min(max((p - low) / span, 0.0), 1.0) for p in range(len(base))]
    return tuple(f * (1 - r) + f / factor * r for f, r in zip(base, ramp, strict=True))


def yarn_mscale(factor: float) -> float:
    """YaRN's factor on cos and sin."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def long_rope_mscale(trained: int, original: int) -> float:
    """LongRoPE's factor on cos and sin, for a model stretched from `original` to `trained` positions."""
    ratio = trained / original
    return math.sqrt(1.0 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0


def _divided(base: list[float], divisors: list[float]) -> tuple[float, ...]:
    return tuple(f / d for f, d in zip(base, divisors, strict=True))


def _divisors(mf: ModelFile, name: str, n: int) -> list[float]:
    """The n positive divisors of the rotary frequencies in tensor `name` (float32)."""
    info = mf.tensors.get(name)
    if info is None or info.shape != (n,) or info.type_id != 0:
        raise ModelLoadError(f"tensor {quoted(name)}: expected float32 of shape ({n},)", mf.path,
                             info.offset if info else None, field=name)  # fmt: skip
    values = list(memoryview(mf.view(name)).cast("B").cast("f"))
    if not all(math.isfinite(v) and v >= _MIN_FACTOR for v in values):
        raise ModelLoadError(f"tensor {quoted(name)}: divisors must be finite and at least {_MIN_FACTOR}", mf.path,
                             info.offset, field=name)  # fmt: skip
    return values
