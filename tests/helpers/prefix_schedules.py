"""Random schedules of prompts with common starts, each answer compared with that of the same prompt alone and cold.

Ids must be the same and log-probabilities bit-equal: in a crowd, with a cold and a warm cache, in a KV cache so small
that prefixes are evicted between two uses, beside cancelled twins, and for a conversation that comes back with its
answers: whole, cut, ended by a stop string, cancelled, or while the answer is still generated. `FEW` sequences run
together, or `MANY`.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from worker_orcd import LLM, SamplingParams
from worker_orcd.engine.kv_blocks import block_bytes
from worker_orcd.errors import Cancelled
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.runtime.request import Request
from worker_orcd.serving.job import Completion, Job
from worker_orcd.serving.work import DecodeWork, StepWork

#: positions of a sequence
CONTEXT = 256

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much runs together.

    Attributes:
        seqs, blocks: slots, and blocks of each KV group, of the model with the small cache and of that with the large.
        batch_tokens: of a step.
        starts: prompts that a schedule begins with.
        max_tokens: one of these a request.
        again: share of the requests that are one of the same crowd once more.
        requests: of one crowd.
        together: those of them that begin together at first; 1: each is made up when the one before is on its way.
    """

    seqs: tuple[int, int]
    blocks: tuple[int, int]
    batch_tokens: int
    starts: int
    max_tokens: tuple[int, ...]
    again: float
    requests: int
    together: int


FEW = Size(
    seqs=(4, 8),
    blocks=(6, 60),
    batch_tokens=96,
    starts=2,
    max_tokens=(1, 3, 8, 20, 70),
    again=0.0,
    requests=4,
    together=1,
)
#: as many as a GPU takes, and some that wait
MANY = Size(
    seqs=(256, 256),
    blocks=(300, 1024),
    batch_tokens=768,
    starts=24,
    max_tokens=(1, 8, 40, 80, 80),
    again=0.4,
    requests=288,
    together=256,
)


