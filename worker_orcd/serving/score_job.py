"""ScoreJob: log-probabilities of the tokens of a given text, of which no matrix of logits is ever held."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.serving.deputy import Deputy
from worker_orcd.serving.job import Job
from worker_orcd.serving.logprobs import top_logprobs


class ScoreJob(Job):
    """A `Job` that generates nothing: it ends with 0 tokens once every token of its prompt has its log-probability.

    Attributes:
        prompt_logprobs: for each token of the prompt a dict {token id: log-probability} of the `n_top` most likely
            ones, most likely first, and the token itself, as `top_logprobs` gives them; None for the first token, which
            nothing predicts. Complete once the job has finished.
    """

    def __init__(
        self,
        job_id: str,
        seq_id: int,
        params: SamplingParams,
        seed: int,
        prompt: np.ndarray,
        n_top: int,
        deadline: float | None,
        on_end: Callable[[Job], None],
        deputy: Deputy | None = None,
    ) -> None:
        super().__init__(job_id, seq_id, params, seed, len(prompt), deadline, on_end, deputy)
        self.prompt_logprobs: list[dict[int, float] | None] = [None]
        self._prompt = prompt
        self._n_top = n_top

    def take(self, first: int, logits: np.ndarray) -> None:
        """The logits of the tokens from `first` on, float32 [n, n_vocab]: each predicts the token after it."""
        for row, token in zip(logits, self._prompt[first + 1 :], strict=False):
            if self.finished:
                return
            self.prompt_logprobs.append(top_logprobs(row, int(token), self._n_top))

    def complete(self) -> None:
        """The last logits were taken."""
        self.first_token_at = self.ended_at = time.monotonic()
        self.finish("length")
