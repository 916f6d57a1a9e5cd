"""Types of pyx/worker_orcd/_nodes.pyx: the launches of a step, made by cuda/launches.py alone."""

from typing import Any

KINDS: dict[str, int]
ROPE_TYPES: dict[str, int]
GLUS: dict[str, int]

def decode_max_splits(context_length: int, window: int) -> int:
    """Splits of the workspace that decode attention needs for a sequence of up to `context_length` positions."""

def sample_sizes(n_vocab: int) -> tuple[int, int, int, int]:
    """Workspace of sampling per row, in bytes: (partial, chunk_weights, bin_weights, bin_counts)."""

def attention_heads(n_head: int, n_head_kv: int) -> int:
    """Blocks in y of a decode attention launch."""

class Node:
    """A named launch."""

    def __init__(self, name: str, *args: Any) -> None: ...
    @property
    def name(self) -> str:
        """Of the op."""

class NormNode(Node):
    """RMS or layer norm of every row."""

class EmbedNode(Node):
    """Rows of a repacked matrix by token or position index."""

class RopeKvNode(Node):
    """Rotation of q and k in place, and k, v into the cache."""

class AttentionNode(Node):
    """Attention of decode rows and of prompt rows."""

class PointwiseNode(Node):
    """glu, act_gelu_tanh, add or gather_rows."""

class MatMulNode(Node):
    """Products of one input with up to four matrices of one type."""

class SampleNode(Node):
    """The next token of every output row."""
