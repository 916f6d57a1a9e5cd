"""The plan: a model as a flat list of ops.

`build` turns an architecture row (`arch.py`), hyperparameters and the tensor table into a `Plan`. Engines
interpret it (`_cpu`, `_engine`, the NumPy oracle of the tests); this module knows none of them, no file and no kernel.

Conventions of every op:
- Activations are float32 matrices [rows, width], row-major; a `View` is a column range of one. `rows` of a buffer is
  "tokens" (one row per row of the step's ragged batch) or "outputs" (one per row whose next token is wanted).
- A weight is named by its GGUF tensor name. A matrix has GGUF shape (n_in, n_out): row o holds the n_in weights of
  output o, in blocks of its type. A vector is float32 of the given length.
- Ops run in order; an op may read and write the same view only where its docstring says "in place".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker_orcd.errors import ModelLoadError
from worker_orcd.models.arch import HParams, hparams

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile


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
    of `inv_freq` in sequences of more than the plan's `rope_orig_context` positions.
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
    """out = act(gate) * up. kind "silu": g*sigmoid(g)*u; "gelu": tanh-GELU(g)*u; "swiglu_oai": g=min(g,7),
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

    def kv_bytes_per_token(self) -> int:
        """float16 K and V of one position over all layers, in bytes."""
        return self.n_layer * 2 * self.n_head_kv * self.head_dim * 2

    def weight_bytes_per_token(self, row_bytes: dict[str, int]) -> int:
        """Bytes of weights one token must read.

        Args:
            row_bytes: bytes of each tensor by name, as stored in the file.

        Returns:
            All weights once; of an embedding that is only looked up, one row; of experts, the n_used of n_expert.
        """
        used = {op.name: op for op in self.ops if isinstance(op, ExpertMatMul)}
        share = {op.weight: op.n_used / op.n_expert for op in used.values()}
        multiplied = {op.weight for op in self.ops if isinstance(op, MatMul)}
        total = 0.0
        for w in self.weights.values():
            if w.kind == "embedding" and w.name not in multiplied:
                total += row_bytes[w.name] / w.shape[1]
            else:
                total += row_bytes[w.name] * share.get(w.name, 1.0)
        return int(total)


def output_of(op: Op) -> View:
    """The view an op writes (KvWrite: the keys it stored; Route: the gates)."""
    if isinstance(op, Rope):
        return op.x
    if isinstance(op, KvWrite):
        return op.k
    if isinstance(op, Route):
        return op.gates
    return op.out  # type: ignore[attr-defined]


VECTOR_TYPES = frozenset({0, 1, 30})  # F32, F16, BF16


class _Builder:
    """Collects buffers, weights and ops of one plan, checking each tensor against the shape the model wants."""

    def __init__(self, mf: ModelFile) -> None:
        self.mf = mf
        self.buffers: dict[str, Buffer] = {}
        self.weights: dict[str, Weight] = {}
        self.ops: list[Op] = []

    def buffer(self, name: str, width: int, rows: str = "tokens") -> View:
        self.buffers[name] = Buffer(name, width, rows)
        return View(name, 0, width)

    def weight(self, name: str, kind: str, *shape: int) -> str:
        info = self.mf.tensors.get(name)
        if info is None:
            raise ModelLoadError(f"tensor {name!r} is missing", self.mf.path, field=name)
        if info.shape != shape:
            raise ModelLoadError(f"tensor {name!r}: shape {list(info.shape)}, the hyperparameters say {list(shape)}",
                                 self.mf.path, info.offset, field=name)  # fmt: skip
        if kind in ("vector", "expert_vectors") and info.type_id not in VECTOR_TYPES:
            raise ModelLoadError(f"tensor {name!r}: a vector must be F32, F16 or BF16", self.mf.path, info.offset,
                                 field=name)  # fmt: skip
        self.weights[name] = Weight(name, kind, shape, info.type_id)
        return name

    def bias(self, rule: str, name: str, *shape: int) -> str | None:
        if rule == "no" or (rule == "maybe" and name not in self.mf.tensors):
            return None
        return self.weight(name, "vector" if len(shape) == 1 else "expert_vectors", *shape)

    def norm(self, name: str, hp: HParams, inp: View, out: View) -> None:
        w = self.weight(f"{name}.weight", "vector", hp.n_embd)
        b = self.weight(f"{name}.bias", "vector", hp.n_embd) if hp.arch.norm == "layer" else None
        self.ops.append(Norm(name, hp.arch.norm, w, b, hp.norm_eps, inp, out))

    def matmul(self, name: str, bias_rule: str, inp: View, out: View) -> None:
        w = self.weight(f"{name}.weight", "matrix", inp.width, out.width)
        self.ops.append(MatMul(name, w, self.bias(bias_rule, f"{name}.bias", out.width), inp, out))


