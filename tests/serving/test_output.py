"""Output without its thread: what becomes of the tokens, marks and deadlines of a ring that is read to its end."""

from __future__ import annotations

import threading
import time

import pytest

from worker_orcd import SamplingParams
from worker_orcd._ring import TokenRing
from worker_orcd.errors import InferenceTimeout, InternalError
from worker_orcd.serving.detokenizer import Detokenizer
from worker_orcd.serving.entry import FAILED, LENGTH, MARKS, STOP, Entry
from worker_orcd.serving.job import Job
from worker_orcd.serving.output import Output
from worker_orcd.serving.work import SequenceState


class Rig:
    def __init__(self) -> None:
        self.ring, self.lock, self.entries = TokenRing(), threading.Condition(), {}
        self.output = Output(self.ring, self.lock, self.entries)

    def job(self, seq_id: int, text: Detokenizer | None = None) -> Job:
        job = Job(f"j{seq_id}", seq_id, SamplingParams(), 0, 1, None, lambda job: self.entries.pop(job.seq_id, None))
        seq = SequenceState(seq_id, [1], 9, None, True, False)
        if text is None:
            job.sink.decode_with(None, (), ())
        self.entries[seq_id] = Entry(seq, job, text)
        self.output.add(self.entries[seq_id])
        return job

    def run(self) -> None:
        """Read what was put, once."""
        self.ring.close()
        self.output.run()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_tokens_go_to_their_jobs_and_marks_end_them(rig):
    first, second = rig.job(1), rig.job(2)
    for seq_id, token in ((1, 10), (2, 20), (1, 11), (3, 30), (1, STOP), (2, LENGTH), (1, 12)):
        rig.ring.put(seq_id, token)
    rig.run()
    assert (list(first.completion().token_ids), first.completion().finish_reason) == ([10, 11], "stop")
    assert (list(second.completion().token_ids), second.completion().finish_reason) == ([20], "length")
    assert set(MARKS.values()) == {STOP, LENGTH, FAILED} and max(MARKS.values()) < -1


def test_logits_that_are_no_numbers_and_text_that_cannot_be_made_end_one_job(rig):
    class Broken:
        def push(self, token: int) -> None:
            raise KeyError(token)

    failed, broken, good = rig.job(1), rig.job(2, Broken()), rig.job(3)
    for seq_id, token in ((1, FAILED), (2, 5), (3, 5), (3, STOP)):
        rig.ring.put(seq_id, token)
    rig.run()
    with pytest.raises(InternalError, match="no numbers"):
        failed.completion()
    with pytest.raises(InternalError, match="KeyError: 5"):
        broken.completion()
    assert list(good.completion().token_ids) == [5]


def test_deadlines_end_jobs_in_their_order(rig):
    late, soon, gone = rig.job(1), rig.job(2), rig.job(3)
    now = time.monotonic()
    with rig.lock:
        assert rig.output.watch(now + 100, late.seq_id)
        assert rig.output.watch(now - 1, soon.seq_id)
        assert rig.output.watch(now - 2, gone.seq_id), "the next one"
        assert not rig.output.watch(now + 50, 99), "not the next one"
    gone.cancel()
    rig.output.wake()
    rig.run()
    with pytest.raises(InferenceTimeout):
        soon.completion()
    assert rig.entries.keys() == {late.seq_id}
    rig.output.wake()  # the ring is closed now: nothing to wake, no error
