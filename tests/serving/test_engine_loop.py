"""The loop on a fake engine: jobs, order, cancels, refusals, deadlines and shutdown, under real threads.

The loop here is engine_loop with its parts: engine_work, output, entry, detokenizer, job and logits_job.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from helpers.fake_engine import STOP_ID
from helpers.loop_rig import LETTERS, Rig, read, wait_for

from worker_orcd.errors import (
    Cancelled,
    CudaError,
    DuplicateJob,
    InferenceTimeout,
    InsufficientMemory,
    InvalidRequest,
    NotReady,
    QueueFull,
    VramOom,
    WorkerError,
)
from worker_orcd.serving.job import Finished, TextPiece


def test_pieces_in_order_then_finished():
    with Rig(never_stop=True) as rig:
        job = rig.submit(max_tokens=10)
        pieces, end = read(job)
        assert isinstance(end, Finished) and end.finish_reason == "length" and end.tokens_out == 10
        done = job.completion()
        assert done.text == "".join(p.text for p in pieces) == "".join(LETTERS[t] for t in done.token_ids)
        assert [t for p in pieces for t in p.token_ids] == list(done.token_ids)
        assert done.tokens_in == 3 and done.seed == 7 and job.state == "finished" and done.logprobs is None
        t = done.timings
        assert t.queue_ms >= 0 and t.prefill_ms > 0 and t.decode_ms > 0 and t.tokens_per_s > 0
        rig.settle()


def test_alone_or_in_a_crowd_the_same_ids():
    prompts = [[(7 * i + j) % 49 + 1 for j in range(1 + 11 * i)] for i in range(16)]
    with Rig(max_seqs=5, n_blocks=(20, 30)) as rig:
        alone = [rig.submit(p, 40, seed=i).completion() for i, p in enumerate(prompts)]
        for _ in range(3):
            crowd = [rig.submit(p, 40, seed=i) for i, p in enumerate(prompts)]
            assert [(j.completion().token_ids, j.completion().finish_reason) for j in crowd] == [
                (a.token_ids, a.finish_reason) for a in alone
            ]
        assert {a.finish_reason for a in alone} == {"stop", "length"}
        rig.settle()


def test_waiting_jobs_start_when_the_last_running_one_ends():
    with Rig(max_seqs=1, never_stop=True, step_seconds=0.002) as rig:
        jobs = [rig.submit(max_tokens=10, job_id=str(i)) for i in range(4)]
        wait_for(lambda: rig.scheduler.n_waiting == 3)
        assert [isinstance(read(job)[1], Finished) for job in jobs] == [True] * 4
        for i in range(50):  # the id of a job whose end was seen is free
            assert isinstance(read(rig.submit(max_tokens=1, job_id="again", seed=i))[1], Finished)
        rig.settle()


def test_the_stop_token_is_not_part_of_the_result():
    with Rig() as rig:
        stopped = [
            c for c in (rig.submit(seed=s, max_tokens=200).completion() for s in range(8)) if c.finish_reason == "stop"
        ]
        assert stopped and all(STOP_ID not in c.token_ids and "a" not in c.text for c in stopped)
        going_on = rig.submit(seed=stopped[0].seed, max_tokens=200, ignore_eos=True).completion()
        n = len(stopped[0].token_ids)
        assert going_on.token_ids[: n + 1] == (*stopped[0].token_ids, STOP_ID) and len(going_on.token_ids) == 200


def test_stop_string_ends_the_job_wherever_tokens_are_cut():
    with Rig(never_stop=True, step_seconds=0.001) as rig:
        whole = rig.submit(max_tokens=60).completion()
        stop = whole.text[20:24]
        at = whole.text.find(stop)
        job = rig.submit(max_tokens=60, stop=(stop, "never!"))
        pieces, end = read(job)
        assert end.finish_reason == "stop"
        done = job.completion()
        assert done.text == whole.text[:at] == "".join(p.text for p in pieces)
        assert done.token_ids == whole.token_ids[: at + 4] and end.tokens_out == at + 4
        rig.settle()


def test_text_held_back_for_a_stop_string_comes_at_the_end():
    with Rig(never_stop=True) as rig:
        whole = rig.submit(max_tokens=10).completion()
        held = rig.submit(max_tokens=10, stop=(whole.text[-3:] + "!",)).completion()
        assert held.text == whole.text and held.token_ids == whole.token_ids and held.finish_reason == "length"


def test_without_a_tokenizer_a_piece_is_a_token():
    with Rig(never_stop=True, decoder=None) as rig:
        job = rig.submit(max_tokens=5)
        pieces, _ = read(job)
        assert [p.text for p in pieces] == [""] * 5 and [len(p.token_ids) for p in pieces] == [1] * 5


def test_logprobs():
    with Rig(never_stop=True) as rig:
        other = rig.submit(max_tokens=30)
        done = rig.submit(max_tokens=6, logprobs=3).completion()
        assert len(done.logprobs) == 6
        for token, top in zip(done.token_ids, done.logprobs, strict=True):
            assert token in top and 3 <= len(top) <= 4 and all(v < 0 for v in top.values())
        assert done.token_ids == rig.submit(max_tokens=6).completion().token_ids
        assert other.completion().logprobs is None


def test_forward_is_chunked_and_waits_its_turn():
    with Rig(never_stop=True, max_batch_tokens=16, step_seconds=0.001) as rig:
        job = rig.submit(max_tokens=100)
        tokens = np.arange(1, 41, dtype=np.int32)
        logits = rig.loop.forward(tokens)
        assert logits.shape == (40, rig.engine.n_vocab) and logits.dtype == np.float32
        assert np.array_equal(logits, rig.loop.forward(tokens))
        assert np.array_equal(logits[:7], rig.loop.forward(tokens[:7]))
        assert job.completion().finish_reason == "length"
        rig.settle()
        with pytest.raises(InvalidRequest, match="the context has 512"):
            rig.loop.forward(np.ones(513, np.int32))


# -- cancelling


@pytest.mark.parametrize("state", ["queued", "prefill", "decode"])
def test_cancel_in_every_state(state):
    with Rig(max_seqs=1, never_stop=True, step_seconds=0.01) as rig:
        blocker = rig.submit(max_tokens=400, job_id="blocker") if state == "queued" else None
        wait_for(lambda: blocker is None or blocker.state == "decode")
        job = rig.submit([1] * (400 if state == "prefill" else 3), max_tokens=100, job_id="it")
        wait_for(lambda: job.state == state)
        began = time.monotonic()
        assert rig.loop.cancel("it") == "cancelling"
        _, error = read(job)
        assert isinstance(error, Cancelled) and time.monotonic() - began < 0.1
        assert [rig.loop.cancel("it") for _ in range(100)] == ["finished"] * 100
        assert rig.loop.cancel("nobody") == "unknown"
        if blocker:
            assert rig.loop.job("blocker") is blocker and blocker.state == "decode"
            blocker.cancel()
        wait_for(lambda: not rig.scheduler.running, limit=0.2)
        rig.settle()
        assert rig.submit(max_tokens=2).completion().finish_reason == "length"


def test_a_new_job_does_not_wait_for_a_long_decode_run():
    with Rig(never_stop=True, step_seconds=0.005) as rig:
        long = rig.submit(max_tokens=400)
        wait_for(lambda: long.state == "decode")
        began = time.monotonic()
        assert isinstance(rig.submit(max_tokens=1).next_event(5), TextPiece)
        assert time.monotonic() - began < 0.2
        assert not long.finished
        long.cancel()


def test_slow_reader_and_cancel_do_not_hurt_others():
    with Rig(never_stop=True, ring_capacity=2) as rig:
        unread = [rig.submit(max_tokens=100, seed=i) for i in range(3)]
        assert rig.submit(max_tokens=100).completion().finish_reason == "length"
        unread[0].cancel()
        assert len(unread[1].completion().token_ids) == 100
        rig.settle()


# -- refusals


def test_refusals_name_their_reason():
    with Rig(max_seqs=1, max_queue=1, never_stop=True, step_seconds=0.01, n_blocks=(4, 4)) as rig:
        with pytest.raises(InvalidRequest):
            rig.submit([1] * 500, 20)
        with pytest.raises(VramOom):
            rig.submit([1] * 250, 100)
        first = rig.submit(max_tokens=200, job_id="a")
        wait_for(lambda: first.state == "decode")
        second = rig.submit(max_tokens=2, job_id="b")
        with pytest.raises(DuplicateJob):
            rig.submit(job_id="a")
        with pytest.raises(QueueFull) as caught:
            rig.submit(job_id="c")
        assert caught.value.fields["retry_after"] == 1
        first.cancel()
        assert second.completion().finish_reason == "length"
        assert rig.submit(max_tokens=1, job_id="a").completion().tokens_in == 3  # the id of an ended job is free


def test_a_burst_into_free_slots_is_no_full_queue():
    with Rig(max_seqs=4, max_queue=0, never_stop=True, step_seconds=0.01) as rig:
        jobs = [rig.submit(max_tokens=50) for _ in range(4)]
        with pytest.raises(QueueFull):
            rig.submit()
        wait_for(lambda: all(job.state == "decode" for job in jobs))
        for job in jobs:
            job.cancel()
        wait_for(lambda: rig.scheduler.n_free_slots == 4)
        rig.submit(max_tokens=1).completion()


def test_a_small_job_starts_at_once_though_a_large_one_waits():
    """The decode run is interrupted for a job that can pass, and not for one that cannot."""
    with Rig(n_blocks=(8, 8), never_stop=True, step_seconds=0.01, max_queue=1) as rig:
        running = rig.submit(max_tokens=380)  # 6 of 8 blocks
        wait_for(lambda: running.state == "decode")
        large = rig.submit(max_tokens=300)  # 5 blocks
        began = len(rig.engine.calls)
        small = rig.submit(max_tokens=4)
        assert small.completion().finish_reason == "length"
        assert len(rig.engine.calls) - began < 30, "a decode run has 64 steps"
        assert (running.state, large.state) == ("decode", "queued")
        with pytest.raises(QueueFull):
            rig.submit(max_tokens=300)
        running.cancel()
        wait_for(lambda: large.state == "decode")
        large.cancel()
        rig.settle()


def test_a_queue_full_of_large_jobs_is_open_for_a_small_one():
    with Rig(n_blocks=(8, 8), never_stop=True, step_seconds=0.01, max_queue=0) as rig:
        running = rig.submit(max_tokens=380)
        with pytest.raises(QueueFull):
            rig.submit(max_tokens=300)  # a slot is free for it, but no blocks
        small = [rig.submit(max_tokens=60) for _ in range(2)]
        with pytest.raises(QueueFull):
            rig.submit(max_tokens=60)
        assert [job.completion().finish_reason for job in small] == ["length"] * 2
        running.cancel()
        rig.settle()


def test_logits_that_no_memory_is_given_for(monkeypatch):
    def no_memory(shape, dtype):
        raise MemoryError

    with Rig() as rig:
        with monkeypatch.context() as patched:
            patched.setattr(np, "empty", no_memory)
            with pytest.raises(InsufficientMemory, match="logits of 3 x 50 need 600 bytes") as caught:
                rig.loop.forward(np.array([1, 2, 3], np.int32))
        assert caught.value.fields["bytes_required"] == 600 and caught.value.fields["bytes_available"] > 0
        assert rig.loop.forward(np.array([1, 2, 3], np.int32)).shape == (3, 50)


# -- deadlines


def test_deadlines_end_jobs_in_every_state():
    with Rig(max_seqs=1, never_stop=True, step_seconds=0.005) as rig:
        now = time.monotonic()
        running = rig.submit(max_tokens=400, deadline=now + 0.15)
        queued = rig.submit(max_tokens=400, deadline=now + 0.05)
        late = rig.submit(deadline=now - 1)
        for job, due in ((late, 0.0), (queued, 0.05), (running, 0.15)):
            _, error = read(job)
            assert isinstance(error, InferenceTimeout) and due <= time.monotonic() - now < due + 0.15
        assert rig.submit(max_tokens=3, deadline=time.monotonic() + 30).completion().finish_reason == "length"
        rig.settle()


# -- ends


def test_shutdown_gives_grace_then_ends_the_rest():
    with Rig(never_stop=True, step_seconds=0.005) as rig:
        short, long = rig.submit(max_tokens=20), rig.submit(max_tokens=400)
        began = time.monotonic()
        rig.loop.shutdown(0.4)
        assert 0.35 < time.monotonic() - began < 0.8
        assert isinstance(read(short)[1], Finished)
        assert isinstance(read(long)[1], NotReady)
        with pytest.raises(NotReady):
            rig.submit()
        with pytest.raises(NotReady):
            rig.loop.forward(np.array([1], np.int32))


def test_shutdown_stops_the_engine_before_it_ends_the_jobs():
    """Else every end would have to wait for a step of those that still run, on a busy machine for a long one."""
    with Rig(never_stop=True, step_seconds=0.002) as rig:
        jobs = [rig.submit(max_tokens=400) for _ in range(4)]
        wait_for(lambda: all(job.state == "decode" for job in jobs))
        ended, begun_after = jobs[0]._on_end, []

        def end_slowly(job):
            ended(job)
            time.sleep(0.1)

        def begin(call, n_rows, begin=rig.engine._begin):
            if jobs[0]._ending:
                begun_after.append(call)
            begin(call, n_rows)

        jobs[0]._on_end, rig.engine._begin = end_slowly, begin
        rig.loop.shutdown(0.02)
        assert all(isinstance(read(job)[1], NotReady) for job in jobs)
        assert len(begun_after) <= 1, "one may have been on its way"


def test_shutdown_returns_at_once_when_idle():
    with Rig() as rig:
        rig.submit(max_tokens=3).completion()
        began = time.monotonic()
        rig.loop.shutdown(5)
        assert time.monotonic() - began < 0.5


def test_close_ends_what_waits_for_logits():
    rig = Rig(step_seconds=0.05, max_batch_tokens=16)
    caught = []

    def forward():
        try:
            rig.loop.forward(np.ones(500, np.int32))
        except WorkerError as error:
            caught.append(error)

    thread = threading.Thread(target=forward)
    thread.start()
    wait_for(lambda: "forward" in rig.engine.calls)
    assert rig.loop.close() and rig.loop.close()
    thread.join(5)
    assert not thread.is_alive() and isinstance(caught[0], NotReady)


def test_idle_costs_nothing():
    with Rig() as rig:
        rig.submit(max_tokens=3).completion()
        n_calls = len(rig.engine.calls)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05 and len(rig.engine.calls) == n_calls


def test_a_storm_of_submits_and_cancels():
    """Eight threads submit, read a little, cancel; at the end everything is free and every job has ended once."""
    with Rig(max_seqs=3, max_queue=1000, n_blocks=(12, 12), ring_capacity=64) as rig:
        ends = []

        def client(number):
            rng = np.random.default_rng(number)
            for i in range(25):
                job = rig.submit(
                    [1 + i] * int(rng.integers(1, 90)),
                    int(rng.integers(1, 60)),
                    seed=i,
                    deadline=time.monotonic() + float(rng.uniform(0.001, 2)),
                )
                n_read = 0
                for _ in range(int(rng.integers(0, 5))):
                    try:
                        if isinstance(job.next_event(5), Finished):
                            break
                    except WorkerError:
                        break
                    n_read += 1
                if rng.random() < 0.5:
                    job.cancel()
                ends.append(read(job, index=n_read)[1])

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(ends) == 200
        assert all(isinstance(e, Finished | Cancelled | InferenceTimeout) for e in ends)
        rig.settle()


def test_jobs_that_are_submitted_together_begin_together():
    with Rig(max_seqs=8, max_batch_tokens=64) as rig:
        alone = [read(rig.submit((i, 2, 3), max_tokens=5)) for i in range(1, 7)]
        rig.settle()
        rig.engine.calls.clear()
        rig.engine.n_rows_seen = 0
        with rig.loop.together():
            jobs = [rig.submit((i, 2, 3), max_tokens=5) for i in range(1, 7)]
            time.sleep(0.05)
            assert rig.engine.calls == []
        crowd = [read(job) for job in jobs]
        ids = [[[p.token_ids for p in pieces] for pieces, _ in jobs] for jobs in (alone, crowd)]
        assert ids[0] == ids[1] and all(ids[0])
        assert rig.engine.n_rows_seen == 6 * 3 and rig.engine.calls.count("step") == 1, "all prompts in one step"


def test_a_job_tells_what_the_prefix_cache_spared_it():
    prompt = [1 + i % 40 for i in range(150)]
    with Rig(never_stop=True) as rig:
        for spared in (0, 149):
            job = rig.submit(prompt=prompt)
            job.next_event(5)
            assert job.cached_tokens == spared, "known with the first token"
            assert job.completion().cached_tokens == spared
        rig.settle()
        stats = rig.scheduler.cache_stats()
        assert (stats.query_tokens, stats.hit_tokens, stats.n_used_blocks) == (300, 149, 0)


def test_an_answer_that_a_stop_string_has_cut_is_found_in_the_next_turn():
    """The engine was some tokens further when the string was seen. The next turn goes on with those, or with others."""
    prompt = [1 + i % 40 for i in range(100)]
    with Rig(never_stop=True) as cold:
        whole = cold.submit(prompt=prompt, max_tokens=150).completion()
    shown = next(n for n in range(40, 150) if whole.text.index(whole.text[n - 3 : n]) == n - 3)
    for others in ([], [7, 7, 7]):
        with Rig(never_stop=True, step_seconds=0.001) as rig:
            done = rig.submit(prompt=prompt, max_tokens=150, stop=(whole.text[shown - 3 : shown],)).completion()
            assert done.token_ids == whole.token_ids[:shown] and done.cached_tokens == 0
            rig.settle()
            turn = [*prompt, *done.token_ids, *others, *whole.token_ids[shown:], 5]
            again = rig.submit(prompt=turn, max_tokens=20).completion()
            n_least = len(prompt) + shown - 1
            assert n_least - 7 <= again.cached_tokens <= (n_least + 1 if others else len(turn) - 2)
            rig.settle()
            stats = rig.scheduler.cache_stats()
            assert (stats.query_tokens, stats.hit_tokens) == (len(prompt) + len(turn), again.cached_tokens)
        with Rig(never_stop=True) as cold:
            assert again.token_ids == cold.submit(prompt=turn, max_tokens=20).completion().token_ids


def test_an_engine_call_that_fails_empties_the_prefix_cache():
    prompt = [1 + i % 40 for i in range(150)]
    with Rig(never_stop=True) as rig:
        wanted = rig.submit(prompt=prompt).completion().token_ids
        rig.engine.fail_with = CudaError("a launch failed", driver_call="x")
        assert isinstance(read(rig.submit(prompt=prompt[:100]))[1], CudaError)
        assert rig.scheduler.cache_stats().n_cached_blocks == 0
        done = rig.submit(prompt=prompt).completion()
        assert done.cached_tokens == 0 and done.token_ids == wanted
        rig.settle()
