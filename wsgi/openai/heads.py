"""What all parts of one answer share, and the counting of its tokens."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import worker_orcd
from worker_orcd.serving.job import Job
from worker_orcd.wsgi.openai.answers import CachedTokens, Usage

if TYPE_CHECKING:
    from worker_orcd.runtime.llm import LLM


@dataclass(frozen=True)
class Head:
    """The facts that stand in an answer and in each chunk of a stream."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def facts(self) -> dict[str, Any]:
        """As arguments of the structures of types.py."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def fingerprint(llm: LLM) -> str:
    """What decides which tokens a request with a seed gets: model file, build and device.

    The file counts by its digest where it was known when the model was loaded; hashing would take seconds, so else it
    counts by what it says of itself.
    """
    info = llm.info.to_dict()
    names = ("sha256", "name", "arch", "quant_kind", "model_bytes", "n_params", "tokenizer_sha256", "device", "sm")
    facts = [worker_orcd.__version__, *(info.get(name) for name in (*names, "chat_template_sha256"))]
    return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def usage(tokens_in: Iterable[int], cached: Iterable[int], tokens_out: Iterable[int]) -> Usage:
    """Tokens of an answer: each prompt counts once, however many choices it has."""
    n_in, n_out = sum(tokens_in), sum(tokens_out)
    return Usage(n_in, n_out, n_in + n_out, CachedTokens(sum(cached)))


def cached_tokens(jobs: Sequence[Job], n: int) -> list[int]:
    """Of each prompt, the tokens that its first choice did not compute; every `n` jobs have one prompt."""
    return [job.cached_tokens for job in jobs[::n]]
