"""What the metrics read of a running engine and of a job that has ended: plain numbers, and no library of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

#: the outcome of a job that came to its end: the reason in the place of an error's code
FINISHED = ("stop", "length")


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine at one moment, read without waiting for it.

    Attributes:
        n_running, n_waiting: jobs that have a slot, and those that wait for one.
        n_kv_blocks, n_kv_blocks_used: blocks of the KV cache, of all its groups together, and those that running jobs
            own.
        kv_usage: share of the fullest group's blocks that is owned, 0 to 1: the one that admission waits for.
        n_kv_blocks_cached: blocks whose content the prefix cache knows.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found, since the start.
        prompt_tokens, cached_tokens, generated_tokens: of the jobs that have not ended: tokens of prompts that are
            computed, those of them that were in the prefix cache, and tokens generated so far.
    """

    n_running: int = 0
    n_waiting: int = 0
    n_kv_blocks: int = 0
    n_kv_blocks_used: int = 0
    kv_usage: float = 0.0
    n_kv_blocks_cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class JobFacts(Protocol):
    """What is read of a job when it ends. Times are of `time.monotonic()`, None where it did not come so far."""

    submitted_at: float
    admitted_at: float | None
    first_token_at: float | None
    ended_at: float | None  # when the engine had its last token
    tokens_in: int
    cached_tokens: int

    @property
    def tokens_out(self) -> int:
        """Tokens generated."""

    @property
    def max_tokens(self) -> int:
        """Tokens that it might have generated."""

    @property
    def outcome(self) -> str | None:
        """One of `FINISHED`, or the code of the error that ended it."""
