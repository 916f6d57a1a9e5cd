"""What model families are composed of: attention, feed-forward, experts, embedding and output head.

Each block appends its ops to a `Builder`, which checks every weight against the shape that the hyperparameters say.
All of them share two buffers of width n_embd: "x", the residual stream, and "h", what a block works on. A block that
works beside the residual stream norms x into h, computes from there and adds its result to x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from worker_orcd.errors import InternalError, ModelLoadError, quoted
from worker_orcd.models.hparams import HParams
from worker_orcd.models.ops import (
    Act,
    Add,
    Attention,
    Buffer,
    Embed,
    ExpertMatMul,
    ExpertSum,
    Gather,
    Glu,
    KvWrite,
    MatMul,
    Norm,
    Op,
    Rope,
    Route,
    View,
    Weight,
)

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

VECTOR_TYPES = frozenset({0, 1, 30})  # F32, F16, BF16


class Builder:
    """Collects buffers, weights and ops of one plan, checking each tensor against the shape the model wants.

    Attributes:
        buffers, weights, ops: as `Plan` has them.
        max_positions: hard limit of positions (learned position table), or None.
    """

    def __init__(self, mf: ModelFile) -> None:
        self.mf = mf
        self.buffers: dict[str, Buffer] = {}
        self.weights: dict[str, Weight] = {}
        self.ops: list[Op] = []
        self.max_positions: int | None = None

    def buffer(self, name: str, width: int, rows: str = "tokens") -> View:
        """The whole of a buffer; made where there is none of that name yet."""
        buffer = self.buffers.setdefault(name, Buffer(name, width, rows))
        if buffer != Buffer(name, width, rows):
            raise InternalError(f"buffer {name!r} is {buffer.width} wide for {buffer.rows}, not {width} for {rows}")
        return View(name, 0, width)

    def weight(self, name: str, kind: str, *shape: int) -> str:
        """Claim the tensor `name`, in GGUF order of its shape (trailing ones mean nothing); returns the name.

        Raises:
            ModelLoadError: it is missing, of another shape, or a vector in a quantized type.
        """
        info = self.mf.tensors.get(name)
        if info is None:
            raise ModelLoadError(f"tensor {quoted(name)} is missing", self.mf.path, field=name)
        if _trimmed(info.shape) != _trimmed(shape):
            raise ModelLoadError(f"tensor {quoted(name)}: shape {list(info.shape)}, the hyperparameters say "
                                 f"{list(shape)}", self.mf.path, info.offset, field=name)  # fmt: skip
        if kind in ("vector", "expert_vectors") and info.type_id not in VECTOR_TYPES:
            raise ModelLoadError(f"tensor {quoted(name)}: a vector must be F32, F16 or BF16", self.mf.path, info.offset,
                                 field=name)  # fmt: skip
        self.weights[name] = Weight(name, kind, shape, info.type_id)
        return name

    def bias(self, rule: str, name: str, *shape: int) -> str | None:
        """Claim a bias by the row's rule: "no", "maybe" (where the file has it) or "yes"."""
        if rule == "no" or (rule == "maybe" and name not in self.mf.tensors):
            return None
        return self.weight(name, "vector" if len(shape) == 1 else "expert_vectors", *shape)

    def norm(self, name: str, hp: HParams, inp: View, out: View) -> None:
        """A norm of the row's kind over whole rows."""
        w = self.weight(f"{name}.weight", "vector", hp.n_embd)
        b = self.weight(f"{name}.bias", "vector", hp.n_embd) if hp.arch.norm == "layer" else None
        self.ops.append(Norm(name, hp.arch.norm, w, b, hp.norm_eps, inp, out))

    def matmul(self, name: str, bias_rule: str, inp: View, out: View) -> None:
        """A product with the matrix `name`.weight, of the views' widths."""
        w = self.weight(f"{name}.weight", "matrix", inp.width, out.width)
        self.ops.append(MatMul(name, w, self.bias(bias_rule, f"{name}.bias", out.width), inp, out))


