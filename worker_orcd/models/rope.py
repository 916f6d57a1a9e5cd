"""Rotary frequencies of a model file: the plain geometric series, and the scalings that files name.

Sources: linear (position interpolation, Chen et al. 2023), YaRN (Peng et al. 2023, eq. 17-22), LongRoPE (Ding et al.
2024) as in the models' published configurations; `rope_freqs.weight` holds Llama 3's per-pair divisors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from worker_orcd.errors import ModelLoadError

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

MAX_CONTEXT = 1 << 24

#: tensors that hold divisors of frequencies: read here, no weights of the plan
DIVISOR_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


class RopeTables(NamedTuple):
    """Frequencies [n_rot/2] in radians per position and the factor on cos and sin.

    LongRoPE: `inv_freq_long` turns sequences of more than `orig_context` positions; else it is empty and that is 0.
    """

    inv_freq: tuple[float, ...]
    mscale: float
    inv_freq_long: tuple[float, ...] = ()
    orig_context: int = 0


def rope_tables(mf: ModelFile, n_rot: int, theta: float, trained: int, yarn_truncate: bool) -> RopeTables:
    """The rotary frequencies with the file's rope scaling applied.

    Args:
        mf: the open file.
        n_rot: columns of a head that turn, even.
        theta: base of the series.
        trained: positions the model was made for.
        yarn_truncate: whether YaRN's correction range is rounded to whole pairs.

    Raises:
        ModelLoadError: a scaling key out of range or of an unknown type, divisors missing or not positive.
    """
    a, half = mf.arch, n_rot // 2
    base = [theta ** (-2.0 * p / n_rot) for p in range(half)]
    factor = mf.get_float(f"{a}.rope.scaling.factor", 1e-3, 1e6, 1.0)
    original = mf.get_int(f"{a}.rope.scaling.original_context_length", 1, MAX_CONTEXT, trained)
    attn_factor = mf.get_float(f"{a}.rope.scaling.attn_factor", 0.0, 1e3, 0.0)  # 0: as the method says
    kind = mf.get_str(f"{a}.rope.scaling.type", "none")
    if "rope_factors_long.weight" in mf.tensors or "rope_factors_short.weight" in mf.tensors:
        short, long = (_divided(base, _divisors(mf, f"rope_factors_{name}.weight", half)) for name in ("short", "long"))
        return RopeTables(short, attn_factor or long_rope_mscale(trained, original), long, original)
    if "rope_freqs.weight" in mf.tensors:
        return RopeTables(_divided(base, _divisors(mf, "rope_freqs.weight", half)), 1.0)
    if kind == "linear":
        return RopeTables(tuple(f / factor for f in base), 1.0)
    if kind == "yarn":
        fast = mf.get_float(f"{a}.rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0)
        slow = mf.get_float(f"{a}.rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0)
        turned = yarn(base, theta, factor, original, fast, slow, yarn_truncate)
        return RopeTables(turned, attn_factor or yarn_mscale(factor))
    if kind != "none":
        raise mf.error(f"{a}.rope.scaling.type", f"is {kind!r}, which is not supported (supported: none, linear, yarn)")
    return RopeTables(tuple(base), 1.0)


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
        raise ModelLoadError(f"tensor {name!r}: expected float32 of shape ({n},)", mf.path,
                             info.offset if info else None, field=name)  # fmt: skip
    values = list(memoryview(mf.view(name)).cast("B").cast("f"))
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise ModelLoadError(f"tensor {name!r}: divisors must be positive", mf.path, info.offset, field=name)
    return values
