"""The ops of a plan, and what they name: buffers, views and weights.

Conventions of every op:
- Activations are float32 matrices [rows, width], row-major; a `View` is a column range of one. `rows` of a buffer is
  "tokens" (one row per token of the step's ragged batch) or "outputs" (one per row whose next token is wanted).
- A weight is named by its GGUF tensor name. A matrix has GGUF shape (n_in, n_out): row o holds the n_in weights of
  output o, in blocks of its type. A vector is float32 of the given length.
- Ops run in order; an op may read and write the same view only where its docstring says "in place".
"""

from __future__ import annotations

from dataclasses import dataclass

#: activations of a `Glu` and of an `Act`, by the names that rows, ops and engines use
GLU_ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")
ACT_ACTIVATIONS = ("gelu_tanh",)


@dataclass(frozen=True)
class Buffer:
    """A named float32 activation matrix [rows, width]; `rows` is "tokens" or "outputs"."""

    name: str
    width: int
    rows: str = "tokens"


@dataclass(frozen=True)
class View:
    """Columns [offset, offset + width) of buffer `buf`; the row stride is the buffer's width."""

    buf: str
    offset: int
    width: int


@dataclass(frozen=True)
class Weight:
    """A tensor the plan needs. `kind`: "matrix" | "embedding" | "vector" | "experts" | "expert_vectors".

    `shape` is GGUF order (row length first): matrix (n_in, n_out), embedding (n_embd, n_vocab), vector (n,),
    experts (n_in, n_out, n_expert), expert_vectors (n_out, n_expert). Vectors are float32 (F16/BF16 are widened on
    load).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    type_id: int


@dataclass(frozen=True)
class Op:
    """Base of all ops; `name` is unique in the plan, for example ``"blk.3.attn_norm"``."""

    name: str


@dataclass(frozen=True)
class Embed(Op):
    """out[r] = scale * weight[token[r]] (+ positions[pos[r]] where `positions` names a learned position table)."""

    weight: str
    out: View
    scale: float = 1.0
    positions: str | None = None


@dataclass(frozen=True)
class Norm(Op):
    """kind "rms": x / sqrt(mean(x^2) + eps) * weight; kind "layer": (x - mean) / sqrt(var + eps) * weight + bias.

    `group` > 0 normalizes each run of `group` columns on its own with one weight vector of that length (per-head
    norms); then `inp` and `out` may be the same view (in place).
    """

    kind: str
    weight: str
    bias: str | None
    eps: float
    inp: View
    out: View
    group: int = 0


@dataclass(frozen=True)
class MatMul(Op):
    """out[r, o] = sum_i inp[r, i] * W[o, i] (+ bias[o]); inp width n_in, out width n_out."""

    weight: str
    bias: str | None
    inp: View
    out: View


@dataclass(frozen=True)
class Rope(Op):
    """Rotary embedding in place on `n_head` heads of `head_dim` columns of `x`; the first `n_rot` of each turn.

    Pair p (of n_rot/2) turns by angle pos * inv_freq[p]; cos and sin are multiplied by `mscale`. `rope_type`
    "interleaved": columns (2p, 2p+1); "neox": (p, p + n_rot/2). Where `inv_freq_long` is not empty, it takes the place
    of `inv_freq` in sequences that turn by frequency table 1 (`Plan.rope_table`).
    """

    x: View
    n_head: int
    head_dim: int
    n_rot: int
    rope_type: str
    inv_freq: tuple[float, ...]
    mscale: float = 1.0
    inv_freq_long: tuple[float, ...] = ()


@dataclass(frozen=True)
class KvWrite(Op):
    """Store k and v of each row (rounded to float16) in the paged cache of `layer` at the row's position."""

    layer: int
    k: View
    v: View
    n_head_kv: int
    head_dim: int


@dataclass(frozen=True)
class Attention(Op):
    """out[r, h] = softmax(scale * q . k) v over the keys of the row's sequence at positions <= its own.

    Query head h reads KV head h // (n_head // n_head_kv). `window` > 0: keys with q_pos - k_pos >= window are
    masked. `sinks` names a vector [n_head] of logits that enter the softmax denominator only.
    """

    layer: int
    q: View
    out: View
    n_head: int
    n_head_kv: int
    head_dim: int
    scale: float
    window: int = 0
    sinks: str | None = None


@dataclass(frozen=True)
class Glu(Op):
    """out = act(gate) * up. kind "silu": g*sigmoid(g)*u; "gelu_tanh": tanh-GELU(g)*u; "swiglu_oai": g=min(g,7),
    u=clamp(u,-7,7), g*sigmoid(1.702 g)*(u+1). `out` may be `gate` (in place)."""

    kind: str
    gate: View
    up: View
    out: View


@dataclass(frozen=True)
class Act(Op):
    """out = act(inp), elementwise; kind "gelu_tanh". `out` may be `inp` (in place)."""

    kind: str
    inp: View
    out: View


@dataclass(frozen=True)
class Add(Op):
    """out += inp, elementwise (the residual stream)."""

    inp: View
    out: View


@dataclass(frozen=True)
class Route(Op):
    """Router: logits = inp W^T + bias over n_expert; the n_used largest (ties: lower id), softmax over those.

    Writes n_used expert ids (as float32 whole numbers) to `ids` and n_used weights to `gates`, in descending order.
    """

    weight: str
    bias: str | None
    inp: View
    ids: View
    gates: View
    n_expert: int
    n_used: int


@dataclass(frozen=True)
class ExpertMatMul(Op):
    """For each row r and slot s: out[r, s*n_out : (s+1)*n_out] = W[ids[r, s]] x + bias[ids[r, s]].

    x is inp[r] (n_in columns, `per_slot` false) or inp[r, s*n_in : (s+1)*n_in] (`per_slot` true).
    """

    weight: str
    bias: str | None
    ids: View
    inp: View
    out: View
    n_in: int
    n_out: int
    n_expert: int
    n_used: int
    per_slot: bool


@dataclass(frozen=True)
class ExpertSum(Op):
    """out[r] = sum over slots s, in slot order, of gates[r, s] * inp[r, s*n : (s+1)*n]; n = out width."""

    gates: View
    inp: View
    out: View
    n_used: int


@dataclass(frozen=True)
class Gather(Op):
    """out[j] = inp[output_row[j]]: from a "tokens" buffer to an "outputs" buffer."""

    inp: View
    out: View


def output_of(op: Op) -> View:
    """The view an op writes (KvWrite: the keys it stored; Route: the gates)."""
    if isinstance(op, Rope):
        return op.x
    if isinstance(op, KvWrite):
        return op.k
    if isinstance(op, Route):
        return op.gates
    out: View = op.out  # type: ignore[attr-defined]
    return out
