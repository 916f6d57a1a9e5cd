"""Steps that nobody waits for any more are given up, and a step is kept short enough where it cannot be."""

from __future__ import annotations

import time

import numpy as np
import pytest
from helpers.loop_rig import Rig, read, wait_for

from worker_orcd.errors import Cancelled, NotReady
from worker_orcd.serving.pace import STEP_SECONDS

LONG = 20.0  # seconds of a step that a test never waits for


def in_a_step(rig):
    return lambda: rig.loop._work.in_call


@pytest.mark.parametrize("call", ["prefill", "logits"])
def test_a_step_whose_only_sequence_ends_is_given_up(call):
    with Rig(step_seconds=LONG) as rig:
        began = time.monotonic()
        if call == "prefill":
            job = rig.submit(max_tokens=100)
            wait_for(in_a_step(rig))
            job.cancel()
            assert isinstance(read(job)[1], Cancelled)
        else:
            job = rig.submit(max_tokens=100, deadline=began + 0.1)
            assert read(job)[1].code == "INFERENCE_TIMEOUT"
        wait_for(lambda: not rig.scheduler.running, 1.0)
        rig.engine.step_seconds = 0.0
        assert rig.submit(max_tokens=2).completion().finish_reason == "length"
        assert rig.loop.forward(np.ones(3, np.int32)).shape == (3, 50)
        rig.settle()


def test_a_decode_step_is_given_up_and_the_next_job_gets_what_it_would_get():
    with Rig(never_stop=True) as rig:
        alone = rig.submit(max_tokens=30).completion().token_ids
        other = rig.submit(max_tokens=400)
        wait_for(lambda: other.state == "decode")
        rig.engine.step_seconds = LONG
        time.sleep(0.02)
        other.cancel()
        wait_for(lambda: not rig.scheduler.running, 1.0)
        rig.engine.step_seconds = 0.0
        assert rig.submit(max_tokens=30).completion().token_ids == alone
        rig.settle()


def test_a_step_that_somebody_waits_for_is_not_given_up():
    with Rig(never_stop=True, step_seconds=0.3) as rig:
        with rig.loop.together():
            gone, stays = rig.submit(max_tokens=2), rig.submit(max_tokens=2)
        wait_for(in_a_step(rig))
        gone.cancel()
        assert stays.completion().finish_reason == "length"
        assert rig.engine.calls.count("step") == 1, "no step ran twice"
        rig.settle()


def test_shutdown_gives_up_the_step_under_way():
    with Rig(step_seconds=LONG) as rig:
        job = rig.submit(max_tokens=100)
        wait_for(in_a_step(rig))
        began = time.monotonic()
        rig.loop.shutdown(0.0)
        assert isinstance(read(job)[1], NotReady)
        wait_for(lambda: not rig.loop._threads[0].is_alive(), 1.0)
        assert time.monotonic() - began < 1.0


def test_a_job_that_ended_before_its_step_began_is_not_computed():
    """The end comes between the look at the news and the call of the engine."""
    with Rig(never_stop=True) as rig:
        jobs = []
        set_slot = rig.engine.set_slot

        def cancel_at_the_start(slot, sampling, *edits):
            set_slot(slot, sampling, *edits)
            while not jobs:
                time.sleep(0.001)
            jobs[0].cancel()

        rig.engine.set_slot = cancel_at_the_start
        jobs.append(rig.submit(max_tokens=5))
        assert isinstance(read(jobs[0])[1], Cancelled)
        rig.settle()
        assert rig.engine.calls == []


def test_aborts_at_any_moment_change_no_result():
    """Cancelled twins come and go beside jobs whose ids are known; every step that is given up is run again."""
    rng = np.random.default_rng(3)
    with Rig(max_seqs=3, never_stop=True, n_blocks=(32, 32), row_seconds=0.0004) as rig:
        prompts = [[int(x) for x in rng.integers(1, 50, n)] for n in (3, 40, 90)]
        alone = [rig.submit(p, 12, seed=i).completion().token_ids for i, p in enumerate(prompts)]
        for _ in range(12):
            twin = rig.submit(prompts[2], 12, seed=2)
            time.sleep(float(rng.uniform(0, 0.03)))
            twin.cancel()
            jobs = [rig.submit(p, 12, seed=i) for i, p in enumerate(prompts)]
            assert [job.completion().token_ids for job in jobs] == alone
        rig.settle()


def test_steps_of_a_slow_model_with_a_crowd_stay_short():
    """Prompts arrive beside sequences that decode; no step after the first may take much longer than it should."""
    rows = []
    with Rig(max_seqs=8, max_batch_tokens=256, never_stop=True, row_seconds=0.002, n_blocks=(64, 64)) as rig:
        begin = rig.engine._begin
        rig.engine._begin = lambda call, n: (rows.append(n) if call == "step" else None, begin(call, n))[1]
        crowd = [rig.submit(max_tokens=300, seed=n) for n in range(6)]
        wait_for(lambda: all(job.state == "decode" for job in crowd))
        assert rig.submit([1] * 200, max_tokens=2).completion().finish_reason == "length"
        for job in crowd:
            job.cancel()
    assert max(rows[1:]) * 0.002 < 1.5 * STEP_SECONDS + 0.03, rows
