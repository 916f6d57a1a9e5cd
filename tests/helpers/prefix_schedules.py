"""Random schedules of prompts with common starts, each answer compared with that of the same prompt alone and cold.

Ids must be the same and log-probabilities bit-equal: in a crowd, with a cold and a warm cache, in a KV cache so small
that prefixes are evicted between two uses, beside cancelled twins, and for a conversation that comes back with its
answers: whole, cut, ended by a stop string, cancelled, or while the answer is still generated.
"""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

from worker_orcd import LLM, SamplingParams
from worker_orcd.engine.kv_blocks import block_bytes
from worker_orcd.errors import Cancelled
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.serving.job import Completion, Job

#: positions of a sequence, and blocks of each KV group of the small and of the large cache
CONTEXT = 256
SMALL, LARGE = 6, 60
#: as many requests of one schedule
REQUESTS = 9

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Known:
    """A prompt of `n_prompt` tokens and what was generated behind it."""

    tokens: Ids
    n_prompt: int


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request. `n_asked` tokens at the start of its prompt, if it has as many, were not generated."""

    job: Job
    prompt: Ids
    params: SamplingParams
    is_cancelled: bool
    n_asked: int


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
        self._answers: dict[tuple[Ids, SamplingParams], Completion] = {}
        #: answers compared; those of them that took tokens from the cache, and that took generated ones; those that a
        #: stop string ended; jobs that were cancelled
        self.n_compared = self.n_hits = self.n_answer_hits = self.n_stopped = self.n_cancelled = 0

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
            fresh = [self._words(self._random.choice((20, 64, 100, 140))) for _ in range(2)]
            known = [Known(tokens, len(tokens)) for tokens in fresh]
            for _ in range(2):  # two crowds, so that the second finds what the first has left
                asks: list[Ask] = []
                for _ in range(REQUESTS // 2):
                    asks.append(self._submit(model, known, asks))
                for ask in asks:
                    if ask.is_cancelled:
                        ask.job.cancel()
                        self.n_cancelled += 1
                for ask in asks:
                    ids = self._compare(ask)
                    if len(ask.prompt) + len(ids) < CONTEXT - 60:
                        known.append(Known((*ask.prompt, *ids), len(ask.prompt)))

    def check(self, n: int) -> None:
        """That `n` schedules have tried what they are for."""
        print(
            f"{self.n_compared} answers, {self.n_hits} with a hit, {self.n_answer_hits} of them in what was generated, "
            f"{self.n_stopped} ended by a stop string, {self.n_evicted} blocks evicted"
        )
        assert self.n_compared > 10 * n and self.n_hits > 4 * n and self.n_evicted >= n
        assert self.n_answer_hits >= n and self.n_stopped >= n // 2

    def _compare(self, ask: Ask) -> Ids:
        """Returns the answer, or what a client may have seen of it."""
        right = self._right_answer(ask.prompt, ask.params)
        try:
            done = ask.job.completion()
        except Cancelled:
            return right.token_ids[: ask.job.tokens_out]
        assert (done.token_ids, done.logprobs) == (right.token_ids, right.logprobs), (
            f"prompt of {len(ask.prompt)} tokens, {done.cached_tokens} of them cached"
        )
        self.n_compared += 1
        self.n_hits += done.cached_tokens > 0
        self.n_answer_hits += done.cached_tokens > ask.n_asked
        self.n_stopped += done.stop_reason is not None
        return done.token_ids

    def _words(self, n: int) -> Ids:
        return tuple(self._random.randrange(3, self._n_vocab) for _ in range(n))

    def _submit(self, model: LLM, known: list[Known], running: list[Ask]) -> Ask:
        start = self._random.choice(known)
        if running and self._random.random() < 0.2:  # the next turn of one that may still be generated
            before = self._random.choice(running)
            answer = self._right_answer(before.prompt, before.params).token_ids
            start = Known((*before.prompt, *answer[: self._random.randrange(len(answer) + 1)]), len(before.prompt))
        tokens = start.tokens
        if self._random.random() < 0.4:
            tokens = tokens[: self._random.randrange(len(tokens)) + 1]
        prompt = (*tokens, *self._words(self._random.choice((0, 1, 5, 20, 40))))[: CONTEXT - 30]
        params = SamplingParams(
            max_tokens=min(self._random.choice((1, 3, 8, 20, 70)), CONTEXT - len(prompt)),
            temperature=self._random.choice((0.0, 0.9)),
            seed=self._random.randrange(2),
            ignore_eos=True,
            logprobs=self._random.choice((None, 5)),
        )
        if self._random.random() < 0.2:
            text = self._right_answer(prompt, params).text
            at = self._random.randrange(len(text) + 1)
            if stop := text[at : at + self._random.choice((1, 2, 5))]:
                params = dataclasses.replace(params, stop=(stop,))
        if self._random.random() < 0.3:
            time.sleep(0.002)
        is_cancelled = self._random.random() < 0.2
        return Ask(model.submit(list(prompt), params), prompt, params, is_cancelled, start.n_prompt)

    def _right_answer(self, prompt: Ids, params: SamplingParams) -> Completion:
        if (prompt, params) not in self._answers:
            done = self._right.generate([list(prompt)], params)[0]
            assert done.cached_tokens == 0
            self._answers[prompt, params] = done
        return self._answers[prompt, params]

    def _forget(self, model: LLM) -> None:
        """Begin with a cold cache. Nothing runs, so nobody else uses the scheduler."""
        scheduler = model._scheduler
        until = time.monotonic() + 5
        while (scheduler.running or scheduler.n_waiting) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)  # the engine thread may be at the end of its last step
        scheduler.forget_prefixes()
