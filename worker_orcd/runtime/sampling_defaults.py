"""The sampling parameters that a model file recommends: metadata keys `general.sampling.*`.

Recommendations alone: nothing fails for one that cannot be followed. Who applies them, and where a request is silent
only, is the business of the routes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from worker_orcd.engine.sampling import RULES

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

_P = "general.sampling."
#: keys that have a field with the same meaning
FIELDS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def file_defaults(model_file: ModelFile, n_vocab: int) -> dict[str, int | float]:
    """Fields of `SamplingParams` for which a file recommends a value, in the order of `FIELDS`.

    As llama.cpp reads them: a temperature of at most 0 is greedy, a top_k of at most 0 or of the whole vocabulary is
    off, and penalties count no token where penalty_last_n is 0. A longer penalty_last_n is not followed: ours counts
    all generated tokens. A value that is no number, or outside its field's range, is left out.

    Args:
        model_file: open.
        n_vocab: tokens of the model.
    """
    defaults: dict[str, int | float] = {}
    for key, name in FIELDS.items():
        value = _number(model_file, _P + key)
        if value is None:
            continue
        if name == "top_k":
            value = int(value) if 0 < value < n_vocab else 0
        else:
            # the shortest decimal of the float32 in the file: 0.95, not 0.949999988079071
            value = float(f"{value:.7g}")
        if name == "temperature":
            value = max(value, 0.0)
        elif name == "repetition_penalty" and _number(model_file, f"{_P}penalty_last_n") == 0:
            continue
        rule = RULES[name]
        low, high = float(rule.least or 0), math.inf if rule.most is None else rule.most
        if low <= value <= high and not (rule.above and value == low):
            defaults[name] = value
    return defaults


def _number(model_file: ModelFile, key: str) -> int | float | None:
    metadata = model_file.metadata
    # an array is not decoded: it may be as long as the file
    if key not in metadata or metadata.value_type(key).startswith("array"):
        return None
    value = metadata[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None
