"""stats_of: the state of a loop in numbers. They are read without a lock: each is right, but not all of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker_orcd.observe.stats import EngineStats
from worker_orcd.serving.entry import Entry
from worker_orcd.serving.job import Job
from worker_orcd.serving.scheduler import Scheduler


def stats_of(scheduler: Scheduler, entries: Mapping[int, Entry], n_arriving: int) -> EngineStats:
    """The state of a loop.

    Args:
        scheduler: of the loop.
        entries: what has not ended, by seq_id; others change it.
        n_arriving: jobs that the scheduler does not know yet.
    """
    jobs = [entry.job for entry in list(entries.values()) if isinstance(entry.job, Job)]
    computed = [job for job in jobs if job.first_token_at is not None]
    used = [(pool.n_blocks - pool.n_free, pool.n_blocks) for pool in scheduler.pools]
    cache: Any = getattr(scheduler, "cache_stats", None)  # there is none without a prefix cache
    cached = None if cache is None else cache()
    return EngineStats(
        n_running=scheduler.config.max_seqs - scheduler.n_free_slots,
        n_waiting=scheduler.n_waiting + n_arriving,
        n_kv_blocks=sum(n for _, n in used),
        n_kv_blocks_used=sum(n for n, _ in used),
        kv_usage=max((owned / n for owned, n in used if n), default=0.0),
        n_kv_blocks_cached=0 if cached is None else cached.n_cached_blocks,
        prefix_queries=0 if cached is None else cached.query_tokens,
        prefix_hits=0 if cached is None else cached.hit_tokens,
        prompt_tokens=sum(job.tokens_in for job in computed),
        cached_tokens=sum(job.cached_tokens for job in computed),
        generated_tokens=sum(job.tokens_out for job in jobs),
    )
