"""SamplingParams: what a user may ask of one generation, and the rules each field keeps.

The ranges are those of the HTTP contract, so that a request means the same over HTTP and in Python. This module knows
no model, no tokenizer and no engine; limits that depend on them are arguments of `check`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from worker_orcd.engine.protocol import SlotSampling
from worker_orcd.errors import InvalidRequest

#: tokens generated where a request names no number, fewer where the context or the KV cache ends before
DEFAULT_MAX_TOKENS = 2048
MAX_STOPS = 4
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. The order of sampling is temperature, repetition penalty, top-k, top-p, min-p, draw.

    Attributes:
        max_tokens: tokens to generate at most, >= 1. None: `DEFAULT_MAX_TOKENS`, or what the context and the KV cache
            leave if that is less. A number given is kept or refused, never shortened.
        temperature: 0.0-2.0; 0 is greedy (the lowest id on a tie).
        top_p: 0.0-1.0; 1 is off.
        top_k: 0 to the vocabulary size; 0 is off.
        min_p: 0.0-1.0; 0 is off.
        repetition_penalty: above 0.0, to 2.0; 1 is off; over the generated tokens.
        stop: up to 4 strings, none empty, each at most 32 tokens. The text ends before the first of them. One string
            may be given as it is.
        seed: 0 to 2^64-1. None: made up for the call and reported in the result. All prompts of one call that share
            one `SamplingParams` get the same seed, so each gets what it would get alone.
        ignore_eos: go on past the model's end-of-text tokens, to `max_tokens` or a stop string.
        logprobs: 0-20: with each token the log-probability of it and of so many most likely ones, from the raw
            logits. None: off.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Take `stop` as one string or any list of strings."""
        stop = self.stop
        if stop is None:
            stop = ()
        elif isinstance(stop, str):
            stop = (stop,)
        elif isinstance(stop, Iterable):
            stop = tuple(stop)
        object.__setattr__(self, "stop", stop)

    def check(self, n_vocab: int | None = None, max_tokens_out: int | None = None) -> None:
        """Check every field.

        Args:
            n_vocab: the model's vocabulary size, the limit of `top_k`; None leaves it open.
            max_tokens_out: the limit of `max_tokens`; None leaves it open.

        Raises:
            InvalidRequest: naming the field.
        """
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, max_tokens_out)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _whole("top_k", self.top_k, 0, n_vocab)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 2.0)
        if self.repetition_penalty == 0:
            raise InvalidRequest("repetition_penalty must be above 0", field="repetition_penalty")
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos must be true or false, not {_shown(self.ignore_eos)}", field="ignore_eos")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stop()

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) for s in self.stop):
            raise InvalidRequest("stop must be a list of strings", field="stop")
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(f"stop holds {len(self.stop)} strings; at most {MAX_STOPS} are taken", field="stop")
        if not all(self.stop):
            raise InvalidRequest("stop holds an empty string", field="stop")

    def slot_sampling(self, seed: int) -> SlotSampling:
        """The numbers an engine needs, with `seed` in the place of this object's."""
        return SlotSampling(
            temperature=float(self.temperature),
            top_k=self.top_k,
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            seed=seed,
        )


def make_seed() -> int:
    """A seed nobody chose, 0 to 2^64-1."""
    return secrets.randbits(64)


def _number(field: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidRequest(f"{field} must be a number, not {_shown(value)}", field=field)
    if not low <= value <= high:
        raise InvalidRequest(f"{field} must be {low} to {high}, not {_shown(value)}", field=field)


def _whole(field: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{field} must be a whole number, not {_shown(value)}", field=field)
    if value < low or (high is not None and value > high):
        limits = f"{low} to {high}" if high is not None else f"at least {low}"
        raise InvalidRequest(f"{field} must be {limits}, not {_shown(value)}", field=field)


def _shown(value: object) -> str:
    # an int of thousands of digits has no repr (ValueError), and a message stays one readable line
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
