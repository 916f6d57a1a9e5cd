"""The oracle: a plan interpreted in NumPy with float64 accumulation, plain enough to be read beside the formulas.

It shares nothing with the engines but the plan ops. Weights are dequantized by `helpers.quant_blocks`. The KV cache
is a dict of positions per (layer, slot), rounded to float16 as the engines do (`kv_dtype`).
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from helpers.quant_blocks import dequantized

from worker_orcd.models.ops import View, output_of
from worker_orcd.models.plan import Plan


def dequantize(info, data) -> np.ndarray:
    """A tensor as float64 [..., n_out, n_in] (GGUF shape reversed)."""
    values = dequantized(info.type_id, np.frombuffer(data, np.uint8)[None])
    return values.astype(np.float64).reshape(info.shape[::-1])


def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


class NumpyEngine:
    """Interprets `plan` over ragged batches. `run` returns the buffer of `stop_after`, or the logits."""

    def __init__(self, model_file, plan: Plan, kv_dtype=np.float16) -> None:
        self.mf, self.plan, self.kv_dtype = model_file, plan, kv_dtype
        self.weights: dict[str, np.ndarray] = {}
        self.rope_tables: dict[int, int] = defaultdict(int)  # slot -> index of its frequency table
        self.kv = defaultdict(dict)  # (layer, slot) -> {position: (k, v)} each [n_head_kv, head_dim]

    def w(self, name: str) -> np.ndarray:
        if name not in self.weights:
            self.weights[name] = dequantize(self.mf.tensors[name], self.mf.view(name))
        return self.weights[name]

    def run(self, tokens, positions, slots, output_indices, stop_after: str | None = None) -> np.ndarray:
        rows = {"tokens": len(tokens), "outputs": len(output_indices)}
        self.buf = {b.name: np.full((rows[b.rows], b.width), np.nan) for b in self.plan.buffers.values()}
        self.tokens, self.pos, self.slots, self.output_indices = (
            np.asarray(a) for a in (tokens, positions, slots, output_indices)
        )
        for op in self.plan.ops:
            getattr(self, type(op).__name__.lower())(op)
            if op.name == stop_after:
                return self.buf[output_of(op).buf]
        if stop_after is not None:
            raise KeyError(stop_after)
        return self.buf["logits"]

    def get(self, v: View) -> np.ndarray:
        return self.buf[v.buf][:, v.offset : v.offset + v.width]

    def embed(self, op):
        x = self.w(op.weight)[self.tokens] * op.scale
        if op.positions:
            x = x + self.w(op.positions)[self.pos]
        self.get(op.out)[:] = x

    def norm(self, op):
        x = self.get(op.inp)
        shape = x.shape
        if op.group:
            x = x.reshape(shape[0], -1, op.group)
        if op.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + op.eps) * self.w(op.weight)
        if op.bias:
            y = y + self.w(op.bias)
        self.get(op.out)[:] = y.reshape(shape)

    def matmul(self, op):
        y = self.get(op.inp) @ self.w(op.weight).T
        self.get(op.out)[:] = y + self.w(op.bias) if op.bias else y

    def rope(self, op):
        x = self.get(op.x).reshape(-1, op.n_head, op.head_dim)
        tables = (op.inv_freq, op.inv_freq_long or op.inv_freq)
        inv_freq = [tables[self.rope_tables[int(slot)]] for slot in self.slots]
        angle = self.pos[:, None] * np.asarray(inv_freq)
        cos, sin = (f(angle)[:, None] * op.mscale for f in (np.cos, np.sin))
        n = op.n_rot
        a, b = (
            (slice(0, n, 2), slice(1, n, 2)) if op.rope_type == "interleaved" else (slice(0, n // 2), slice(n // 2, n))
        )
        xa, xb = x[..., a].copy(), x[..., b].copy()
        x[..., a], x[..., b] = xa * cos - xb * sin, xa * sin + xb * cos
        self.get(op.x)[:] = x.reshape(len(x), -1)

    def kvwrite(self, op):
        k, v = (self.get(t).astype(np.float32).astype(self.kv_dtype).astype(np.float64) for t in (op.k, op.v))
        for r, (p, s) in enumerate(zip(self.pos, self.slots, strict=True)):
            self.kv[op.layer, s][int(p)] = (k[r].reshape(-1, op.head_dim), v[r].reshape(-1, op.head_dim))

    def attention(self, op):
        q = self.get(op.q).reshape(-1, op.n_head, op.head_dim)
        group = op.n_head // op.n_head_kv
        for r, (p, s) in enumerate(zip(self.pos, self.slots, strict=True)):
            first = max(0, int(p) - op.window + 1) if op.window else 0
            cache = self.kv[op.layer, s]
            k = np.stack([cache[j][0] for j in range(first, int(p) + 1)])  # [n, n_head_kv, head_dim]
            v = np.stack([cache[j][1] for j in range(first, int(p) + 1)])
            k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
            s_ = np.einsum("hd,nhd->hn", q[r], k) * op.scale
            top = s_.max(1, keepdims=True)
            if op.sinks:
                sink = self.w(op.sinks)[:, None]
                top = np.maximum(top, sink)
            e = np.exp(s_ - top)
            total = e.sum(1, keepdims=True) + (np.exp(sink - top) if op.sinks else 0)
            self.get(op.out)[r] = np.einsum("hn,nhd->hd", e / total, v).ravel()

    def glu(self, op):
        g, u = self.get(op.gate), self.get(op.up)
        if op.kind == "silu":
            y = g * sigmoid(g) * u
        elif op.kind == "gelu_tanh":
            y = gelu_tanh(g) * u
        else:  # swiglu_oai
            g, u = np.minimum(g, 7), np.clip(u, -7, 7)
            y = g * sigmoid(1.702 * g) * (u + 1)
        self.get(op.out)[:] = y

    def act(self, op):
        self.get(op.out)[:] = gelu_tanh(self.get(op.inp))

    def add(self, op):
        self.get(op.out)[:] += self.get(op.inp)

    def route(self, op):
        logits = self.get(op.inp) @ self.w(op.weight).T + (self.w(op.bias) if op.bias else 0)
        ids = np.argsort(-logits, axis=1, kind="stable")[:, : op.n_used]
        e = np.exp(np.take_along_axis(logits, ids, 1) - logits.max(1, keepdims=True))
        self.get(op.ids)[:] = ids
        self.get(op.gates)[:] = e / e.sum(1, keepdims=True)

    def expertmatmul(self, op):
        ids = self.get(op.ids).astype(int)
        w, x, out = self.w(op.weight), self.get(op.inp), self.get(op.out)
        bias = self.w(op.bias) if op.bias else np.zeros((op.n_expert, op.n_out))
        for r in range(len(ids)):
            for s, e in enumerate(ids[r]):
                row = x[r, s * op.n_in : (s + 1) * op.n_in] if op.per_slot else x[r]
                out[r, s * op.n_out : (s + 1) * op.n_out] = w[e] @ row + bias[e]

    def expertsum(self, op):
        gates, x = self.get(op.gates), self.get(op.inp)
        x = x.reshape(len(x), op.n_used, -1)
        self.get(op.out)[:] = (gates[:, :, None] * x).sum(1)

    def gather(self, op):
        self.get(op.out)[:] = self.get(op.inp)[self.output_indices]
