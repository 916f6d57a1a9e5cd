"""A scheduler and its pace on an engine that only takes time, by a clock of its own: what steps take is made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.models.plan import KvGroup
from worker_orcd.serving import engine_work
from worker_orcd.serving.engine_work import EngineWork
from worker_orcd.serving.pace import Pace
from worker_orcd.serving.scheduler import Scheduler
from worker_orcd.serving.work import SequenceState

#: (rows, milliseconds) of a step: of a GPU, with the jump from eight rows to nine
PHI3 = ((1, 1.4), (8, 1.4), (9, 3.0), (64, 4.0), (512, 12.0), (2048, 40.0))
GPT_OSS = ((1, 1.3), (8, 3.5), (9, 4.5), (32, 6.9), (64, 7.3), (256, 14.4), (512, 20.0), (2048, 50.0))
GREEDY = SamplingParams(temperature=0.0, seed=0)
N_POSITIONS = 1 << 17


def step_seconds(table: Sequence[tuple[int, float]], rows: int) -> float:
    """By a table, straight between its rows; past 64 a tile of 64 rows that is not full takes as long as a full one."""
    rows = -(-rows // 64) * 64 if rows > 64 else rows
    return 1e-3 * float(np.interp(rows, *zip(*table, strict=True)))


class Paced:
    """Running streams, and prompts that come.

    Args:
        seconds: what a step of so many rows takes; of a mixed step the work between two calls is in it.
        disturb: (number of the step, its seconds) -> its seconds.

    Attributes:
        now: the clock.
        gaps: seconds between the tokens of a stream, all streams having the same.
        steps: of each step with prompt tokens (sequences that decode, prompt tokens, seconds).
    """

    def __init__(
        self,
        monkeypatch,
        seconds: Callable[[int], float],
        max_seqs: int = 256,
        max_batch_tokens: int = 2048,
        disturb: Callable[[int, float], float] = lambda n, seconds: seconds,
    ) -> None:
        self._seconds, self._disturb = seconds, disturb
        config = EngineConfig(max_seqs, max_batch_tokens, N_POSITIONS, (1 << 19,))
        self.config, self.n_vocab = config, 50
        self.block_tables = np.full((1, max_seqs, config.max_blocks_per_seq), -1, np.int32)
        self.scheduler = Scheduler(config, (KvGroup(0, (0,)),), self.block_tables, prefix_cache=False)
        monkeypatch.setattr(engine_work, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.pace = Pace(max_batch_tokens)
        ring = SimpleNamespace(put_many=lambda *_: None, put=lambda *_: None)
        self.work = EngineWork(self, self.scheduler, ring, SimpleNamespace(step_done=lambda: None), _All(), self.pace)
        self.now = self.until = 0.0
        self.gaps: list[float] = []
        self.steps: list[tuple[int, int, float]] = []
        self.n_steps = 0
        self._began = 0.0
        self._n_seqs = 0

    # -- the engine

    def set_slot(self, *_):
        pass

    def step(self, batch, want_logits=False, control=None):
        n_prompt = len(batch.tokens) - batch.n_decode
        self._take(len(batch.tokens), batch.n_decode)
        if n_prompt:
            self.steps.append((batch.n_decode, n_prompt, self.now - self._began))
        return np.ones(len(batch.output_indices), np.int32), None

    def decode(self, slots, seq_ids, tokens, positions, n_steps, *_):
        done = 0
        while done < n_steps and (not done or self.now < self.until):
            self._take(len(slots), len(slots))
            done += 1
        return np.ones((done, len(slots)), np.int32)

    def _take(self, rows, n_decode):
        self._began = self.now
        self.now += self._disturb(self.n_steps, self._seconds(rows))
        self.n_steps += 1
        if n_decode:
            self.gaps.append(self.now - self._began)

    # -- what happens to it

    def add(self, n_prompt: int, max_tokens: int) -> SequenceState:
        """Queue a sequence that never stops."""
        self._n_seqs += 1
        seq = SequenceState(self._n_seqs, np.ones(n_prompt, np.int32), max_tokens, GREEDY, stops=False)
        self.scheduler.add(seq)
        return seq

    def run(self, until: float) -> None:
        """One call of the engine; a decode run is interrupted at `until`. With nothing to do it is then."""
        self.until = until
        self.work.begin(self.scheduler.admit())
        self.work.run()
        if not self.scheduler.running:
            self.now = max(self.now, until)

    def start(self, n_streams: int) -> None:
        """Streams of short prompts that decode from now on, and have done so for a while."""
        for _ in range(n_streams):
            self.add(10, 100_000)
        while not self.scheduler.running or any(seq.prefilling for seq in self.scheduler.running):
            self.run(self.now)
        self.run(self.now + 0.5)
        self.gaps.clear()
        self.steps.clear()

    def arrivals(self, seconds: float, rest: float, n_prompt: int = 2000) -> tuple[int, list[float]]:
        """For so long prompts come one after another, each `rest` times as long after the one before as that took.

        Returns:
            (prompt tokens read, seconds from each prompt's coming to its token).
        """
        end, n_tokens, took, at = self.now + seconds, 0, [], self.now
        while self.now < end:
            while self.now < at:
                self.run(at)
            began, seq = self.now, self.add(n_prompt, 1)
            while seq.ended is None:
                self.run(self.now)
            n_tokens += n_prompt
            took.append(self.now - began)
            at = self.now + rest * took[-1]
        return n_tokens, took


class _All(dict):
    """The entries of a loop in which every sequence is wanted."""

    def __contains__(self, key: object) -> bool:
        return True


def percentile(values: Sequence[float], share: float) -> float:
    """Of values in any order."""
    return float(np.quantile(values, share))
