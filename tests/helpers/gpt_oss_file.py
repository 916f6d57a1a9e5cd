"""GPT-OSS-20B as a model file that exists in memory only: the metadata and shapes of the published model."""

from __future__ import annotations

import types

from helpers.fake_file import FakeFile, FakeMetadata

from worker_orcd.gguf import quants

_IDS = {t.name: i for i, t in quants.TYPES.items()}


class GptOssFile(FakeFile):
    """gpt-oss with its published shapes; experts MXFP4, other matrices Q8_0, as in the file of 12.1 GB."""

    path = "gpt-oss-20b.gguf"

    def __init__(self, n_layer: int = 24, **changes: object) -> None:
        self.arch = a = "gpt-oss"
        d, ff, n_vocab, heads, kv, experts = 2880, 2880, 201088, 64, 8, 32
        values = {
            "block_count": n_layer,
            "context_length": 131072,
            "embedding_length": d,
            "attention.head_count": heads,
            "attention.head_count_kv": kv,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.sliding_window": 128,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 150000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
            "expert_count": experts,
            "expert_used_count": 4,
            "expert_feed_forward_length": ff,
        } | {k.replace("__", "."): v for k, v in changes.items()}
        self.metadata = FakeMetadata({f"{a}.{k}": v for k, v in values.items()})
        self.tensors: dict[str, types.SimpleNamespace] = {}
        self._add("token_embd.weight", "Q8_0", d, n_vocab)
        self._add("output.weight", "Q8_0", d, n_vocab)
        self._add("output_norm.weight", "F32", d)
        for i in range(n_layer):
            b = f"blk.{i}."
            for name in ("attn_norm.weight", "post_attention_norm.weight", "attn_output.bias"):
                self._add(b + name, "F32", d)
            for name, out in (("q", 64 * heads), ("k", 64 * kv), ("v", 64 * kv)):
                self._add(f"{b}attn_{name}.weight", "Q8_0", d, out)
                self._add(f"{b}attn_{name}.bias", "F32", out)
            self._add(b + "attn_output.weight", "Q8_0", 64 * heads, d)
            self._add(b + "attn_sinks.weight", "F32", heads)
            self._add(b + "ffn_gate_inp.weight", "F32", d, experts)
            self._add(b + "ffn_gate_inp.bias", "F32", experts)
            for name, n_in, n_out in (("gate", d, ff), ("up", d, ff), ("down", ff, d)):
                self._add(f"{b}ffn_{name}_exps.weight", "MXFP4", n_in, n_out, experts)
                self._add(f"{b}ffn_{name}_exps.bias", "F32", n_out, experts)

    def _add(self, name: str, kind: str, *shape: int) -> None:
        n = quants.TYPES[_IDS[kind]].row_bytes(shape[0])
        for size in shape[1:]:
            n *= size
        self.tensors[name] = types.SimpleNamespace(shape=shape, type_id=_IDS[kind], offset=32, nbytes=n)
