"""How soon the CPU engine stops computing for a job that ended, on a real model.

Steps are made as long as they can be, a second of work on two cores: a job that ended must not wait for the end of one.
What is measured is when its slot is free; its client hears of the end at once.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest

from worker_orcd import LLM, SamplingParams
from worker_orcd.errors import Cancelled, InferenceTimeout, WorkerError
from worker_orcd.serving.pace import Pace

pytestmark = pytest.mark.timeout(120)

N = 8


@pytest.fixture(scope="module")
def llm(model_path):
    path = str(model_path("smollm2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "prompt_tokens", lambda pace, n_decode, forced=False: 1 << 16)
        with LLM(
            path, device="cpu", n_threads=1, progress=False, max_seqs=2, context_length=8192, check_tensors=False
        ) as llm:
            llm.generate([[1] * 300], SamplingParams(max_tokens=2))
            yield llm


def submit(llm, n_prompt, deadline=None):
    ids = np.random.default_rng(n_prompt).integers(10, llm.info.n_vocab - 10, n_prompt).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    return llm.submit(ids, params, deadline=deadline)


def wait_for(condition, limit=30.0):
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, "does not happen"
        time.sleep(0.0005)


def ended(job):
    try:
        job.completion()
    except WorkerError as error:
        return error
    return None


def free_after(llm, job, began):
    """Seconds from `began` to the moment at which nothing of the job is in the engine."""
    scheduler = llm._scheduler
    wait_for(lambda: all(seq.seq_id != job.seq_id for seq in scheduler.running))
    return time.monotonic() - began


def test_a_step_takes_long_here(llm):
    """Else the others would show nothing."""
    job = submit(llm, 256)
    began = time.monotonic()
    wait_for(lambda: job.first_token_at is not None)
    print(f"a step of 256 tokens takes {time.monotonic() - began:.2f} s")
    job.cancel()
    assert time.monotonic() - began > 0.2


@pytest.mark.parametrize("state", ["prefill", "decode"])
def test_a_cancelled_job_is_soon_out_of_the_engine(llm, state):
    seconds = []
    for n in range(N):
        job = submit(llm, 6000 if state == "prefill" else 3)
        wait_for(lambda job=job: job.state == state)
        time.sleep(0.01 * n)
        began = time.monotonic()
        job.cancel()
        assert isinstance(ended(job), Cancelled)
        seconds.append(free_after(llm, job, began))
    print(f"{state}: median {1e3 * statistics.median(seconds):.1f} ms, slowest {1e3 * max(seconds):.1f} ms")
    assert statistics.median(seconds) < 0.1


def test_a_cancelled_job_that_waits_disturbs_nobody(llm):
    running = [submit(llm, 3), submit(llm, 4)]
    wait_for(lambda: all(job.state == "decode" for job in running))
    for _ in range(N):
        job = submit(llm, 6000)
        assert job.state == "queued"
        began = time.monotonic()
        job.cancel()
        assert isinstance(ended(job), Cancelled) and time.monotonic() - began < 0.1
    assert not any(job.finished for job in running)
    for job in running:
        job.cancel()


def test_a_deadline_in_the_prompt_is_kept(llm):
    seconds = []
    for n in range(N):
        deadline = time.monotonic() + 0.1 + 0.01 * n
        job = submit(llm, 6000, deadline)
        assert isinstance(ended(job), InferenceTimeout)
        seconds.append(free_after(llm, job, deadline))
    print(f"deadlines: median {1e3 * statistics.median(seconds):.1f} ms, slowest {1e3 * max(seconds):.1f} ms late")
    assert statistics.median(seconds) < 0.1


def test_the_end_of_the_model_waits_for_no_step(llm, model_path):
    with LLM(str(model_path("smollm2")), device="cpu", progress=False, max_seqs=1, check_tensors=False) as other:
        job = submit(other, 2000)
        wait_for(lambda: job.state == "prefill")
        time.sleep(0.05)
        began = time.monotonic()
    took = time.monotonic() - began
    print(f"closed in {1e3 * took:.0f} ms")
    assert took < 1.0 and ended(job) is not None
