"""ModelInfo: the facts about a loaded model that `inspect`, `/health` and `LLM.info` show. Numbers and names only."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile
    from worker_orcd.models.plan import Plan
    from worker_orcd.tokenizer.tokenizer import Tokenizer


class MemoryPlan(Protocol):
    """What a model will take on a GPU, as the callable `on_plan` of `LLM` gets it; a `cuda.vram.VramPlan`."""

    def to_dict(self) -> dict[str, int]:
        """Bytes of each part and of all."""


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is loaded, where, and how much of what it takes.

    Attributes:
        path, name, arch, quant_kind: of the model file.
        tokenizer_kind: "gguf-bpe", "gguf-spm", "hf-json", or None for a model without a tokenizer.
        tokenizer_path: the file it came from.
        tokenizer_source: "model" for the model file's own, "given" for one that was asked for, "beside" for a
            tokenizer.json beside a model file that holds none, None without a tokenizer.
        n_vocab, n_embd, n_layer, n_params: sizes; n_params counts the elements of all tensors.
        trained_context_length: positions the model was made for.
        context_length: positions a sequence may reach here.
        model_bytes: bytes of the file or of all its parts.
        kv_bytes: bytes of the KV cache.
        kv_positions: positions that it holds, of all sequences together; None where every layer slides.
        default_seqs: sequences that it holds at once where each has a prompt of 64 tokens and gets as many as a request
            that names no number; at most `max_seqs`.
        full_context_seqs: likewise, where each has `context_length` positions.
        device: "cpu" or "cuda:N".
        max_seqs: sequences that run together at most.
        max_batch_tokens: tokens of one step at most.
        vram_bytes: device memory in use, 0 on the CPU.
        sm: compute capability as in "sm_90", None on the CPU.
        cuda_runtime_version: of the driver in use, None on the CPU.
        lowering: how a GPU runs the plan: "fused", or "plain" where WORKER_ORCD_LOWERING says so; None on the CPU.
        slow_paths: which matrices this GPU multiplies by a slower path and why, a line each.
        sha256: digest of the file's bytes (of all parts, one after another), None until it is known.
        tokenizer_sha256: digest of the tokenizer (`Tokenizer.sha256`), None for a model without one.
        chat_template_sha256: digest of the chat template's text, None where there is none.
        verified_by: "sha256" or "chunks" where the bytes were compared with demanded digests before they were loaded;
            with "chunks", `sha256` is what the list of trusted models says. Else None.
        trusted_name, trusted_source: of the entry in the list of trusted models, None without a list.
    """

    path: str
    name: str
    arch: str
    quant_kind: str
    tokenizer_kind: str | None
    n_vocab: int
    n_embd: int
    n_layer: int
    n_params: int
    trained_context_length: int
    context_length: int
    model_bytes: int
    kv_bytes: int
    kv_positions: int | None
    default_seqs: int
    full_context_seqs: int
    device: str
    max_seqs: int
    max_batch_tokens: int
    vram_bytes: int = 0
    sm: str | None = None
    cuda_runtime_version: str | None = None
    lowering: str | None = None
    slow_paths: tuple[str, ...] = ()
    tokenizer_path: str | None = None
    tokenizer_source: str | None = None
    sha256: str | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    verified_by: str | None = None
    trusted_name: str | None = None
    trusted_source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return dataclasses.asdict(self)


def provenance_facts(info: dict[str, Any]) -> dict[str, Any]:
    """Those entries of `ModelInfo.to_dict()` that say where the model comes from."""
    names = ("sha256", "tokenizer_sha256", "chat_template_sha256", "verified_by", "trusted_name", "trusted_source")
    return {name: info.get(name) for name in names}


def model_facts(model_file: ModelFile, plan: Plan, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Those arguments of `ModelInfo` that come from the file alone."""
    return {
        "path": model_file.path,
        "name": model_file.name,
        "arch": plan.arch,
        "quant_kind": model_file.quant_kind,
        "tokenizer_kind": tokenizer.kind if tokenizer is not None else None,
        "tokenizer_path": tokenizer.path if tokenizer is not None else None,
        "n_vocab": plan.n_vocab,
        "n_embd": plan.n_embd,
        "n_layer": plan.n_layer,
        "n_params": sum(math.prod(t.shape) for t in model_file.tensors.values()),
        "trained_context_length": plan.context_length,
        "model_bytes": model_file.size,
        "tokenizer_sha256": tokenizer.sha256 if tokenizer is not None else None,
        "chat_template_sha256": tokenizer.chat_template_sha256 if tokenizer is not None else None,
    }