#: appends the ops of one part of layer `layer`
LayerBlock = Callable[[Builder, HParams, int], None]


def decoder(b: Builder, hp: HParams, *layer_blocks: LayerBlock) -> None:
    """The embedding, `layer_blocks` in turn for each layer, the output head."""
    embedding(b, hp)
    for layer in range(hp.n_layer):
        for block in layer_blocks:
            block(b, hp, layer)
    output_head(b, hp)


def embedding(b: Builder, hp: HParams) -> None:
    """x = rows of the embedding; without a rotation plus those of a learned position table.

    Raises:
        ModelLoadError: no embedding matrix, or another vocabulary than the file claims.
    """
    embd = b.mf.tensors.get("token_embd.weight")
    if embd is None or len(embd.shape) != 2:
        raise ModelLoadError("tensor 'token_embd.weight' is missing or no matrix", b.mf.path, field="token_embd.weight")
    n_vocab = embd.shape[1]
    claimed = b.mf.get_int(f"{hp.arch.name}.vocab_size", 1, 1 << 24, n_vocab)
    if claimed != n_vocab:
        raise b.mf.error(f"{hp.arch.name}.vocab_size", f"is {claimed}, but token_embd.weight holds {n_vocab} rows")
    x, _ = _x_and_h(b, hp)
    positions = None
    if not hp.arch.rope_type:
        table = b.mf.tensors.get("position_embd.weight")
        b.max_positions = table.shape[1] if table is not None and len(table.shape) == 2 else hp.context_length
        positions = b.weight("position_embd.weight", "embedding", hp.n_embd, b.max_positions)
    b.ops.append(Embed("embed", b.weight("token_embd.weight", "embedding", hp.n_embd, n_vocab), x, 1.0, positions))


def output_head(b: Builder, hp: HParams) -> None:
    """logits = output norm(x) times `output.weight`, or the embedding where the file has none; rows of outputs only."""
    x, _ = _x_and_h(b, hp)
    n_vocab = b.weights["token_embd.weight"].shape[1]
    x_out = b.buffer("x_out", hp.n_embd, "outputs")
    h_out = b.buffer("h_out", hp.n_embd, "outputs")
    logits = b.buffer("logits", n_vocab, "outputs")
    b.ops.append(Gather("gather", x, x_out))
    b.norm("output_norm", hp, x_out, h_out)
    tied = "output.weight" not in b.mf.tensors
    head = "token_embd.weight" if tied else b.weight("output.weight", "matrix", hp.n_embd, n_vocab)
    b.ops.append(MatMul("logits", head, b.bias("maybe", "output.bias", n_vocab), h_out, logits))


def attention(b: Builder, hp: HParams, layer: int) -> None:
    """x += attention(norm(x)); q, k and v live side by side in the buffer "qkv".

    Their weights are three tensors, or one: `attn_qkv`, the rows of q, then of k, then of v.
    """
    row, p = hp.arch, f"blk.{layer}"
    x, h = _x_and_h(b, hp)
    n_q, n_kv = hp.n_head * hp.head_dim, hp.n_head_kv * hp.head_dim
    b.norm(f"{p}.attn_norm", hp, x, h)
    qkv = b.buffer("qkv", n_q + 2 * n_kv)
    q, k, v = View("qkv", 0, n_q), View("qkv", n_q, n_kv), View("qkv", n_q + n_kv, n_kv)
    if f"{p}.attn_qkv.weight" in b.mf.tensors:
        b.matmul(f"{p}.attn_qkv", row.qkv_bias, h, qkv)
    else:
        bias = row.qkv_bias
        if bias == "maybe":  # all three or none
            bias = "yes" if any(f"{p}.attn_{name}.bias" in b.mf.tensors for name in "qkv") else "no"
        for name, out in (("q", q), ("k", k), ("v", v)):
            b.matmul(f"{p}.attn_{name}", bias, h, out)
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


