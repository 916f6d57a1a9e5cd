"""What a running loop tells of itself, on a fake engine: numbers while it works, and each job's end once."""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.loop_rig import Rig, wait_for

from worker_orcd.errors import Cancelled, WorkerError
from worker_orcd.observe.stats import EngineStats
from worker_orcd.serving.loop_stats import stats_of


def test_an_idle_loop_has_nothing_in_use():
    with Rig() as rig:
        assert rig.loop.stats() == EngineStats(n_kv_blocks=64)


def test_running_and_waiting_jobs_and_their_blocks_are_counted():
    with Rig(max_seqs=2, step_seconds=0.002) as rig:
        jobs = [rig.submit(max_tokens=400, seed=n, ignore_eos=True) for n in range(5)]
        wait_for(lambda: all(j.first_token_at is not None for j in jobs[:2]))
        wait_for(lambda: rig.loop.stats().generated_tokens > 4)
        stats = rig.loop.stats()
        assert (stats.n_running, stats.n_waiting) == (2, 3)
        assert stats.prompt_tokens == 6, "of the two that are computed, not of those that wait"
        used = [p.n_blocks - p.n_free for p in rig.scheduler.pools]
        assert min(used) >= 2 and 0 < stats.kv_usage <= 1 and stats.n_kv_blocks_used >= 4
        for job in jobs:
            job.cancel()
        rig.settle()
        assert dataclasses.replace(rig.loop.stats(), prefix_queries=0) == EngineStats(n_kv_blocks=64)


def test_every_job_is_told_of_once_when_it_ends():
    ended, lock = [], threading.Lock()

    def told(job):
        with lock:
            ended.append((job.job_id, job.outcome, job.tokens_out, job.tokens_in))

    with Rig(max_seqs=2) as rig:
        rig.loop.on_job_end = told
        done = [rig.submit(job_id=f"done{n}", max_tokens=5, seed=n, ignore_eos=True) for n in range(6)]
        late = rig.submit(job_id="late", max_tokens=400, deadline=time.monotonic() - 1, ignore_eos=True)
        gone = rig.submit(job_id="gone", max_tokens=400, ignore_eos=True)
        gone.cancel()
        gone.cancel()
        for job in done:
            job.completion()
        with pytest.raises(WorkerError):
            late.completion()
        with pytest.raises(Cancelled):
            gone.completion()
        rig.loop.forward(np.array([1, 2, 3], np.int32))  # no generation, so nobody is told
        rig.settle()
    told_of = {job_id: (outcome, n_out, n_in) for job_id, outcome, n_out, n_in in ended}
    assert len(ended) == len(told_of) == 8
    assert all(told_of[f"done{n}"] == ("length", 5, 3) for n in range(6))
    assert told_of["late"][0] == "INFERENCE_TIMEOUT" and told_of["gone"][0] == "CANCELLED"


def test_calls_of_the_engine_are_told_of():
    calls = []
    with Rig(max_seqs=2) as rig:
        rig.loop.on_call(calls.append)
        rig.submit([1] * 40, max_tokens=10, ignore_eos=True).completion()
        rig.settle()
        rig.loop.on_call(None)
        rig.submit(max_tokens=2, ignore_eos=True).completion()
        rig.settle()
    assert sum(c.n_prompt for c in calls) == 40 and sum(c.n_decode * c.n_steps for c in calls) == 9
    assert all(c.began <= c.ended for c in calls) and calls == sorted(calls, key=lambda c: c.began)


def test_what_the_prefix_cache_tells_is_passed_on():
    with Rig() as rig:
        rig.scheduler.cache_stats = lambda: SimpleNamespace(query_tokens=50, hit_tokens=40, n_cached_blocks=7)
        stats = stats_of(rig.scheduler, {}, 2)
    assert (stats.prefix_queries, stats.prefix_hits, stats.n_kv_blocks_cached, stats.n_waiting) == (50, 40, 7, 2)
