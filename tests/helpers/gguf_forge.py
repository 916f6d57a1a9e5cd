"""GGUF files put together byte by byte, so that each byte can be wrong. Knows the format; nothing of the project.

A `Forge` is a file as lists of keys and tensors; `build` writes what it is told, be it nonsense. `tiny_llama` and
`tiny_vocab` are small good files that the hostile cases spoil in one place.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pack(kind: int, value: Any) -> bytes:
    """One scalar or string of a value type."""
    return string(value) if kind == STR else struct.pack("<" + _FORMATS[kind], value)


def array(kind: int, values: Any, count: int | None = None) -> bytes:
    """The payload of an array; `count` lies about its length."""
    head = struct.pack("<IQ", kind, len(values) if count is None else count)
    return head + b"".join(pack(kind, v) for v in values)


@dataclass
class Tensor:
    """One record of the table; `offset` None: where it belongs. `data`: its bytes, or None for zeros of `nbytes`."""

    name: str | bytes
    dims: tuple[int, ...]
    type_id: int = 0
    nbytes: int = 0
    offset: int | None = None
    n_dims: int | None = None
    data: bytes | None = None


@dataclass
class Forge:
    """A file in the making; keys hold (type, payload) by name, `extra_keys` raw bytes behind them."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: dict[str | bytes, tuple[int, bytes]] = field(default_factory=dict)
    extra_keys: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    cut: int = 0

    def put(self, key: str | bytes, kind: int, value: Any) -> Forge:
        """Set a scalar or string key."""
        self.keys[key] = (kind, pack(kind, value))
        return self

    def put_array(self, key: str | bytes, kind: int, values: Any, count: int | None = None) -> Forge:
        self.keys[key] = (ARR, array(kind, values, count))
        return self

    def raw(self, key: str | bytes, kind: int, payload: bytes) -> Forge:
        """Set a key to any type number and any bytes."""
        self.keys[key] = (kind, payload)
        return self

    def drop(self, *names: str) -> Forge:
        """Remove keys or tensors."""
        for name in names:
            self.keys.pop(name, None)
        self.tensors = [t for t in self.tensors if t.name not in names]
        return self

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)

    def pad(self, n: int) -> int:
        return (n + self.alignment - 1) // self.alignment * self.alignment

    def build(self) -> bytes:
        out = bytearray(self.magic + struct.pack("<I", self.version))
        n_keys = len(self.keys) + len(self.extra_keys)
        out += struct.pack("<QQ", len(self.tensors) if self.n_tensors is None else self.n_tensors,
                           n_keys if self.n_keys is None else self.n_keys)  # fmt: skip
        for key, (kind, payload) in self.keys.items():
            out += string(key) + struct.pack("<I", kind) + payload
        for raw in self.extra_keys:
            out += raw
        data = bytearray()
        for t in self.tensors:
            at = self.pad(len(data))
            body = t.data if t.data is not None else bytes(t.nbytes)
            out += string(t.name) + struct.pack("<I", len(t.dims) if t.n_dims is None else t.n_dims)
            out += struct.pack(f"<{len(t.dims)}Q", *t.dims)
            out += struct.pack("<IQ", t.type_id, at if t.offset is None else t.offset)
            data += bytes(at - len(data)) + body
        out += bytes(self.pad(len(out)) - len(out))
        out += data
        return bytes(out[: len(out) - self.cut])


def f32(name: str, *dims: int) -> Tensor:
    """A float32 tensor of zeros."""
    n = 4
    for d in dims:
        n *= d
    return Tensor(name, dims, 0, n)


def tiny_vocab(forge: Forge | None = None, model: str = "gpt2") -> Forge:
    """A good vocabulary: of bytes and one merge for "gpt2", of 256 byte tokens and three pieces for "llama"."""
    forge = forge or Forge().put("general.architecture", STR, "llama")
    forge.put("tokenizer.ggml.model", STR, model).put("tokenizer.ggml.pre", STR, "gpt-2")
    if model == "gpt2":
        tokens = ["a", "b", "c", "ab", "<s>", "</s>"]
        types = [1, 1, 1, 1, 3, 3]
        forge.put_array("tokenizer.ggml.merges", STR, ["a b"])
        bos = 4
    else:
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", "a", "\u2581a"]
        types = [2, 3, 3] + [6] * 256 + [1, 1, 1]
        forge.put_array("tokenizer.ggml.scores", F32, [-float(i) for i in range(len(tokens))])
        bos = 1
    forge.put_array("tokenizer.ggml.tokens", STR, tokens).put_array("tokenizer.ggml.token_type", I32, types)
    forge.put("tokenizer.ggml.bos_token_id", U32, bos).put("tokenizer.ggml.eos_token_id", U32, bos + 1)
    return forge


def tiny_llama() -> Forge:
    """A good one-layer model of architecture llama, width 32, 4 heads, 2 KV heads, vocabulary 6, all float32 zeros."""
    forge = Forge().put("general.architecture", STR, "llama").put("general.file_type", U32, 0)
    for key, value in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 8),
    ):
        forge.put(f"llama.{key}", U32, value)
    forge.put("llama.attention.layer_norm_rms_epsilon", F32, 1e-5).put("llama.rope.freq_base", F32, 10000.0)
    tiny_vocab(forge)
    blk = "blk.0."
    forge.tensors = [
        f32("token_embd.weight", 32, 6),
        f32("output_norm.weight", 32),
        f32("output.weight", 32, 6),
        f32(blk + "attn_norm.weight", 32),
        f32(blk + "attn_q.weight", 32, 32),
        f32(blk + "attn_k.weight", 32, 16),
        f32(blk + "attn_v.weight", 32, 16),
        f32(blk + "attn_output.weight", 32, 32),
        f32(blk + "ffn_norm.weight", 32),
        f32(blk + "ffn_gate.weight", 32, 64),
        f32(blk + "ffn_up.weight", 32, 64),
        f32(blk + "ffn_down.weight", 64, 32),
    ]
    return forge