def ffn(b: Builder, hp: HParams, layer: int) -> None:
    """x += feed-forward(norm(x)); gate and up live side by side in the buffer "ffn".

    Their weights are two tensors, or one: `ffn_up`, the rows of gate, then of up.
    """
    row, p = hp.arch, f"blk.{layer}"
    x, h = _x_and_h(b, hp)
    b.norm(f"{p}.{row.ffn_norm}", hp, x, h)
    if row.ffn == "mlp":
        up = b.buffer("ffn", hp.n_ff)
        b.matmul(f"{p}.ffn_up", row.ffn_bias, h, up)
        b.ops.append(Act(f"{p}.ffn_act", row.act, up, up))
        b.matmul(f"{p}.ffn_down", row.ffn_bias, up, h)
    else:
        both = b.buffer("ffn", 2 * hp.n_ff)
        gate, up = View("ffn", 0, hp.n_ff), View("ffn", hp.n_ff, hp.n_ff)
        if f"{p}.ffn_gate.weight" in b.mf.tensors or _n_rows(b, f"{p}.ffn_up.weight") in (None, hp.n_ff):
            b.matmul(f"{p}.ffn_gate", row.ffn_bias, h, gate)
            b.matmul(f"{p}.ffn_up", row.ffn_bias, h, up)
        else:
            b.matmul(f"{p}.ffn_up", row.ffn_bias, h, both)
        b.ops.append(Glu(f"{p}.ffn_glu", row.act, gate, up, gate))
        b.matmul(f"{p}.ffn_down", row.ffn_bias, gate, h)
    b.ops.append(Add(f"{p}.ffn_residual", h, x))


def moe(b: Builder, hp: HParams, layer: int) -> None:
    """x += sum of the chosen experts' feed-forwards of norm(x), in slot order."""
    row, p = hp.arch, f"blk.{layer}"
    x, h = _x_and_h(b, hp)
    n, used, n_ff, n_embd = hp.n_expert, hp.n_expert_used, hp.n_ff, hp.n_embd
    b.norm(f"{p}.{row.ffn_norm}", hp, x, h)
    ids, gates = b.buffer("expert_ids", used), b.buffer("expert_gates", used)
    b.buffer("expert_hidden", 2 * used * n_ff)
    gate, up = View("expert_hidden", 0, used * n_ff), View("expert_hidden", used * n_ff, used * n_ff)
    down = b.buffer("expert_out", used * n_embd)
    b.ops.append(Route(f"{p}.route", b.weight(f"{p}.ffn_gate_inp.weight", "matrix", n_embd, n),
                       b.bias(row.ffn_bias, f"{p}.ffn_gate_inp.bias", n), h, ids, gates, n, used))  # fmt: skip

    def product(name: str, inp: View, out: View, n_in: int, n_out: int, per_slot: bool) -> None:
        w = b.weight(f"{p}.{name}.weight", "experts", n_in, n_out, n)
        bias = b.bias(row.ffn_bias, f"{p}.{name}.bias", n_out, n)
        b.ops.append(ExpertMatMul(f"{p}.{name}", w, bias, ids, inp, out, n_in, n_out, n, used, per_slot))

    product("ffn_gate_exps", h, gate, n_embd, n_ff, False)
    product("ffn_up_exps", h, up, n_embd, n_ff, False)
    b.ops.append(Glu(f"{p}.ffn_glu", row.act, gate, up, gate))
    product("ffn_down_exps", gate, down, n_ff, n_embd, True)
    b.ops.append(ExpertSum(f"{p}.expert_sum", gates, down, h, used))
    b.ops.append(Add(f"{p}.ffn_residual", h, x))


def _n_rows(b: Builder, name: str) -> int | None:
    """Rows of the matrix `name`; None where the file has none."""
    info = b.mf.tensors.get(name)
    return info.shape[1] if info is not None and len(info.shape) == 2 else None


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its trailing ones, which GGUF may write or not."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _x_and_h(b: Builder, hp: HParams) -> tuple[View, View]:
    """The residual stream and the buffer that blocks work in."""
    return b.buffer("x", hp.n_embd), b.buffer("h", hp.n_embd)
