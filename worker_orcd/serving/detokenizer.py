"""Detokenizer: the tokens of one job on their way to its pieces - decoded, searched for stop strings, cut into events.

It is for decoders that are Python, as those of libraries are; with a `TextDecoder` the job's sink does the same without
Python (csrc/host/job_sink.h). The output thread owns these objects.
"""

from __future__ import annotations

from typing import Protocol

from worker_orcd.serving.job import Job
from worker_orcd.serving.stop_strings import StopMatcher


class Decoder(Protocol):
    """What is needed of a tokenizer's stream decoder: text only ever of whole characters."""

    def push(self, token_id: int) -> str:
        """Take a token, return the text it completes, possibly none."""

    def flush(self) -> str:
        """The end of the text: what is left of an unfinished character."""


class Detokenizer:
    """Feeds one job.

    Args:
        job: the job to feed.
        decoder: None for a model without a tokenizer: then every token is a piece with no text.
        stop_ids: tokens that end the job, which are not part of the text: the model's, unless they are ignored, and
            those of the job's params.
    """

    def __init__(self, job: Job, decoder: Decoder | None, stop_ids: frozenset[int]) -> None:
        self.job = job
        self._decoder = decoder
        self._stop_ids = stop_ids
        self._matcher = StopMatcher(job.params.stop)
        self._waiting: list[int] = []  # tokens whose text has not been shown
        self._past_end = False
        self._stop_token: int | None = None
        self._n_unwatched = job.params.min_tokens  # tokens left in whose text stop strings do not count

    def push(self, token: int) -> None:
        """Take the next token; a complete stop string ends the job."""
        if token in self._stop_ids:
            if not self._past_end and token in self.job.params.stop_token_ids:
                self._stop_token = token
            self._past_end = True  # an engine may draw a token or two more before it knows
        if self._past_end:
            return
        self._waiting.append(token)
        text, stopped = self._decoder.push(token) if self._decoder else "", False
        if self._n_unwatched:
            self._n_unwatched -= 1
        else:
            text, stopped = self._matcher.push(text)
        self._show(text, last=stopped)
        if stopped:
            self.job.finish("stop", self._matcher.found)

    def end(self, finish_reason: str) -> None:
        """The sequence has no more tokens: show what was held back and finish the job."""
        text, stopped = self._matcher.push(self._decoder.flush() if self._decoder else "")
        self._show(text if stopped else text + self._matcher.flush(), last=True)
        self.job.finish("stop" if stopped else finish_reason, self._matcher.found or self._stop_token)

    def _show(self, text: str, last: bool) -> None:
        if text or (self._decoder is None and self._waiting):
            self.job.add_piece(text, self._waiting)
        elif last:
            self.job.add_silent_tokens(self._waiting)
        else:
            return
        self._waiting = []
