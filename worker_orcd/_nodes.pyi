"""Types of pyx/worker_orcd/_nodes.pyx: the launches of a step, made by cuda/launches.py alone."""

from collections.abc import Callable
from typing import Any

from worker_orcd._driver import Kernel
from worker_orcd.cuda.layout import Launch

#: numbers of the kernels' parameters by the plan's words
NORM_KINDS: dict[str, int]
ROPE_TYPES: dict[str, int]
GLU_KINDS: dict[str, int]
CONVERT_KINDS: dict[str | None, int]
PRODUCT_MODES: dict[str, int]
#: at least what decode attention takes beside its dynamic shared memory
DECODE_STATIC_SMEM: int

def decode_max_splits(context_length: int, window: int) -> int:
    """Splits of the workspace that decode attention needs for a sequence of up to `context_length` positions."""

def attention_heads(n_head: int, n_head_kv: int) -> int:
    """Blocks in y of a decode attention launch."""

def decode_partial_rows(heads: int) -> int:
    """Rows whose splits the workspace has room for."""

def decode_shapes(head_dim: int, max_smem: int) -> tuple[tuple[int, int, int], ...]:
    """What a block of decode attention can be: (groups, depth, dynamic shared memory bytes)."""

def decode_grid(
    n_rows: int, heads: int, max_splits: int, shapes: tuple[tuple[int, int, int], ...], sm_count: int, max_smem: int
) -> tuple[int, int, int, int]:
    """The decode attention launch of `n_rows` rows: (blocks that share a row, groups, depth, dynamic shared memory)."""

def prefill_smem(head_dim: int, by_warpgroups: bool) -> int:
    """Dynamic shared memory of prefill attention: of attention_prefill_* or attention_warpgroup_*."""

def norm_threads(n: int, is_scalar: bool) -> int:
    """Threads of a block of norm_vec4 or norm_scalar for rows of `n` columns."""

def sample_groups(n_vocab: int) -> int:
    """Groups of tokens of a row of logits."""

def sample_sizes(n_vocab: int) -> tuple[int, int, int, int, int, int]:
    """Workspace of sampling per row, in bytes: (best, arrived, group_keys, group_weights, bin_weights, bin_counts)."""

class Node:
    """A named launch."""

    def __init__(self, name: str, *args: Any) -> None: ...
    @property
    def name(self) -> str:
        """Of the op."""

class RowNode(Node):
    """One kernel over the tokens of a step, with parameters that do not change."""

    def __init__(
        self,
        name: str,
        kernel: Kernel,
        struct: str,
        fields: dict[str, Any],
        grid: tuple[int, int],
        block: int,
        outputs: bool = False,
    ) -> None: ...

class AttentionNode(Node):
    """Attention of decode rows and of prefill rows, or with the rotation before it."""

    def __init__(
        self,
        name: str,
        decode_kernel: Kernel,
        prefill_kernel: Kernel,
        decode: dict[str, Any],
        prefill: dict[str, Any],
        smem: tuple[tuple[tuple[int, int, int], ...], int],
        sm_count: int,
        max_smem: int,
        rope: tuple[Kernel, dict[str, Any], int] | None = None,
    ) -> None: ...

class SampleNode(Node):
    """The next token of every output row."""

    def __init__(self, name: str, largest: Kernel, draw: Kernel, fields: dict[str, Any], sm_count: int) -> None: ...

class Conversion:
    """convert_rows and convert_rows_to_places with their parameters."""

    def __init__(self, kernel: Kernel, to_places: Kernel, fields: dict[str, Any], n_inputs: int = 1) -> None: ...

class Bound:
    """A kernel with its launch geometry."""

    def __init__(self, kernel: Kernel, launch: Launch) -> None: ...

class GluRows:
    """The gated activation of some rows, where no product applies it."""

    def __init__(self, kernel: Kernel, fields: dict[str, Any]) -> None: ...

class DecodeProduct:
    """A launch of decode_*, for 1 to 8 rows."""

    def __init__(self, fields: dict[str, Any], inline: bool, bounds: list[Bound]) -> None: ...

class DecodePair:
    """Two products of one input in one launch."""

    def __init__(
        self, first: DecodeProduct, second: DecodeProduct, bounds: list[tuple[Bound, Bound, Bound] | None]
    ) -> None: ...

class MatMulNode(Node):
    """Products of one input with up to four matrices of one type."""

    def __init__(
        self,
        name: str,
        conversion: Conversion | None,
        inline: bool,
        decode: list[DecodeProduct],
        matvec: dict[str, Any],
        matvecs: list[Bound],
        matmuls: list[dict[str, Any]],
        prefill: Callable[[int, int], Bound],
        outputs: bool,
        glu: GluRows | None = None,
        many: Callable[[int], Bound] | None = None,
        wgmma: dict[str, Any] | None = None,
    ) -> None: ...
    def join(self, after: MatMulNode, pair: DecodePair) -> None: ...

class RouteNode(Node):
    """The experts of every row, and the lists of the decode rows and of the prefill rows."""

    def __init__(
        self,
        name: str,
        logits: Kernel,
        choose: Kernel,
        make_list: Kernel,
        fields: dict[str, Any],
        decode_list: dict[str, Any],
        prefill_list: dict[str, Any],
        partial_floats: int,
        grid: Callable[[int], tuple[int, int, int]],
        item_rows: Callable[[int], int],
        conversion: Conversion | None = None,
        few: tuple[Kernel, list[int], int, int] | None = None,
        many_rows: Callable[[int], tuple[int, int]] | None = None,
    ) -> None: ...

class ExpertProduct:
    """A launch of expert_few_*, for 1 to 8 rows."""

    def __init__(self, fields: dict[str, Any], bounds: list[Bound]) -> None: ...

class ExpertProductNode(Node):
    """Products of every row and slot with one or two matrices of the expert in that slot."""

    def __init__(
        self,
        name: str,
        conversion: Conversion | None,
        few: list[ExpertProduct],
        matvec: dict[str, Any],
        matmul: dict[str, Any],
        decode: list[Bound],
        prefill: Callable[[int], Bound],
        glu: GluRows | None = None,
        total: RowNode | None = None,
        many: Callable[[int], Bound] | None = None,
        wgmma: dict[str, Any] | None = None,
    ) -> None: ...
    def precede(self, after: ExpertProductNode) -> None: ...
