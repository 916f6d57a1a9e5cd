"""Reference files taken apart into a `Forge`, so that a key or a tensor can be changed and the rest stays as it is."""

from __future__ import annotations

import struct
from pathlib import Path

from helpers import gguf_forge as g
from helpers.gguf_forge import ARR, Forge, Tensor

from worker_orcd.gguf.model_file import ModelFile

#: of every reference file here
N_LAYERS = 2
_KINDS = {
    "uint8": g.U8, "int8": g.I8, "uint16": g.U16, "int16": g.I16, "uint32": g.U32, "int32": g.I32, "float32": g.F32,
    "bool": g.BOOL, "string": g.STR, "uint64": g.U64, "int64": g.I64, "float64": g.F64,
}  # fmt: skip


def take_apart(path: Path, vocabulary: bool = True) -> Forge:
    """The file as lists of keys and tensors; without `vocabulary` its tokens are left out."""
    with ModelFile(path) as mf:
        forge = Forge()
        for key in mf.metadata:
            if key.startswith("tokenizer.") and not vocabulary:
                continue
            kind, raw = mf.metadata.value_type(key), mf.metadata.raw(key)
            if kind.startswith("array["):
                head = struct.pack("<IQ", _KINDS[kind[6:-1]], mf.metadata.array_len(key))
                forge.raw(key, ARR, head + raw)
            else:
                forge.raw(key, _KINDS[kind], raw)
        for t in mf.tensors.values():
            forge.tensors.append(Tensor(t.name, t.shape, t.type_id, data=bytes(mf.view(t.name))))
    return forge


def fuse(forge: Forge, name: str, parts: list[str]) -> Forge:
    """Put the rows of `parts` (matrices or vectors of one type) one after another into the tensor `name`."""
    found = [forge.tensor(part) for part in parts]
    assert len({t.type_id for t in found}) == 1
    dims = (*found[0].dims[:-1], sum(t.dims[-1] for t in found))
    whole = Tensor(name, dims, found[0].type_id, data=b"".join(t.data for t in found))
    forge.tensors[forge.tensors.index(found[0])] = whole
    forge.tensors = [t for t in forge.tensors if not any(t is part for part in found)]
    return forge


def split(forge: Forge, name: str, parts: dict[str, int]) -> Forge:
    """Cut the tensor `name` into `parts`: name -> rows (of a vector: elements)."""
    whole = forge.tensor(name)
    n_rows, at = whole.dims[-1], forge.tensors.index(whole)
    assert n_rows == sum(parts.values())
    row, made, start = len(whole.data) // n_rows, [], 0
    for part, n in parts.items():
        made.append(
            Tensor(part, (*whole.dims[:-1], n), whole.type_id, data=whole.data[start * row : (start + n) * row])
        )
        start += n
    forge.tensors[at : at + 1] = made
    return forge


def fused_qkv(f: Forge, bias: bool = False) -> Forge:
    """q, k and v of every layer in one tensor."""
    for layer in range(N_LAYERS):
        for kind in ("weight", "bias") if bias else ("weight",):
            parts = [f"blk.{layer}.attn_{name}.{kind}" for name in "qkv"]
            fuse(f, f"blk.{layer}.attn_qkv.{kind}", parts)
    return f


def split_qkv(f: Forge, q: int = 256, kv: int = 256, bias: bool = False) -> Forge:
    """q, k and v of every layer in three tensors of `q`, `kv` and `kv` rows."""
    for layer in range(N_LAYERS):
        for kind in ("weight", "bias") if bias else ("weight",):
            rows = {f"blk.{layer}.attn_{name}.{kind}": n for name, n in (("q", q), ("k", kv), ("v", kv))}
            split(f, f"blk.{layer}.attn_qkv.{kind}", rows)
    return f


def fused_gate_up(f: Forge) -> Forge:
    """Gate and up of every layer in one tensor."""
    for layer in range(N_LAYERS):
        # the fused tensor has the name of one of its parts
        fuse(f, "whole", [f"blk.{layer}.ffn_gate.weight", f"blk.{layer}.ffn_up.weight"])
        f.tensor("whole").name = f"blk.{layer}.ffn_up.weight"
    return f


def split_gate_up(f: Forge) -> Forge:
    """Gate and up of every layer in two tensors."""
    for layer in range(N_LAYERS):
        rows = {f"blk.{layer}.ffn_{name}.weight": 256 for name in ("gate", "up")}
        split(f, f"blk.{layer}.ffn_up.weight", rows)
    return f
