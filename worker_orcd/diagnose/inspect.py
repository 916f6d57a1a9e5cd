"""The report of `worker-orcd inspect`: a model file as facts, and those facts as text.

Everything is read from the head of the file, without a GPU and without loading weights. A part that cannot be told
(a vocabulary-only file has no plan) says why instead of ending the report; an architecture and tensor types that are
not supported are named, and the rest is shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from worker_orcd.config import ServeConfig
from worker_orcd.cuda import lowering
from worker_orcd.cuda.slow_paths import SlowPath, slow_paths
from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.errors import WorkerError, excerpt
from worker_orcd.gguf import quants
from worker_orcd.gguf.digests import part_digests
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import hparams, plan, registry
from worker_orcd.runtime import devices
from worker_orcd.tokenizer.tokenizer import Tokenizer

#: sequences for which the VRAM plan is shown: what a server takes by default
VRAM_SEQS = ServeConfig.max_seqs
#: arrays longer than this are told by type and length only
MAX_ARRAY = 16
_MAX_TEXT = 100


def inspect(path: str, tokenizer: str | None = None, sha256: bool = False) -> dict[str, Any]:
    """All facts of a model file as a JSON-able dict.

    Args:
        path: the GGUF file; of a split model its first part.
        tokenizer: a tokenizer.json in the place of the file's vocabulary.
        sha256: also read all of the file and digest it.

    Raises:
        ModelLoadError: the file is no good GGUF file.
    """
    with ModelFile(path, for_report=True) as mf:
        facts: dict[str, Any] = {
            "path": mf.path,
            "name": mf.name,
            "arch": mf.arch,
            "quant_kind": mf.quant_kind if mf.tensors else None,
            "file_type": mf.file_type,
            "version": mf.parts[0].version,
            "bytes": mf.size,
            "parts": [p.path for p in mf.parts],
            "metadata": {key: _value(mf, key) for key in mf.metadata},
            "types": _types(mf),
            "tensors": [
                {
                    "name": t.name,
                    "type": quants.type_name(t.type_id),
                    "shape": list(t.shape),
                    "offset": t.offset,
                    "bytes": t.nbytes,
                }
                for t in mf.tensors.values()
            ],
            "tokenizer": _report(lambda: _tokenizer(mf, tokenizer)),
        }
        facts.update(_report_plan(mf))
        facts["unsupported"] = _unsupported(mf, facts["plan"])
        if sha256:
            whole, parts = part_digests(mf)
            facts["sha256"] = {"whole": whole} | (
                {p.path: d for p, d in zip(mf.parts, parts, strict=True)} if len(parts) > 1 else {}
            )
    return facts


def _report(scan: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return scan()
    except WorkerError as error:
        return {"error": error.message}


def _value(mf: ModelFile, key: str) -> Any:
    kind = mf.metadata.value_type(key)
    if kind.startswith("array"):
        n = mf.metadata.array_len(key)
        if n > MAX_ARRAY:
            return {"type": kind, "length": n}
    try:
        value = mf.metadata[key]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    except WorkerError as error:
        return {"type": kind, "error": error.message}


def _types(mf: ModelFile) -> dict[str, dict[str, int]]:
    """Type name -> how many tensors and bytes, in order of bytes."""
    n_bytes: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for t in mf.tensors.values():
        name = quants.type_name(t.type_id)
        n_bytes[name] += t.nbytes
        count[name] += 1
    return {name: {"tensors": count[name], "bytes": n} for name, n in n_bytes.most_common()}


def _unsupported(mf: ModelFile, the_plan: Mapping[str, Any]) -> list[str]:
    """What keeps the file from being loaded: why there is no plan, and each type of its tensors."""
    reasons = [the_plan["error"].removeprefix(f"{mf.path}: ")] if "error" in the_plan else []
    for type_id in mf.unsupported_types:
        names = [t.name for t in mf.tensors.values() if t.type_id == type_id]
        of = f"{len(names)} tensors" if len(names) > 1 else f"tensor {names[0]}"
        reasons.append(f"unsupported tensor type {quants.type_name(type_id).removeprefix('type ')} ({of})")
    return reasons


def _tokenizer(mf: ModelFile, override: str | None) -> dict[str, Any]:
    tokenizer = Tokenizer.from_model(mf, override)
    if tokenizer is None:
        return {"error": "the file has none"}
    return {
        "kind": tokenizer.kind,
        "path": str(tokenizer.path),
        "n_vocab": tokenizer.n_vocab,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "eot_id": tokenizer.eot_id,
        "unk_id": tokenizer.unk_id,
        "pad_id": tokenizer.pad_id,
        "add_bos": tokenizer.add_bos,
        "stop_ids": list(tokenizer.stop_ids),
        "sha256": tokenizer.sha256,
        "chat_template_sha256": tokenizer.chat_template_sha256,
    }


def _report_plan(mf: ModelFile) -> dict[str, Any]:
    told: dict[str, Any] = {}
    try:
        told["hparams"] = _hparams(registry.hparams_of(mf))
        the_plan = plan.build(mf)
    except WorkerError as error:
        reason = {"error": error.message}
        return {"hparams": reason, "plan": reason, "memory": reason, "gpu": reason} | told
    told["plan"] = _plan(the_plan)
    if mf.unsupported_types:
        names = ", ".join(map(quants.type_name, mf.unsupported_types))
        reason = {"error": f"tensors of types that are not supported: {names}"}
        return told | {"memory": reason, "gpu": reason}
    return told | {"memory": _memory(mf, the_plan), "gpu": _report(lambda: _gpu(the_plan))}


def _hparams(hp: hparams.HParams) -> dict[str, Any]:
    values = {f.name: getattr(hp, f.name) for f in dataclasses.fields(hp)}
    return {k: v for k, v in values.items() if isinstance(v, int | float | str) or v is None}


def _plan(p: plan.Plan) -> dict[str, Any]:
    ops = Counter(type(op).__name__ for op in p.ops)
    return {
        "arch": p.arch,
        "ops": len(p.ops),
        "op_types": dict(ops.most_common()),
        "n_vocab": p.n_vocab,
        "n_layer": p.n_layer,
        "context_length": p.context_length,
        "max_positions": p.max_positions,
        "kv_groups": [{"window": g.window, "layers": len(g.layers)} for g in p.kv_groups],
    }


def _memory(mf: ModelFile, p: plan.Plan) -> dict[str, Any]:
    """What running it takes: weights, KV cache of 1,000 positions and of a full context, activations of one row."""
    blocks = kv_blocks.block_bytes(p)
    full = sum(kv_blocks.blocks_needed(g, p.context_length) * b for g, b in zip(p.kv_groups, blocks, strict=True))
    return {
        "weight_bytes": sum(mf.tensors[name].nbytes for name in p.weights),
        "kv_bytes_per_1k_tokens": 1000 * p.n_layer * kv_blocks.position_bytes(p),
        "kv_bytes_full_context": full,
        "activation_bytes_per_row": sum(4 * b.width for b in p.buffers.values()),
        "vram_plan": _report(lambda: _vram_plan(p)),
    }


def _gpu(p: plan.Plan) -> dict[str, Any]:
    """How the CUDA engine would run the plan: by which lowering, in how many ops, and what would be slow on any GPU."""
    chosen = lowering.asked_for()
    fuse = chosen == "fused"
    slow = [{"reason": s.reason, "types": s.types, "tensors": dict(s.tensors)} for s in slow_paths(p, fuse=fuse)]
    return {"lowering": chosen, "ops": len(lowering.lower(p, fuse)), "slow": slow}


def _vram_plan(p: plan.Plan) -> dict[str, int]:
    """What a GPU must have free for `VRAM_SEQS` sequences and a KV cache of one full context."""
    context = min(p.context_length, p.max_positions or p.context_length)
    blocks = tuple(kv_blocks.blocks_needed(g, context) for g in p.kv_groups)
    max_batch_tokens = devices.default_batch_tokens("cuda:0", VRAM_SEQS)
    return devices.vram_plan(p, EngineConfig(VRAM_SEQS, max_batch_tokens, context, blocks)).to_dict()


# -- as text


def as_text(facts: dict[str, Any]) -> str:
    """The report for people. Strings of the file are escaped: a name may hold a terminal's control sequences."""
    kind = facts["quant_kind"] or "no tensors"
    out = [
        f"{_safe(facts['path'])}: {_safe(facts['name'])}",
        f"  {_safe(facts['arch']) or 'no architecture'}, {kind}, GGUF {facts['version']}, {_size(facts['bytes'])}"
        + (f" in {len(facts['parts'])} parts" if len(facts["parts"]) > 1 else ""),
    ]
    out += [f"  cannot be loaded: {_safe(reason, 4 * _MAX_TEXT)}" for reason in facts.get("unsupported", ())]
    if "sha256" in facts:
        _section(out, "SHA-256", facts["sha256"])
    _section(out, "metadata", facts["metadata"])
    if "tensors" in facts:
        out += ["", f"tensors: {len(facts['tensors'])}"]
        width = max((len(_safe(t["name"])) for t in facts["tensors"]), default=0)
        out += [
            f"  {_safe(t['name']):{width}s}  {t['type']:6s} {'x'.join(map(str, t['shape'])):>18s} "
            f"{t['bytes']:>13,d} B at {t['offset']:,d}"
            for t in facts["tensors"]
        ]
    out += ["", "types:"]
    out += [f"  {name:6s} {t['tensors']:5d} tensors  {_size(t['bytes'])}" for name, t in facts["types"].items()]
    for part in ("tokenizer", "hparams", "plan"):
        _section(out, part, facts[part])
    memory = facts["memory"]
    if "error" in memory:
        _section(out, "memory", memory)
    else:
        out += [
            "",
            "memory:",
            f"  weights                 {_size(memory['weight_bytes'])}",
            f"  KV cache, 1,000 tokens  {_size(memory['kv_bytes_per_1k_tokens'])}",
            f"  KV cache, full context  {_size(memory['kv_bytes_full_context'])}  "
            f"({facts['plan']['context_length']:,d} positions of one sequence)",
            f"  activations, one row    {_size(memory['activation_bytes_per_row'])}",
        ]
        vram = memory["vram_plan"]
        title = "on a GPU" if "error" in vram else f"on a GPU, {VRAM_SEQS} sequences, KV cache of one full context"
        _section(out, title, vram if "error" in vram else {k: f"{n:>16,d}" for k, n in vram.items()})
    _section(out, "kernels of a GPU", {key: value for key, value in facts["gpu"].items() if key != "slow"})
    out += [f"  slow      {_safe(_slow(path), 4 * _MAX_TEXT)}" for path in facts["gpu"].get("slow", ())]
    return "\n".join(out)


def _slow(path: Mapping[str, Any]) -> str:
    """A slow path as `SlowPath` writes it."""
    return str(SlowPath(path["reason"], tuple(path["types"]), tuple(path["tensors"].items())))


def _section(out: list[str], title: str, values: Mapping[str, Any]) -> None:
    out += ["", f"{title}:"]
    if list(values) == ["error"]:
        out.append(f"  none: {_safe(values['error'], 4 * _MAX_TEXT)}")
        return
    width = min(max((len(_safe(k)) for k in values), default=0), 48)
    out += [f"  {_safe(k):{width}s}  {_shown(v)}" for k, v in values.items()]


def _shown(value: object) -> str:
    if isinstance(value, dict) and set(value) == {"type", "length"}:
        return f"{value['type']} of {value['length']:,d}"
    if isinstance(value, str):
        return _safe(value)
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, dict):
        return ", ".join(f"{_safe(k)} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return str(value)


def _safe(text: str, limit: int = _MAX_TEXT) -> str:
    return excerpt(text, limit)


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} B"
