"""SamplingParams: what a user may ask of one generation, and the rule of each field.

Each field carries its `Rule`: its range, whether a request over HTTP may name it, and the flag by which `generate`
takes it. The HTTP body, the flags and the checks are made from these: docs/adding-to-the-api.md says what else a new
field needs.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from worker_orcd.config import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, MAX_STOPS
from worker_orcd.errors import InvalidRequest


@dataclass(frozen=True)
class Rule:
    """What a field may be, and where else it is named.

    Attributes:
        kind: int, float, bool, or list for a list of strings.
        least, most: the ends of the range, both in it; None: open. The caller of `check` may know a smaller end.
        above: `least` itself is not in the range.
        drawn: engines draw by it: it is a field of `SlotSampling` in csrc/params/sampling.h, under the same name.
        http: the body of POST /execute may hold it, under the same name.
        flag: help text of its flag of `worker-orcd generate`; "": it has none.
        metavar: what stands for a value in that help.
    """

    kind: type
    least: float | None = None
    most: float | None = None
    above: bool = False
    drawn: bool = False
    http: bool = False
    flag: str = ""
    metavar: str = ""

    def check(self, name: str, value: object, most: float | None) -> None:
        """Raise `InvalidRequest` where `value` is of another kind or outside `least` to `most`."""
        if self.kind is bool:
            if not isinstance(value, bool):
                raise InvalidRequest(f"{name} must be true or false, not {_shown(value)}", field=name)
            return
        noun, kinds = ("a whole number", int) if self.kind is int else ("a number", int | float)
        if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
            raise InvalidRequest(f"{name} must be {noun}, not {_shown(value)}", field=name)
        if (self.least is not None and value < self.least) or (most is not None and value > most):
            limits = f"{self.least} to {most}" if most is not None else f"at least {self.least}"
            raise InvalidRequest(f"{name} must be {limits}, not {_shown(value)}", field=name)
        if self.above and value == self.least:
            raise InvalidRequest(f"{name} must be above {self.least:g}", field=name)


#: what most values are: looked at first, since every request has ten
_PLAIN = frozenset((type(None), bool, int, float, str, tuple))


def plain_number(value: Any) -> Any:
    """A number of NumPy (a scalar, or an array of no dimensions) as Python's own, for JSON too; else `value` itself."""
    if type(value) in _PLAIN or getattr(value, "shape", None) != () or not callable(getattr(value, "item", None)):
        return value
    number = value.item()
    # a long double has no number of Python that is as exact
    return float(number) if isinstance(number, Real) and not isinstance(number, int | float) else number


def _rule(kind: type, *args: Any, **settings: Any) -> dict[str, Rule]:
    return {"rule": Rule(kind, *args, **settings)}


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. The order of sampling is temperature, repetition penalty, top-k, top-p, min-p, draw.

    Numbers of NumPy are taken as Python's.

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
        seed: 0 to 2^64-1. None: made up for the call (`make_seed`) and reported in the result. All prompts of one call
            that share one `SamplingParams` get the same seed, so each gets what it would get alone.
        ignore_eos: go on past the model's end-of-text tokens, to `max_tokens` or a stop string.
        logprobs: 0-20: with each token the log-probability of it and of so many most likely ones, from the raw
            logits. None: off.
    """

    max_tokens: int | None = field(
        default=None,
        metadata=_rule(
            int,
            1,
            1 << 40,
            http=True,
            flag=f"Tokens to generate. Default: {DEFAULT_MAX_TOKENS}, or what the context leaves.",
            metavar="N",
        ),
    )
    temperature: float = field(
        default=1.0, metadata=_rule(float, 0.0, 2.0, drawn=True, http=True, flag="0 to 2; 0 is greedy.", metavar="T")
    )
    top_p: float = field(
        default=1.0, metadata=_rule(float, 0.0, 1.0, drawn=True, http=True, flag="0 to 1; 1 is off.", metavar="P")
    )
    top_k: int = field(
        default=0, metadata=_rule(int, 0, 2**31 - 1, drawn=True, http=True, flag="0 is off.", metavar="K")
    )
    min_p: float = field(
        default=0.0, metadata=_rule(float, 0.0, 1.0, drawn=True, http=True, flag="0 to 1; 0 is off.", metavar="P")
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata=_rule(
            float, 0.0, 2.0, above=True, drawn=True, http=True, flag="Above 0, to 2; 1 is off.", metavar="R"
        ),
    )
    stop: tuple[str, ...] = field(
        default=(),
        metadata=_rule(list, http=True, flag="End before this text; may be given up to four times.", metavar="TEXT"),
    )
    seed: int | None = field(
        default=None,
        metadata=_rule(
            int,
            0,
            2**64 - 1,
            drawn=True,
            http=True,
            flag="0 to 2^64-1. Default: made up, below 2^53; --json tells it.",
            metavar="N",
        ),
    )
    ignore_eos: bool = field(default=False, metadata=_rule(bool))
    logprobs: int | None = field(default=None, metadata=_rule(int, 0, MAX_LOGPROBS))

    def __post_init__(self) -> None:
        """Take `stop` as one string or any list of strings, and numbers of NumPy as plain ones."""
        for name in RULES:
            value = getattr(self, name)
            if (plain := plain_number(value)) is not value:
                object.__setattr__(self, name, plain)
        stop: object = self.stop
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
            max_tokens_out: the limit of `max_tokens`; None: 2^40, past every context.

        Raises:
            InvalidRequest: naming the field.
        """
        known = {"max_tokens": max_tokens_out, "top_k": n_vocab}
        limits = {name: limit for name, limit in known.items() if limit is not None}
        for f in dataclasses.fields(self):
            rule, value = RULES[f.name], getattr(self, f.name)
            if rule.kind is not list and not (value is None and f.default is None):
                rule.check(f.name, value, limits.get(f.name, rule.most))
        self._check_stop()

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) for s in self.stop):
            raise InvalidRequest("stop must be a list of strings", field="stop")
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(f"stop holds {len(self.stop)} strings; at most {MAX_STOPS} are taken", field="stop")
        if not all(self.stop):
            raise InvalidRequest("stop holds an empty string", field="stop")

    def numbers(self) -> dict[str, float]:
        """What an engine draws by: the fields of `SlotSampling` in csrc/params/sampling.h.

        Raises:
            InvalidRequest: one is outside its range, or the seed is not chosen yet; names the field.
        """
        drawn = {name: getattr(self, name) for name, rule in RULES.items() if rule.drawn}
        for name, value in drawn.items():
            RULES[name].check(name, value, RULES[name].most)
        return drawn


#: the rule of each field, by name, in the order of the fields
RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in dataclasses.fields(SamplingParams)}


def make_seed() -> int:
    """A seed nobody chose, 0 to 2^53-1: a client whose numbers are doubles (JavaScript) can send it back as it was."""
    return secrets.randbits(53)


def _shown(value: object) -> str:
    # an int of thousands of digits has no repr (ValueError), and a message stays one readable line
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
