"""A plan that holds every op and every tensor type with sizes that fit no vector, and random weights for it.

It is no model: ops are chained so that each has something to chew on. Engines and the oracle can run it without
any file.
"""

from __future__ import annotations

import types

import numpy as np
from helpers.quant_blocks import random_blocks

from worker_orcd.gguf import quants
from worker_orcd.models.ops import (
    GLU_ACTIVATIONS,
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
    Rope,
    Route,
    View,
    Weight,
)
from worker_orcd.models.plan import KvGroup, Plan

N_VOCAB, N_POSITIONS, WINDOW = 77, 200, 40


class MemoryFile:
    """Tensors in memory, with what engines and the oracle use of `ModelFile`."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, types.SimpleNamespace] = {}
        self.data: dict[str, bytes] = {}
        self.checks = 0

    def add(self, name: str, type_name: str, *shape: int, scale: float = 1.0) -> Weight:
        t = quants.BY_NAME[type_name]
        rows = int(np.prod(shape[1:], dtype=int)) if len(shape) > 1 else 1
        if t.block_size == 1:
            x = self.rng.standard_normal(rows * shape[0]).astype(np.float32) * scale / shape[0] ** 0.5
            if len(shape) == 1:
                x = 1 + x * shape[0] ** 0.5 / 4
            bf16 = (x.view(np.uint32) >> 16).astype(np.uint16)
            raw = {"F32": x, "F16": x.astype(np.float16), "BF16": bf16}[type_name]
        else:
            raw = random_blocks(t.id, rows, shape[0], self.rng, (116, 122))
        self.data[name] = raw.tobytes()
        self.tensors[name] = types.SimpleNamespace(name=name, shape=shape, type_id=t.id, offset=0)
        kind = "vector" if len(shape) == 1 else "matrix" if len(shape) == 2 else "experts"
        return Weight(name, kind, shape, t.id)

    def view(self, name: str) -> memoryview:
        return memoryview(self.data[name])

    def check_unchanged(self, same_path: bool = True) -> None:
        self.checks += 1


def every_op(seed: int = 0) -> tuple[MemoryFile, Plan]:
    """The file and the plan. Width 100, 6 query and 2 KV heads of 20, a window of 40, 5 experts of which 3 are used."""
    mf, weights, buffers, ops = MemoryFile(seed), {}, {}, []

    def w(name, type_name, *shape):
        weights[name] = mf.add(name, type_name, *shape)
        return name

    def buf(name, width, rows="tokens"):
        buffers[name] = Buffer(name, width, rows)
        return View(name, 0, width)

    x, h = buf("x", 100), buf("h", 100)
    buf("qkv", 200)
    q, k, v = View("qkv", 0, 120), View("qkv", 120, 40), View("qkv", 160, 40)
    ops += [
        Embed("embed", w("token_embd", "BF16", 100, N_VOCAB), x, 1.5, w("position_embd", "F16", 100, N_POSITIONS)),
        Norm("norm_rms", "rms", w("norm_rms.w", "F32", 100), None, 1e-5, x, h),
        MatMul("q", w("q.w", "F16", 100, 120), w("q.b", "F32", 120), h, q),
        MatMul("kv", w("kv.w", "F32", 100, 80), None, h, View("qkv", 120, 80)),
        Norm("norm_q", "rms", w("norm_q.w", "F16", 20), None, 1e-6, q, q, 20),
    ]
    inv_freq = tuple(0.7**i for i in range(6))
    ops += [
        Rope("rope_q", q, 6, 20, 12, "neox", inv_freq, 1.25, tuple(0.5 * f for f in inv_freq)),
        Rope("rope_k", k, 2, 20, 12, "interleaved", inv_freq, 1.25),
    ]
    att = buf("att", 120)
    for layer, window, sinks in ((0, 0, None), (1, WINDOW, w("sinks", "F32", 6))):
        ops += [
            KvWrite(f"kv_write.{layer}", layer, k, v, 2, 20),
            Attention(f"attention.{layer}", layer, q, att, 6, 2, 20, 20**-0.5, window, sinks),
            MatMul(f"att_out.{layer}", w(f"o{layer}.w", "BF16", 120, 100), None, att, h),
            Add(f"att_add.{layer}", h, x),
        ]
    ops.append(Norm("norm_layer", "layer", w("norm_layer.w", "BF16", 100), w("norm_layer.b", "F16", 100), 1e-3, x, h))
    wide = buf("wide", 256)
    ops.append(MatMul("widen", w("widen.w", "F16", 100, 256), None, h, wide))
    for t in quants.TYPES.values():
        out = buf(f"out_{t.name}", 37)
        ops.append(MatMul(f"matmul_{t.name}", w(f"{t.name}.w", t.name, 256, 37), None, wide, out))
    glu = buf("glu", 18)
    for kind in GLU_ACTIVATIONS:
        ops.append(Glu(f"glu_{kind}", kind, View("out_F32", 0, 18), View("out_F16", 19, 18), glu))
    ops.append(Act("act", "gelu_tanh", View("out_F32", 0, 37), View("out_F32", 0, 37)))
    ids, gates = buf("ids", 3), buf("gates", 3)
    hidden, down, routed = buf("hidden", 3 * 64), buf("down", 3 * 100), buf("routed", 3 * 19)
    ops += [
        Route("route", w("route.w", "F32", 100, 5), w("route.b", "F32", 5), h, ids, gates, 5, 3),
        ExpertMatMul(
            "up_exps", w("up.w", "F16", 100, 64, 5), w("up.b", "F32", 64, 5), ids, h, hidden, 100, 64, 5, 3, False
        ),
        ExpertMatMul("down_exps", w("down.w", "MXFP4", 64, 100, 5), None, ids, hidden, down, 64, 100, 5, 3, True),
        ExpertSum("expert_sum", gates, down, h, 3),
        ExpertMatMul("odd_exps", w("odd.w", "BF16", 100, 19, 5), None, ids, down, routed, 100, 19, 5, 3, True),
        Add("ffn_add", h, x),
    ]
    xo, logits = buf("x_out", 100, "outputs"), buf("logits", N_VOCAB, "outputs")
    ops += [
        Gather("gather", x, xo),
        Norm("output_norm", "rms", "norm_rms.w", None, 1e-5, xo, xo),
        MatMul("logits", "token_embd", None, xo, logits),
    ]
    groups = (KvGroup(0, (0,)), KvGroup(WINDOW, (1,)))
    sizes = {"n_embd": 100, "n_layer": 2, "n_head_kv": 2, "head_dim": 20, "n_vocab": N_VOCAB}
    plan = Plan("synthetic", **sizes, context_length=N_POSITIONS, max_positions=N_POSITIONS, buffers=buffers,
                  weights=weights, ops=tuple(ops), kv_groups=groups, kv_group_of=(0, 1),
                  rope_orig_context=128)  # fmt: skip
    return mf, plan
