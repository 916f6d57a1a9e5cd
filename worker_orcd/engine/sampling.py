"""SamplingParams: what a user may ask of one generation, and the rule of each field.

Each field carries its `Rule`: its range, whether a request over HTTP may name it, and the flag by which `generate`
takes it. The HTTP body, the flags and the checks are made from these: docs/adding-to-the-api.md says what else a new
field needs.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from worker_orcd.config import DEFAULT_MAX_TOKENS, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, MAX_STOPS
from worker_orcd.errors import InvalidRequest


@dataclass(frozen=True)
class Rule:
    """What a field may be, and where else it is named.

    Attributes:
        kind: int, float, bool, list for a list of strings, tuple for one of token ids, dict for numbers of token ids.
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


#: what most values are: looked at first, since every request has sixteen
_PLAIN = frozenset((type(None), bool, int, float, str, tuple))
#: the types of values that a field of a kind takes as they are
_FITTING = {int: _PLAIN, float: _PLAIN, bool: _PLAIN, dict: frozenset((type(None),)), list: (), tuple: ()}


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
    """How one prompt is continued.

    The order of sampling is logit bias and bans, temperature, repetition penalty, frequency and presence penalty,
    top-k, top-p, min-p, draw. Numbers of NumPy are taken as Python's.

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
        presence_penalty: -2.0 to 2.0, taken off the logit of every token that was generated; 0 is off.
        frequency_penalty: -2.0 to 2.0, taken off the logit of a token for each time that it was generated; 0 is off.
        logit_bias: {token id: -100.0 to 100.0}, up to 1,024, added to the logits before all else. Ids may be decimal
            strings, as in JSON. None: none.
        min_tokens: tokens to generate at least: before them no token is drawn that would end the text, and no stop
            string counts.
        stop_token_ids: up to 128 token ids that end the text as the model's end-of-text tokens do, with `ignore_eos`
            too.
        bad_words: texts that are not generated: the last token of each, encoded with and without a leading space, is
            banned where the tokens before it were generated just now. Up to 32 tokens each and 1,024 together. One
            string may be given as it is.
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
    presence_penalty: float = field(
        default=0.0, metadata=_rule(float, -2.0, 2.0, drawn=True, flag="-2 to 2; 0 is off.", metavar="P")
    )
    frequency_penalty: float = field(
        default=0.0, metadata=_rule(float, -2.0, 2.0, drawn=True, flag="-2 to 2; 0 is off.", metavar="P")
    )
    # a mapping has no hash; params that differ in it alone may share one
    logit_bias: Mapping[int, float] | None = field(
        default=None,
        hash=False,
        metadata=_rule(dict, -100.0, 100.0, flag="Add B to the logit of a token; may be given again.", metavar="ID=B"),
    )
    min_tokens: int = field(
        default=0, metadata=_rule(int, 0, 1 << 40, flag="Tokens before which nothing ends the text.", metavar="N")
    )
    stop_token_ids: tuple[int, ...] = field(
        default=(), metadata=_rule(tuple, flag="Tokens that end the text like the model's own.", metavar="1,2,3")
    )
    bad_words: tuple[str, ...] = field(
        default=(), metadata=_rule(list, flag="Text not to generate; may be given again.", metavar="TEXT")
    )

    def __post_init__(self) -> None:
        """Take strings as one or any list of them, ids of a bias as text too, and numbers of NumPy as plain ones."""
        for name, rule in RULES.items():
            value = getattr(self, name)
            if type(value) in _FITTING[rule.kind] or (type(value) is tuple and not value):
                continue
            if rule.kind in (list, tuple):
                plain = _as_tuple(value, rule.kind)
            elif rule.kind is dict:
                plain = _as_bias(value)
            else:
                plain = plain_number(value)
            if plain is not value:
                object.__setattr__(self, name, plain)

    def check(self, n_vocab: int | None = None, max_tokens_out: int | None = None) -> None:
        """Check every field.

        Args:
            n_vocab: the model's vocabulary size, the limit of `top_k` and of token ids; None leaves it open.
            max_tokens_out: the limit of `max_tokens`; None: 2^40, past every context.

        Raises:
            InvalidRequest: naming the field.
        """
        known = {"max_tokens": max_tokens_out, "top_k": n_vocab}
        limits = {name: limit for name, limit in known.items() if limit is not None}
        for name, rule in RULES.items():
            value = getattr(self, name)
            if rule.kind is list:
                _check_strings(name, value)
            elif rule.kind not in (tuple, dict) and not (value is None and name in _OPEN):
                rule.check(name, value, limits.get(name, rule.most))
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequest(f"stop holds {len(self.stop)} strings; at most {MAX_STOPS} are taken", field="stop")
        self._check_ids(n_vocab)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}", field="min_tokens"
            )

    def _check_ids(self, n_vocab: int | None) -> None:
        ids, bias, most = self.stop_token_ids, self.logit_bias, (n_vocab or 1 << 31) - 1
        if not isinstance(ids, tuple):
            raise InvalidRequest("stop_token_ids must be a list of token ids", field="stop_token_ids")
        if not isinstance(bias, Mapping | None):
            raise InvalidRequest(f"logit_bias must map token ids to numbers, not {_shown(bias)}", field="logit_bias")
        bias = bias or {}
        for name, given, limit in (("stop_token_ids", ids, MAX_STOP_TOKEN_IDS), ("logit_bias", bias, MAX_LOGIT_BIAS)):
            if len(given) > limit:
                raise InvalidRequest(f"{name} holds {len(given)} token ids; at most {limit} are taken", field=name)
            for i in given:
                if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= most:
                    raise InvalidRequest(f"{name} holds {_shown(i)}; token ids are 0 to {most}", field=name)
        for value in bias.values():
            RULES["logit_bias"].check("logit_bias", value, RULES["logit_bias"].most)

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
#: the fields that may be left open
_OPEN = frozenset(f.name for f in dataclasses.fields(SamplingParams) if f.default is None)


def make_seed() -> int:
    """A seed nobody chose, 0 to 2^53-1: a client whose numbers are doubles (JavaScript) can send it back as it was."""
    return secrets.randbits(53)


def _as_tuple(value: Any, kind: type) -> Any:
    """A list as a tuple, of one string where strings are wanted and one is given; what is no list as it is."""
    value = plain_number(value)
    if value is None:
        return ()
    if kind is list and isinstance(value, str):
        return (value,)
    if kind is tuple and isinstance(value, str | bytes | bytearray | Mapping):
        return value
    return tuple(map(plain_number, value)) if isinstance(value, Iterable) else value


def _as_bias(value: Any) -> Any:
    """A mapping as a dict whose keys are plain numbers; as it is where two keys would become one."""
    if not isinstance(value, Mapping):
        return value
    bias = {
        int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,10}", key) else plain_number(key): plain_number(of)
        for key, of in value.items()
    }
    return bias if len(bias) == len(value) else value


def _check_strings(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(s, str) for s in value):
        raise InvalidRequest(f"{name} must be a list of strings", field=name)
    if not all(value):
        raise InvalidRequest(f"{name} holds an empty string", field=name)


def _shown(value: object) -> str:
    # an int of thousands of digits has no repr (ValueError), and a message stays one readable line
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
