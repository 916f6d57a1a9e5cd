"""What fails in the loop, in its engine or in who listens to it ends what it must, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fake_engine import STOP_ID, FakeEngine, LetterDecoder
from helpers.loop_rig import Rig, read, wait_for

from worker_orcd.engine.token_edits import NO_EDITS
from worker_orcd.errors import (
    CudaError,
    EngineGone,
    InternalError,
    InvalidRequest,
    ModelLoadError,
    NotReady,
)
from worker_orcd.serving import engine_work


def test_an_engine_error_ends_what_runs_and_nothing_else():
    with Rig(max_seqs=2, never_stop=True, step_seconds=0.005) as rig:
        running = [rig.submit(max_tokens=300, seed=i) for i in range(2)]
        wait_for(lambda: all(j.state == "decode" for j in running))
        queued = rig.submit(max_tokens=5)
        rig.submit(max_tokens=5).cancel()
        wait_for(lambda: rig.scheduler.n_waiting == 1)
        rig.engine.fail_with = ValueError("planted")
        for job in running:
            _, error = read(job)
            assert isinstance(error, InternalError) and "planted" in error.message
        assert queued.completion().finish_reason == "length"
        assert rig.fatal == [] and rig.loop.error is None
        rig.settle()


def test_a_sticky_cuda_error_kills_the_loop():
    with Rig(max_seqs=1, never_stop=True, step_seconds=0.005) as rig:
        jobs = [rig.submit(max_tokens=300) for _ in range(3)]
        wait_for(lambda: jobs[0].state == "decode")
        rig.engine.fail_with = CudaError("illegal address", call="cuLaunchKernel", sticky=True)
        for job in jobs:
            _, error = read(job)
            assert isinstance(error, CudaError) and error.code == "CUDA_ERROR"
        wait_for(lambda: rig.fatal)
        assert rig.fatal == [rig.loop.error]
        with pytest.raises(NotReady, match="illegal address"):
            rig.submit()


@pytest.mark.parametrize("at", [1, 5])
def test_a_sequence_without_a_next_token_fails_alone(at):
    """NaN logits: the engine draws -1."""

    class Poisoned(FakeEngine):
        def _draw(self, digest, slot, pos):
            return -1 if self.sampling[slot].seed == 99 and pos == 1 + at else super()._draw(digest, slot, pos)

    with Rig(never_stop=True, engine_class=Poisoned) as rig:
        good, bad = rig.submit(max_tokens=20), rig.submit(max_tokens=20, seed=99, logprobs=1 if at == 5 else None)
        pieces, error = read(bad)
        assert isinstance(error, InternalError) and "no numbers" in error.message and len(pieces) == at - 1
        assert good.completion().finish_reason == "length"
        rig.settle()


def test_a_failing_decoder_hurts_its_job_only():
    class Failing(LetterDecoder):
        def push(self, token_id):
            raise KeyError("planted")

    decoders = iter([LetterDecoder(), Failing()])
    with Rig(never_stop=True, decoder=lambda: next(decoders)) as rig:
        good, bad = rig.submit(max_tokens=50), rig.submit(max_tokens=50)
        assert isinstance(read(bad)[1], InternalError)
        assert good.completion().finish_reason == "length"
        rig.settle()


class Panic(BaseException):
    """As the libraries raise that are written in Rust."""


@pytest.mark.parametrize("error", [KeyError, Panic])
@pytest.mark.parametrize("method", ["push", "flush"])
def test_a_decoder_that_fails_anywhere_hurts_its_job_only(method, error):
    def fail(*_):
        raise error("planted")

    failing = type("Failing", (LetterDecoder,), {method: fail})
    decoders = iter([LetterDecoder(), failing(), LetterDecoder()])
    with Rig(never_stop=True, decoder=lambda: next(decoders)) as rig:
        good, bad = rig.submit(max_tokens=50), rig.submit(max_tokens=20)
        end = read(bad)[1]
        assert isinstance(end, InternalError) and f"could not be made: {error.__name__}: " in end.message
        assert good.completion().finish_reason == "length" and rig.loop.error is None
        assert rig.submit(max_tokens=3).completion().finish_reason == "length"
        rig.settle()


def test_a_job_says_what_ended_it():
    with Rig() as rig:
        free = rig.submit(max_tokens=12, ignore_eos=True).completion()
        assert (free.finish_reason, free.stop_reason) == ("length", None)
        third, fifth = free.token_ids[2], free.text[4]
        by_id = rig.submit(max_tokens=12, ignore_eos=True, stop_token_ids=(third, 49)).completion()
        at = free.token_ids.index(third)
        assert (by_id.token_ids, by_id.finish_reason, by_id.stop_reason) == (free.token_ids[:at], "stop", third)
        assert by_id.text == free.text[:at], "a stop token is no text"
        stop = ("\N{SNOWMAN}", fifth)
        job = rig.submit(max_tokens=12, ignore_eos=True, stop=stop)
        _, end = read(job)
        by_text = job.completion()
        assert (end.stop_reason, by_text.stop_reason, by_text.finish_reason) == (fifth, fifth, "stop")
        assert by_text.text == free.text[: free.text.index(fifth)]
        ends = (rig.submit(seed=seed, max_tokens=400).completion() for seed in range(50))
        assert next(c for c in ends if c.finish_reason == "stop").stop_reason is None, "the model's own end"
        rig.settle()


def test_a_stop_string_does_not_count_before_min_tokens():
    with Rig(never_stop=True) as rig:
        free = rig.submit(max_tokens=30).completion()
        for least in (0, 1, 5, 29, 30):
            stop = free.text[0]
            at = free.text.find(stop, least)
            got = rig.submit(max_tokens=30, stop=stop, min_tokens=least).completion()
            want = (free.text, "length", None) if at < 0 else (free.text[:at], "stop", stop)
            assert (got.text, got.finish_reason, got.stop_reason) == want, least
        rig.settle()


def test_the_engine_is_told_what_a_job_edits():
    class Told(FakeEngine):
        def set_slot(self, slot, sampling, edits):
            told.append(edits)
            super().set_slot(slot, sampling, edits)

    told = []
    with Rig(engine_class=Told) as rig:
        rig.submit().completion()
        rig.submit(ignore_eos=True, min_tokens=3).completion()
        assert told == [NO_EDITS, NO_EDITS]
        rig.submit(min_tokens=3, logit_bias={5: 1.0}, stop_token_ids=(7,)).completion()
        tokens = told[2].words.reshape(-1, 5)[:, 0].tolist()
        assert told[2].n_bias == 1 and tokens[0] == 5 and set(tokens[1:]) == {STOP_ID, 7}
        rig.settle()


def test_a_job_that_cannot_be_started_fails_alone():
    class Picky(FakeEngine):
        def set_slot(self, slot, sampling, edits):
            if sampling.seed == 99:
                raise InvalidRequest("no such number", field="seed")
            super().set_slot(slot, sampling, edits)

    with Rig(max_seqs=2, never_stop=True, step_seconds=0.002, engine_class=Picky) as rig:
        good = rig.submit(max_tokens=100)
        wait_for(lambda: good.state == "decode")
        bad, behind = rig.submit(seed=99), rig.submit(max_tokens=5)
        end = read(bad)[1]
        assert isinstance(end, InvalidRequest) and end.fields["field"] == "seed"
        assert [job.completion().finish_reason for job in (good, behind)] == ["length"] * 2
        assert rig.fatal == []
        rig.settle()


def test_a_lost_device_at_a_start_kills_the_loop():
    class Lost(FakeEngine):
        def set_slot(self, slot, sampling, edits):
            raise CudaError("illegal address", call="cuMemcpyHtoD", sticky=True)

    with Rig(engine_class=Lost) as rig:
        assert isinstance(read(rig.submit())[1], CudaError)
        wait_for(lambda: rig.fatal)


def test_logprobs_that_cannot_be_made_end_one_job(monkeypatch):
    def fail(logits, token, n):
        if n == 7:
            raise IndexError("planted")
        return {token: -1.0}

    monkeypatch.setattr(engine_work, "top_logprobs", fail)
    with Rig(never_stop=True) as rig:
        good, bad = rig.submit(max_tokens=20, logprobs=1), rig.submit(max_tokens=20, logprobs=7)
        end = read(bad)[1]
        assert isinstance(end, InternalError) and "log-probabilities" in end.message and "planted" in end.message
        assert len(good.completion().logprobs) == 20
        rig.settle()


def test_logits_that_cannot_be_kept_end_one_job():
    class Wide(FakeEngine):
        def forward(self, batch, stop_after=None, control=None):
            logits = super().forward(batch, stop_after, control)
            return np.hstack([logits, logits]) if len(batch.tokens) == 3 else logits

    with Rig(never_stop=True, engine_class=Wide, step_seconds=0.002) as rig:
        good = rig.submit(max_tokens=50)
        with pytest.raises(InternalError, match="the logits could not be kept"):
            rig.loop.forward(np.array([1, 2, 3], np.int32))
        assert rig.loop.forward(np.array([1, 2], np.int32)).shape == (2, rig.engine.n_vocab)
        assert good.completion().finish_reason == "length"
        rig.settle()


@pytest.mark.parametrize("error", [ModelLoadError("was written to", "m.gguf"), EngineGone("the engine is closed")])
def test_what_will_fail_again_at_every_job_kills_the_loop(error):
    with Rig(max_seqs=1, never_stop=True, step_seconds=0.005) as rig:
        jobs = [rig.submit(max_tokens=300) for _ in range(2)]
        wait_for(lambda: jobs[0].state == "decode")
        rig.engine.fail_with = error
        assert [read(job)[1] for job in jobs] == [error] * 2
        wait_for(lambda: rig.fatal)
        assert rig.fatal == [error] == [rig.loop.error]
        with pytest.raises(NotReady, match="the worker has failed"):
            rig.submit()


def test_who_is_told_of_the_end_may_fail():
    told = []

    def fail(error):
        told.append(error)
        raise ValueError("planted")

    with Rig(never_stop=True, step_seconds=0.002) as rig:
        rig.loop._on_fatal = fail
        jobs = [rig.submit(max_tokens=300) for _ in range(3)]
        rig.engine.fail_with = CudaError("illegal address", call="cuLaunchKernel", sticky=True)
        assert [read(job)[1] for job in jobs] == [rig.loop.error] * 3
        wait_for(lambda: told)
        with pytest.raises(NotReady):
            rig.submit()


def test_a_panic_of_the_engine_is_an_error_of_what_runs():
    with Rig(never_stop=True, step_seconds=0.005) as rig:
        job = rig.submit(max_tokens=300)
        wait_for(lambda: job.state == "decode")
        rig.engine.fail_with = Panic("planted")
        end = read(job)[1]
        assert isinstance(end, InternalError) and "Panic: planted" in end.message
        assert rig.submit(max_tokens=3).completion().finish_reason == "length"
        rig.settle()
