"""Random schedules of prompts with common starts, each answer compared with that of the same prompt alone and cold.

Ids must be the same and log-probabilities bit-equal: in a crowd, with a cold and a warm cache, in a KV cache so small
that prefixes are evicted between two uses, beside cancelled twins, and for a conversation that comes back with its
answers.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from worker_orcd import LLM, SamplingParams
from worker_orcd.engine.kv_blocks import block_bytes
from worker_orcd.errors import Cancelled
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.serving.job import Job

#: positions of a sequence, and blocks of each KV group of the small and of the large cache
CONTEXT = 256
SMALL, LARGE = 6, 60
#: as many requests of one schedule
REQUESTS = 9

Ids = tuple[int, ...]


class Schedules:
    """A model with a small KV cache, one with a large one, and one without prefix cache that says what is right."""

    def __init__(self, path: Path, device: str, seed: int) -> None:
        self._random = random.Random(seed)
        with ModelFile(path) as model:
            block = sum(block_bytes(plan.build(model)))
            self._n_vocab = model.get_int(f"{model.arch}.vocab_size", 1, 1 << 30, 512)

        def load(n_blocks: int, max_seqs: int, prefix_cache: bool) -> LLM:
            return LLM(
                path,
                device=device,
                context_length=CONTEXT,
                kv_cache_bytes=n_blocks * block,
                max_seqs=max_seqs,
                max_batch_tokens=96,
                progress=False,
                prefix_cache=prefix_cache,
            )

        self._right = load(LARGE, 1, False)
        self._models = [load(SMALL, 4, True), load(LARGE, 8, True)]
        self._answers: dict[tuple[Ids, SamplingParams], tuple[Ids, object]] = {}
        #: answers compared, those of them that took tokens from the cache, those that were cancelled
        self.n_compared = self.n_hits = self.n_cancelled = 0

    def close(self) -> None:
        """Free the models."""
        for model in (self._right, *self._models):
            model.close()

    @property
    def n_evicted(self) -> int:
        """Blocks of the small cache that made room for others."""
        return self._models[0]._scheduler.cache_stats().n_evicted_blocks

    def run(self) -> None:
        """One schedule on each model."""
        for model in self._models:
            if self._random.random() < 0.3:
                self._forget(model)
            known: list[Ids] = [self._words(self._random.choice((20, 64, 100, 140))) for _ in range(2)]
            for _ in range(2):  # two crowds, so that the second finds what the first has left
                jobs = [self._submit(model, known) for _ in range(REQUESTS // 2)]
                for job, _, _, cancel in jobs:
                    if cancel:
                        job.cancel()
                        self.n_cancelled += 1
                for job, prompt, params, _ in jobs:
                    try:
                        done = job.completion()
                    except Cancelled:
                        continue
                    assert (done.token_ids, done.logprobs) == self._right_answer(prompt, params), (
                        f"prompt of {len(prompt)} tokens, {done.cached_tokens} of them cached"
                    )
                    self.n_compared += 1
                    self.n_hits += done.cached_tokens > 0
                    if len(prompt) + len(done.token_ids) < CONTEXT - 60:
                        known.append((*prompt, *done.token_ids))

    def _words(self, n: int) -> Ids:
        return tuple(self._random.randrange(3, self._n_vocab) for _ in range(n))

    def _submit(self, model: LLM, known: list[Ids]) -> tuple[Job, Ids, SamplingParams, bool]:
        start = self._random.choice(known)
        if self._random.random() < 0.4:
            start = start[: self._random.randrange(len(start)) + 1]
        prompt = (*start, *self._words(self._random.choice((0, 1, 5, 20, 40))))
        params = SamplingParams(
            max_tokens=self._random.choice((1, 3, 8, 20)),
            temperature=self._random.choice((0.0, 0.9)),
            seed=self._random.randrange(2),
            ignore_eos=True,
            logprobs=self._random.choice((None, 5)),
        )
        if self._random.random() < 0.3:
            time.sleep(0.002)
        return model.submit(list(prompt), params), prompt, params, self._random.random() < 0.2

    def _right_answer(self, prompt: Ids, params: SamplingParams) -> tuple[Ids, object]:
        if (prompt, params) not in self._answers:
            done = self._right.generate([list(prompt)], params)[0]
            assert done.cached_tokens == 0
            self._answers[prompt, params] = done.token_ids, done.logprobs
        return self._answers[prompt, params]

    def _forget(self, model: LLM) -> None:
        """Begin with a cold cache. Nothing runs, so nobody else uses the scheduler."""
        scheduler = model._scheduler
        until = time.monotonic() + 5
        while (scheduler.running or scheduler.n_waiting) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)  # the engine thread may be at the end of its last step
        scheduler.forget_prefixes()