@dataclasses.dataclass(frozen=True)
class Known:
    """A prompt of `n_prompt` tokens and what was generated behind it."""

    tokens: Ids
    n_prompt: int


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request. `n_asked` tokens at the start of its prompt, if it has as many, were not generated."""

    prompt: Ids
    params: SamplingParams
    is_cancelled: bool
    n_asked: int


class Schedules:
    """A model with a small KV cache, one with a large one, and one without prefix cache that says what is right."""

    def __init__(self, path: Path, device: str, seed: int, size: Size = FEW) -> None:
        self._random = random.Random(seed)
        self._size = size
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
                max_batch_tokens=size.batch_tokens,
                max_queue=size.requests,
                progress=False,
                prefix_cache=prefix_cache,
            )

        self._right = load(max(size.blocks), 1, False)
        self._models = [load(n, seqs, True) for seqs, n in zip(size.seqs, size.blocks, strict=True)]
        #: most sequences that had a slot at once, that were in one decode run, and that decoded beside prompt tokens
        self.most_running = self.most_decoding = self.most_beside = 0
        for model in self._models:
            self._watch(model)
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
            fresh = [self._words(self._random.choice((20, 64, 100, 140))) for _ in range(self._size.starts)]
            known = [Known(tokens, len(tokens)) for tokens in fresh]
            logprobs = self._random.choice((True, False))
            for wanted in (logprobs, not logprobs):  # two crowds, so that the second finds what the first has left
                for ask, job in self._crowd(model, known, wanted):
                    ids = self._compare(ask, job)
                    if len(ask.prompt) + len(ids) < CONTEXT - 60:
                        known.append(Known((*ask.prompt, *ids), len(ask.prompt)))

    def check(self, n: int) -> None:
        """That `n` schedules have tried what they are for."""
        print(
            f"{self.n_compared} answers, {self.n_hits} with a hit, {self.n_answer_hits} of them in what was generated, "
            f"{self.n_stopped} ended by a stop string, {self.n_evicted} blocks evicted"
        )
        assert self.n_evicted >= n
        n *= self._size.requests // FEW.requests
        assert self.n_compared > 10 * n and self.n_hits > 4 * n
        assert self.n_answer_hits >= n and self.n_stopped >= n // 2

    def check_crowds(self) -> None:
        """That as many sequences as can ran at once, and many of them decoded together, beside prompts and without."""
        print(
            f"up to {self.most_running} sequences at once, {self.most_decoding} in a decode run, {self.most_beside} "
            "beside prompt tokens"
        )
        most = max(self._size.seqs)
        assert self.most_running == most and min(self.most_decoding, self.most_beside) > most // 4

    def _watch(self, model: LLM) -> None:
        """See how many sequences run on a model; its engine thread asks the scheduler what is next."""
        scheduler = model._scheduler
        inner = scheduler.next_work

        def next_work() -> object:
            work = inner()
            self.most_running = max(self.most_running, len(scheduler.running))
            if isinstance(work, DecodeWork):
                self.most_decoding = max(self.most_decoding, len(work.slots))
            elif isinstance(work, StepWork) and work.n_prefill_tokens:
                self.most_beside = max(self.most_beside, work.batch.n_decode)
            return work

        scheduler.next_work = next_work

    def _crowd(self, model: LLM, known: list[Known], logprobs: bool) -> list[tuple[Ask, Job]]:
        """Submit the requests of a crowd and cancel some of them. Who wants log-probabilities keeps all from decode
        runs, so there are crowds where nobody does."""
        together = self._size.together
        asks = self._asks(known, (None, 5) if logprobs else (None,))
        if together > 1:  # what is asked for may depend on what is right, which takes longer than many an answer
            asks = iter(list(asks))
        asked: list[tuple[Ask, Job]] = []
        while burst := list(islice(asks, 1 if asked else together)):
            if self._random.random() < 0.3:
                time.sleep(0.002)
            jobs = model.submit_requests([Request(list(ask.prompt), params=ask.params) for ask in burst])
            asked += zip(burst, jobs, strict=True)
        for ask, job in asked:
            if ask.is_cancelled:
                job.cancel()
                self.n_cancelled += 1
        return asked

    def _compare(self, ask: Ask, job: Job) -> Ids:
        """Returns the answer, or what a client may have seen of it."""
        right = self._right_answer(ask.prompt, ask.params)
        try:
            done = job.completion()
        except Cancelled:
            return right.token_ids[: job.tokens_out]
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

    def _asks(self, known: list[Known], logprobs: tuple[int | None, ...]) -> Iterator[Ask]:
        """The requests of a crowd."""
        before: list[Ask] = []
        for _ in range(self._size.requests):
            if before and self._random.random() < self._size.again:
                is_cancelled = self._random.random() < 0.2
                before.append(dataclasses.replace(self._random.choice(before), is_cancelled=is_cancelled))
            else:
                before.append(self._ask(known, before, self._random.choice(logprobs)))
            yield before[-1]

    def _ask(self, known: list[Known], before: list[Ask], logprobs: int | None) -> Ask:
        start = self._random.choice(known)
        if before and self._random.random() < 0.2:  # the next turn of one that may still be generated
            turn = self._random.choice(before)
            answer = self._right_answer(turn.prompt, turn.params).token_ids
            start = Known((*turn.prompt, *answer[: self._random.randrange(len(answer) + 1)]), len(turn.prompt))
        tokens = start.tokens
        if self._random.random() < 0.4:
            tokens = tokens[: self._random.randrange(len(tokens)) + 1]
        prompt = (*tokens, *self._words(self._random.choice((0, 1, 5, 20, 40))))[: CONTEXT - 30]
        params = SamplingParams(
            max_tokens=min(self._random.choice(self._size.max_tokens), CONTEXT - len(prompt)),
            temperature=self._random.choice((0.0, 0.9)),
            seed=self._random.randrange(2),
            ignore_eos=True,
            logprobs=logprobs,
        )
        if self._random.random() < 0.2:
            text = self._right_answer(prompt, params).text
            at = self._random.randrange(len(text) + 1)
            if stop := text[at : at + self._random.choice((1, 2, 5))]:
                params = dataclasses.replace(params, stop=(stop,))
        return Ask(prompt, params, self._random.random() < 0.2, start.n_prompt)

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
