"""A loop on a fake engine, and how tests wait for it and read its jobs."""

from __future__ import annotations

import time

import numpy as np
from helpers.fake_engine import STOP_ID, FakeEngine, LetterDecoder

from worker_orcd._ring import Control, TokenRing
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import (
    WorkerError,
)
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving.engine_loop import EngineLoop
from worker_orcd.serving.job import Finished
from worker_orcd.serving.scheduler import Scheduler

GROUPS = (KvGroup(0, (0,)), KvGroup(24, (1,)))
LETTERS = LetterDecoder.LETTERS


class Rig:
    """A loop with its fake engine; closes and checks that nothing is left over."""

    def __init__(
        self,
        max_seqs=4,
        max_batch_tokens=32,
        context=512,
        n_blocks=(32, 32),
        max_queue=64,
        decoder=LetterDecoder,
        ring_capacity=1024,
        engine_class=FakeEngine,
        watchdog_sec=0.0,
        **engine,
    ) -> None:
        config = EngineConfig(max_seqs, max_batch_tokens, context, n_blocks)
        self.engine = engine_class(config, GROUPS, **engine)
        self.scheduler = Scheduler(
            config, GROUPS, self.engine.block_tables, [STOP_ID], copy_block=self.engine.copy_block
        )
        self.fatal: list[WorkerError] = []
        self.loop = EngineLoop(
            self.engine,
            self.scheduler,
            TokenRing(ring_capacity),
            Control(),
            new_decoder=decoder,
            max_queue=max_queue,
            on_fatal=self.fatal.append,
            watchdog_sec=watchdog_sec,
        )

    def submit(self, prompt=(1, 2, 3), max_tokens=20, seed=7, job_id=None, deadline=None, **params):
        return self.loop.submit(
            np.array(prompt, np.int32),
            SamplingParams(**params),
            seed,
            max_tokens=max_tokens,
            job_id=job_id,
            deadline=deadline,
        )

    def settle(self) -> None:
        """Wait until no sequence is in the engine, then check that everything is free."""
        wait_for(lambda: not self.scheduler.running and not self.scheduler.n_waiting)
        assert [p.n_free for p in self.scheduler.pools] == list(self.scheduler.config.n_blocks)
        assert self.scheduler.n_free_slots == self.scheduler.config.max_seqs
        wait_for(lambda: not self.loop._entries)
        assert not self.loop._jobs

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        began = time.monotonic()
        assert self.loop.close()
        assert time.monotonic() - began < 2
        assert not any(t.is_alive() for t in self.loop._threads)


def wait_for(condition, limit=5.0):
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, "does not happen"
        time.sleep(0.002)


def read(job, timeout=10.0, index=0):
    """All events of a job from piece `index` to its end: (pieces, Finished | error)."""
    pieces = []
    until = time.monotonic() + timeout
    while True:
        try:
            event = job.next_event(until - time.monotonic())
        except WorkerError as error:
            return pieces, error
        assert event is not None, "no terminal event"
        if isinstance(event, Finished):
            assert job.next_event(0) is event
            return pieces, event
        assert event.index == index + len(pieces)
        pieces.append(event)