def build(mf: ModelFile, context_length: int | None = None) -> Plan:
    """Turn a model file into a plan.

    Args:
        mf: the open file; only metadata and the tensor table are read (and the divisor vectors of rotary scaling).
        context_length: positions that will be served, where known (a window that is as wide masks nothing).

    Raises:
        ModelLoadError: unsupported architecture, hyperparameters out of range, tensors missing, left over or of
            another shape than the hyperparameters say; names the key or tensor.
    """
    hp = hparams(mf, context_length)
    b = _Builder(mf)
    embd = mf.tensors.get("token_embd.weight")
    if embd is None or len(embd.shape) != 2:
        raise ModelLoadError("tensor 'token_embd.weight' is missing or no matrix", mf.path, field="token_embd.weight")
    n_vocab = embd.shape[1]
    claimed = mf.get_int(f"{hp.arch.name}.vocab_size", 1, 1 << 24, n_vocab)
    if claimed != n_vocab:
        raise mf.error(f"{hp.arch.name}.vocab_size", f"is {claimed}, but token_embd.weight holds {n_vocab} rows")
    x = b.buffer("x", hp.n_embd)
    h = b.buffer("h", hp.n_embd)
    positions, max_positions = None, None
    if not hp.arch.rope_type:
        table = mf.tensors.get("position_embd.weight")
        max_positions = table.shape[1] if table is not None and len(table.shape) == 2 else hp.context_length
        positions = b.weight("position_embd.weight", "embedding", hp.n_embd, max_positions)
    b.ops.append(Embed("embed", b.weight("token_embd.weight", "embedding", hp.n_embd, n_vocab), x, 1.0, positions))
    for layer in range(hp.n_layer):
        _attention(b, hp, layer, x, h)
        _feed_forward(b, hp, layer, x, h)
    xo = b.buffer("x_out", hp.n_embd, "outputs")
    ho = b.buffer("h_out", hp.n_embd, "outputs")
    logits = b.buffer("logits", n_vocab, "outputs")
    b.ops.append(Gather("gather", x, xo))
    b.norm("output_norm", hp, xo, ho)
    tied = "output.weight" not in mf.tensors
    head = "token_embd.weight" if tied else b.weight("output.weight", "matrix", hp.n_embd, n_vocab)
    b.ops.append(MatMul("logits", head, b.bias("maybe", "output.bias", n_vocab), ho, logits))
    rope_extra = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    for name, info in mf.tensors.items():
        if name not in b.weights and name not in rope_extra:
            raise ModelLoadError(f"tensor {name!r} has no place in architecture {hp.arch.name} with "
                                 f"{hp.n_layer} layers", mf.path, info.offset, field=name)  # fmt: skip
    windows = [hp.layer_window(i) for i in range(hp.n_layer)]
    groups = tuple(KvGroup(w, tuple(i for i, v in enumerate(windows) if v == w)) for w in sorted(set(windows)))
    return Plan(
        arch=hp.arch.name, n_vocab=n_vocab, n_embd=hp.n_embd, n_layer=hp.n_layer, n_head_kv=hp.n_head_kv,
        head_dim=hp.head_dim, context_length=hp.context_length, max_positions=max_positions, buffers=b.buffers,
        weights=b.weights, ops=tuple(b.ops), kv_groups=groups,
        kv_group_of=tuple(next(g for g, grp in enumerate(groups) if i in grp.layers) for i in range(hp.n_layer)),
        rope_orig_context=hp.rope_orig_context,
    )  # fmt: skip


