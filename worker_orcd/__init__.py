"""worker-orcd: one process, one GPU, one GGUF model.

    from worker_orcd import LLM, SamplingParams, Tokenizer

Importing this package is cheap and touches no GPU, driver or compiled module: the public names are looked up when they
are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker_orcd import errors
    from worker_orcd.engine.sampling import SamplingParams
    from worker_orcd.runtime.llm import LLM
    from worker_orcd.serving.job import Completion, TextPiece
    from worker_orcd.serving.job import TextPiece as Piece
    from worker_orcd.tokenizer.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "Piece", "SamplingParams", "TextPiece", "Tokenizer", "__version__", "errors"]

#: public name -> its module, with the name there where it is another
_HOMES = {
    "LLM": "worker_orcd.runtime.llm",
    "Completion": "worker_orcd.serving.job",
    "Piece": "worker_orcd.serving.job:TextPiece",
    "SamplingParams": "worker_orcd.engine.sampling",
    "TextPiece": "worker_orcd.serving.job",
    "Tokenizer": "worker_orcd.tokenizer.tokenizer",
}


def __getattr__(name: str) -> object:
    import importlib

    if name == "errors":
        return importlib.import_module("worker_orcd.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'worker_orcd' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
