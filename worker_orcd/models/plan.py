"""The plan: a model as a flat list of ops, from an architecture row, hyperparameters and the tensor table.

Engines interpret it: `_cpu`, `_engine`, and the NumPy oracle of the tests.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker_orcd.errors import ModelLoadError, quoted
from worker_orcd.models import registry
from worker_orcd.models.blocks import Builder
from worker_orcd.models.ops import Buffer, Op, Weight
from worker_orcd.models.rope import DIVISOR_TENSORS

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile


@dataclass(frozen=True)
class KvGroup:
    """Layers whose cache lives and dies together: one block table and one block pool each.

    `window` 0: every position is kept; else only positions that a later query of the window may still read.
    """

    window: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A model ready to be interpreted.

    Attributes:
        arch: name of the architecture row.
        n_vocab, n_embd, n_layer: sizes.
        n_head_kv, head_dim: of the KV cache, equal for all layers.
        context_length: positions the model was made for (the file's key).
        max_positions: hard limit of positions (learned position table), or None.
        buffers: activations by name.
        weights: needed tensors by name.
        ops: the ops, in order; the last writes the buffer "logits" [outputs, n_vocab].
        rope_orig_context: a sequence of more positions turns by the `inv_freq_long` of its `Rope` ops, from its first
            position on (LongRoPE); 0: there are none.
        kv_groups: see `KvGroup`; `kv_group_of[layer]` is the index of a layer's group.
    """

    arch: str
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head_kv: int
    head_dim: int
    context_length: int
    max_positions: int | None
    buffers: dict[str, Buffer]
    weights: dict[str, Weight]
    ops: tuple[Op, ...]
    kv_groups: tuple[KvGroup, ...]
    kv_group_of: tuple[int, ...] = field(default=())
    rope_orig_context: int = 0

    @property
    def rope_limits(self) -> tuple[int, ...]:
        """Lengths past which a sequence turns by the next rotary frequency table, ascending; tables are one more."""
        return (self.rope_orig_context,) if self.rope_orig_context else ()

    def rope_table(self, n_positions: int) -> int:
        """Index of the frequency table by which a sequence of `n_positions` turns, from its first position on."""
        return bisect_left(self.rope_limits, n_positions)


def build(mf: ModelFile, context_length: int | None = None) -> Plan:
    """Turn a model file into a plan.

    Args:
        mf: the open file; only metadata and the tensor table are read (and the divisor vectors of rotary scaling).
        context_length: positions that will be served, where known (a window that is as wide masks nothing).

    Raises:
        ModelLoadError: unsupported architecture, hyperparameters out of range, tensors missing, left over or of
            another shape than the hyperparameters say; names the key or tensor.
    """
    hp = registry.hparams_of(mf, context_length)
    b = Builder(mf)
    hp.arch.compose(b, hp)
    read = DIVISOR_TENSORS if hp.arch.rope_type else frozenset()
    for name, info in mf.tensors.items():
        if name not in b.weights and name not in read:
            raise ModelLoadError(f"tensor {quoted(name)} has no place in architecture {hp.arch.name} with "
                                 f"{hp.n_layer} layers", mf.path, info.offset, field=name)  # fmt: skip
    windows = [hp.layer_window(i) for i in range(hp.n_layer)]
    groups = tuple(KvGroup(w, tuple(i for i, v in enumerate(windows) if v == w)) for w in sorted(set(windows)))
    return Plan(
        arch=hp.arch.name, n_vocab=b.buffers["logits"].width, n_embd=hp.n_embd, n_layer=hp.n_layer,
        n_head_kv=hp.n_head_kv, head_dim=hp.head_dim, context_length=hp.context_length, max_positions=b.max_positions,
        buffers=b.buffers, weights=b.weights, ops=tuple(b.ops), kv_groups=groups,
        kv_group_of=tuple(next(g for g, grp in enumerate(groups) if i in grp.layers) for i in range(hp.n_layer)),
        rope_orig_context=hp.rope_orig_context,
    )  # fmt: skip