def _attention(b: _Builder, hp: HParams, layer: int, x: View, h: View) -> None:
    """x += attention(norm(x)); q, k and v live side by side in the buffer "qkv" whether fused or not."""
    row, p = hp.arch, f"blk.{layer}"
    n_q, n_kv = hp.n_head * hp.head_dim, hp.n_head_kv * hp.head_dim
    b.norm(f"{p}.attn_norm", hp, x, h)
    qkv = b.buffer("qkv", n_q + 2 * n_kv)
    q, k, v = View("qkv", 0, n_q), View("qkv", n_q, n_kv), View("qkv", n_q + n_kv, n_kv)
    if row.fused_qkv:
        b.matmul(f"{p}.attn_qkv", row.qkv_bias, h, qkv)
    else:
        for name, out in (("q", q), ("k", k), ("v", v)):
            b.matmul(f"{p}.attn_{name}", row.qkv_bias, h, out)
    if row.qk_norm:
        for name, view in (("q", q), ("k", k)):
            w = b.weight(f"{p}.attn_{name}_norm.weight", "vector", hp.head_dim)
            b.ops.append(Norm(f"{p}.attn_{name}_norm", "rms", w, None, hp.norm_eps, view, view, hp.head_dim))
    if row.rope_type:
        for name, view, n in (("q", q, hp.n_head), ("k", k, hp.n_head_kv)):
            b.ops.append(Rope(f"{p}.rope_{name}", view, n, hp.head_dim, hp.n_rot, row.rope_type, hp.inv_freq,
                              hp.rope_mscale, hp.inv_freq_long))  # fmt: skip
    b.ops.append(KvWrite(f"{p}.kv_write", layer, k, v, hp.n_head_kv, hp.head_dim))
    att = b.buffer("att", n_q)
    sinks = b.weight(f"{p}.attn_sinks.weight", "vector", hp.n_head) if row.sinks else None
    b.ops.append(Attention(f"{p}.attention", layer, q, att, hp.n_head, hp.n_head_kv, hp.head_dim, hp.head_dim**-0.5,
                           hp.layer_window(layer), sinks))  # fmt: skip
    b.matmul(f"{p}.attn_output", row.out_bias, att, h)
    b.ops.append(Add(f"{p}.attn_residual", h, x))


def _feed_forward(b: _Builder, hp: HParams, layer: int, x: View, h: View) -> None:
    """x += ffn(norm(x)); gate and up live side by side in the buffer "ffn"."""
    row, p = hp.arch, f"blk.{layer}"
    b.norm(f"{p}.{row.ffn_norm}", hp, x, h)
    if row.ffn == "moe":
        _experts(b, hp, layer, h)
    elif row.ffn == "mlp":
        up = b.buffer("ffn", hp.n_ff)
        b.matmul(f"{p}.ffn_up", row.ffn_bias, h, up)
        b.ops.append(Act(f"{p}.ffn_act", row.act, up, up))
        b.matmul(f"{p}.ffn_down", row.ffn_bias, up, h)
    else:
        both = b.buffer("ffn", 2 * hp.n_ff)
        gate, up = View("ffn", 0, hp.n_ff), View("ffn", hp.n_ff, hp.n_ff)
        if row.ffn == "glu_fused":
            b.matmul(f"{p}.ffn_up", row.ffn_bias, h, both)
        else:
            b.matmul(f"{p}.ffn_gate", row.ffn_bias, h, gate)
            b.matmul(f"{p}.ffn_up", row.ffn_bias, h, up)
        b.ops.append(Glu(f"{p}.ffn_glu", row.act, gate, up, gate))
        b.matmul(f"{p}.ffn_down", row.ffn_bias, gate, h)
    b.ops.append(Add(f"{p}.ffn_residual", h, x))


def _experts(b: _Builder, hp: HParams, layer: int, h: View) -> None:
    """h = sum of the chosen experts' feed-forwards of h, in slot order."""
    row, p = hp.arch, f"blk.{layer}"
    n, used, ff, embd = hp.n_expert, hp.n_expert_used, hp.n_ff, hp.n_embd
    ids, gates = b.buffer("expert_ids", used), b.buffer("expert_gates", used)
    b.buffer("expert_hidden", 2 * used * ff)
    gate, up = View("expert_hidden", 0, used * ff), View("expert_hidden", used * ff, used * ff)
    down = b.buffer("expert_out", used * embd)
    b.ops.append(Route(f"{p}.route", b.weight(f"{p}.ffn_gate_inp.weight", "matrix", embd, n),
                       b.bias(row.ffn_bias, f"{p}.ffn_gate_inp.bias", n), h, ids, gates, n, used))  # fmt: skip

    def product(name: str, inp: View, out: View, n_in: int, n_out: int, per_slot: bool) -> None:
        w = b.weight(f"{p}.{name}.weight", "experts", n_in, n_out, n)
        bias = b.bias(row.ffn_bias, f"{p}.{name}.bias", n_out, n)
        b.ops.append(ExpertMatMul(f"{p}.{name}", w, bias, ids, inp, out, n_in, n_out, n, used, per_slot))

    product("ffn_gate_exps", h, gate, embd, ff, False)
    product("ffn_up_exps", h, up, embd, ff, False)
    b.ops.append(Glu(f"{p}.ffn_glu", row.act, gate, up, gate))
    product("ffn_down_exps", gate, down, ff, embd, True)
    b.ops.append(ExpertSum(f"{p}.expert_sum", gates, down, h, used))
