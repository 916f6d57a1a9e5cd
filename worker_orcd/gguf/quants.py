"""The table of ggml tensor types: the only place that knows their ids, names, block sizes and where scales lie.

docs/adding-a-quant-type.md says what else a new row needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

#: types whose weights a GPU makes 2^4 times as large before it rounds them to float16 (csrc/host/k_weights.h)
_RAISED = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"})


@dataclass(frozen=True)
class QuantType:
    """One ggml tensor type.

    Attributes:
        id: the type id in a GGUF tensor record.
        name: ggml's name, for example ``"Q4_K"``.
        block_size: elements of one block; a row's length is a multiple of it.
        type_size: bytes of one block.
        number: how the numbers of a block that must be finite are written: its scales, minima, or for an unquantized
            type the element itself. "F32", "F16", "BF16" or "E8M0".
        number_at: where they are, in bytes from the start of the block; one or two.
    """

    id: int
    name: str
    block_size: int
    type_size: int
    number: str
    number_at: tuple[int, ...]

    @property
    def check_rule(self) -> tuple[int, str, tuple[int, ...]]:
        """What the checks of model files need to know."""
        return self.type_size, self.number, self.number_at

    @property
    def gpu_check_rule(self) -> tuple[int, str, tuple[int, ...]] | tuple[int, str, tuple[int, ...], str]:
        """The rule for a matrix that a GPU multiplies: weights of K-quants may not be above 4,094, either."""
        return (*self.check_rule, self.name) if self.name in _RAISED else self.check_rule

    def row_bytes(self, n_elements: int) -> int:
        """Bytes of a row of `n_elements` (a multiple of `block_size`)."""
        return n_elements // self.block_size * self.type_size


_ROWS = (
    QuantType(0, "F32", 1, 4, "F32", (0,)),
    QuantType(1, "F16", 1, 2, "F16", (0,)),
    QuantType(2, "Q4_0", 32, 18, "F16", (0,)),
    QuantType(3, "Q4_1", 32, 20, "F16", (0, 2)),
    QuantType(6, "Q5_0", 32, 22, "F16", (0,)),
    QuantType(7, "Q5_1", 32, 24, "F16", (0, 2)),
    QuantType(8, "Q8_0", 32, 34, "F16", (0,)),
    QuantType(10, "Q2_K", 256, 84, "F16", (80, 82)),
    QuantType(11, "Q3_K", 256, 110, "F16", (108,)),
    QuantType(12, "Q4_K", 256, 144, "F16", (0, 2)),
    QuantType(13, "Q5_K", 256, 176, "F16", (0, 2)),
    QuantType(14, "Q6_K", 256, 210, "F16", (208,)),
    QuantType(30, "BF16", 1, 2, "BF16", (0,)),
    QuantType(39, "MXFP4", 32, 17, "E8M0", (0,)),
)

TYPES: dict[int, QuantType] = {t.id: t for t in _ROWS}
BY_NAME: dict[str, QuantType] = {t.name: t for t in _ROWS}
#: type id -> (elements, bytes) of one block, what the GGUF parser needs for its size arithmetic
BLOCK_SIZES: dict[int, tuple[int, int]] = {t.id: (t.block_size, t.type_size) for t in _ROWS}

#: ggml's other types, which a report names and nothing computes with: id -> (name, elements, bytes of a block)
_OTHER_TYPES: dict[int, tuple[str, int, int]] = {
    9: ("Q8_1", 32, 40),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
#: `BLOCK_SIZES` of every type a report can show; where the size of a block is not known, tensors count 0 bytes
REPORT_BLOCK_SIZES: dict[int, tuple[int, int]] = (
    dict.fromkeys(range(256), (1, 0))
    | {type_id: (elements, n_bytes) for type_id, (_, elements, n_bytes) in _OTHER_TYPES.items()}
    | BLOCK_SIZES
)


def type_name(type_id: int) -> str:
    """ggml's name of a type, supported or not; "type 99" where it has none that is known here."""
    if type_id in TYPES:
        return TYPES[type_id].name
    return _OTHER_TYPES[type_id][0] if type_id in _OTHER_TYPES else f"type {type_id}"


#: general.file_type (llama.h, enum llama_ftype) of a mixed file -> the name people use for it, and the tensor type of
#: which at least one matrix must be there for the claim to be believed. Such files fall back to 32-element types where
#: a row is no multiple of 256. The other file types are named as the tensors are.
_MIXED_FILE_TYPES: dict[int, tuple[str, str]] = {
    10: ("Q2_K", "Q2_K"),
    11: ("Q3_K_S", "Q3_K"),
    12: ("Q3_K_M", "Q3_K"),
    13: ("Q3_K_L", "Q3_K"),
    14: ("Q4_K_S", "Q4_K"),
    15: ("Q4_K_M", "Q4_K"),
    16: ("Q5_K_S", "Q5_K"),
    17: ("Q5_K_M", "Q5_K"),
    21: ("Q2_K_S", "Q2_K"),
}


def quant_kind(matrix_bytes: Iterable[tuple[int, int]], file_type: int | None) -> str:
    """What a file really holds, as users name it.

    Args:
        matrix_bytes: (type id, bytes) of every tensor with two or more dimensions.
        file_type: `general.file_type` of the file, or None.

    Returns:
        The name of a mixed file that `file_type` claims, where the tensors bear it out (a "Q4_K_M" must hold Q4_K
        matrices), else the name of the type that holds most bytes of the file's matrices.
    """
    held: Counter[str] = Counter()
    for type_id, n_bytes in matrix_bytes:
        held[type_name(type_id)] += n_bytes
    if not held:
        return "F32"
    mixed = _MIXED_FILE_TYPES.get(file_type) if file_type is not None else None
    if mixed is not None and mixed[1] in held:
        return mixed[0]
    return held.most_common(1)[0][0]
