"""prepare: the one way from what somebody asks to what the scheduler takes - for Python, the command line and HTTP.

A caller puts a `Request` together and checks nothing but its shape. `prepare` checks the rest once, in one order, and
fills in what was left open: the seed and the number of tokens. `Limits` says what a caller allows beyond what the model
can do; a worker that serves strangers allows less than a program that has the model to itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from worker_orcd.config import (
    DEFAULT_MAX_TOKENS,
    MAX_JOB_ID_CHARS,
    MAX_LOGPROBS,
)
from worker_orcd.engine.sampling import RULES, SamplingParams, make_seed, plain_number
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.text_bounds import bad_word_ids, check_bans, check_stops

if TYPE_CHECKING:
    from worker_orcd.tokenizer.tokenizer import Tokenizer

__all__ = [
    "HTTP_FIELDS",
    "RULES",
    "Limits",
    "Messages",
    "ModelParts",
    "Prepared",
    "Prompt",
    "Request",
    "SamplingParams",
    "check_job_id",
    "check_seconds",
    "check_token_ids",
    "make_seed",
    "prepare",
    "prompt_ids",
    "requests_of",
]

#: the sampling fields that a body of POST /execute may hold, each with its kind: int, float or list (of strings)
HTTP_FIELDS: dict[str, type] = {name: rule.kind for name, rule in RULES.items() if rule.http}

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """What somebody asks of a model, not checked yet.

    Attributes:
        prompt: text or token ids; None where there are `messages`.
        messages: a conversation, for the chat template of the file: dicts with "role" and "content".
        params: how it is continued.
        job_id: the caller's name of the job; None: one is made up.
        deadline: `time.monotonic()` at which the job ends with `InferenceTimeout`; None: never.
        special: take the text of control tokens in `prompt` for the tokens.
        add_bos: begin a prompt that is text with BOS; None: as the tokenizer's file says.
        chat: how the chat template is applied: arguments of `Tokenizer.apply_chat`.
        score: generate nothing, and score the tokens of the prompt, with so many of the most likely ones beside each:
            the job is a `serving.score_job.ScoreJob`.
    """

    prompt: Prompt | None = None
    messages: Messages | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    job_id: str | None = None
    deadline: float | None = None
    special: bool = False
    add_bos: bool | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)
    score: int | None = None


@dataclass(frozen=True)
class Limits:
    """What a caller allows beyond what the model can do. None: no limit.

    Attributes:
        max_prompt_chars: characters of a prompt that is text.
        max_tokens_in: tokens of a prompt.
        max_tokens_out: the limit of `max_tokens`.
        default_tokens: the most that a request gets which names no `max_tokens`.
        max_stop_chars: characters of a stop string, in the place of its tokens.
        plain_text: refuse NUL in prompts and stop strings, and control characters in job ids.
        without_tokenizer: what is said of a prompt that is text where the model has no tokenizer.
    """

    max_prompt_chars: int | None = None
    max_tokens_in: int | None = None
    max_tokens_out: int | None = None
    default_tokens: int = DEFAULT_MAX_TOKENS
    max_stop_chars: int | None = None
    plain_text: bool = False
    without_tokenizer: str = "the model file has no tokenizer; give the prompt as token ids"


class Capacity(Protocol):
    """What is asked of a scheduler: what may ever run."""

    def check(self, n_prompt: int, max_tokens: int) -> None:
        """Raise `InvalidRequest` or `VramOom` where a sequence of these sizes can never run."""

    def room_for(self, n_prompt: int) -> int:
        """The most tokens that a prompt of `n_prompt` tokens can be continued by; may be below 1."""


@dataclass(frozen=True)
class ModelParts:
    """Those parts of a loaded model that a request is checked against."""

    tokenizer: Tokenizer | None
    n_vocab: int
    capacity: Capacity


@dataclass(frozen=True)
class Prepared:
    """A request that can run.

    Attributes:
        token_ids: int32 [n_prompt], ids of the vocabulary, at least one.
        params: checked; `max_tokens` and `seed` are those in use, and `stop_token_ids` none that end the text anyway.
        seed, max_tokens: the same two, which are never None here.
        job_id, deadline, score: as asked.
        bad_words: the tokens of `params.bad_words`, of each with and without a leading space.
    """

    token_ids: npt.NDArray[np.int32]
    params: SamplingParams
    seed: int
    max_tokens: int
    job_id: str | None
    deadline: float | None
    bad_words: tuple[tuple[int, ...], ...] = ()
    score: int | None = None


_NO_LIMITS = Limits()
#: token ids that are looked at in one go
_PART = 1 << 14


def prepare(model: ModelParts, request: Request, limits: Limits = _NO_LIMITS) -> Prepared:
    """Check a request and fill in what it leaves open.

    Raises:
        InvalidRequest: a field breaks its rule, which it names; or prompt and `max_tokens` go past the context.
        VramOom: they can never fit the KV cache.
    """
    job_id, deadline = request.job_id, request.deadline
    if job_id is not None:
        check_job_id(job_id, limits.plain_text)
        job_id = str.__str__(job_id)  # of a subclass the text alone
    if deadline is not None:
        deadline = check_seconds("deadline", deadline)
    if not isinstance(plain_number(request.special), bool):
        raise InvalidRequest(f"special must be true or false, not {type(request.special).__name__}", field="special")
    if not isinstance(request.params, SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams, not {type(request.params).__name__}", field="params")
    # what other threads will use is this copy: of no subclass, and nobody else can set anything in it
    params = SamplingParams(**{name: getattr(request.params, name) for name in RULES})
    if request.prompt is not None and request.messages is not None:
        raise InvalidRequest("a request has a prompt or messages, not both", field="messages")
    _check_text(request, limits)
    if request.score is not None:
        RULES["logprobs"].check("score", request.score, MAX_LOGPROBS)
    params.check(model.n_vocab, limits.max_tokens_out)
    if limits.plain_text and any("\0" in s for s in params.stop):
        raise InvalidRequest("stop holds a NUL character", field="stop")
    if limits.plain_text and any("\0" in s for s in params.bad_words):
        raise InvalidRequest("bad_words holds a NUL character", field="bad_words")
    plain = _plain(params)
    ids = _prompt_ids(model, request, limits)
    n_prompt = len(ids)
    check_stops(plain["stop"], model.tokenizer, limits.max_stop_chars)
    bad_words = bad_word_ids(plain["bad_words"], model.tokenizer, model.n_vocab)
    if bad_words or plain["min_tokens"] or plain["stop_token_ids"]:
        stop_ids = model.tokenizer.stop_ids if model.tokenizer is not None and not plain["ignore_eos"] else ()
        plain["stop_token_ids"] = tuple(i for i in dict.fromkeys(plain["stop_token_ids"]) if i not in stop_ids)
        check_bans(plain, bad_words, stop_ids, model.n_vocab)
    max_tokens = plain["max_tokens"]
    if max_tokens is None:
        known = (limits.default_tokens, limits.max_tokens_out, model.capacity.room_for(n_prompt))
        max_tokens = max(1, min(n for n in known if n is not None))
    if plain["min_tokens"] > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {plain['min_tokens']}; the prompt leaves room for {max_tokens}", field="min_tokens"
        )
    model.capacity.check(n_prompt, max_tokens if request.score is None else 0)
    seed = plain["seed"] if plain["seed"] is not None else make_seed()
    in_use = SamplingParams(**{**plain, "max_tokens": max_tokens, "seed": seed})
    return Prepared(ids, in_use, seed, max_tokens, job_id, deadline, bad_words, request.score)


def prompt_ids(model: ModelParts, request: Request, limits: Limits = _NO_LIMITS) -> npt.NDArray[np.int32]:
    """The tokens of a request's prompt or messages, int32 [n_prompt]; `prepare` takes them as a prompt too.

    Raises:
        InvalidRequest: as `prepare`, of what is wrong with these alone.
    """
    _check_text(request, limits)
    return _prompt_ids(model, request, limits)


def requests_of(
    prompts: Prompt | Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams] | None
) -> list[Request]:
    """A request for each of `prompts`, with `params` for all or for each; None: the defaults.

    Raises:
        InvalidRequest: these are no prompts, none at all, or token ids of one prompt; or not as many params.
    """
    asked: list[Any] = (
        [prompts] if isinstance(prompts, str) else _listed("prompts", prompts, "text or a list of prompts")
    )
    if not asked:
        raise InvalidRequest("prompts is empty", field="prompts")
    if all(isinstance(p, int | np.integer) for p in asked):
        raise InvalidRequest(
            "prompts is a list of numbers; a prompt of token ids goes in a list of prompts: [[1, 2, 3]]",
            field="prompts",
        )
    params = SamplingParams() if params is None else params
    if isinstance(params, SamplingParams):
        # one seed for all, so that each prompt gets what it would get alone with the seed that is reported
        seed = params.seed if params.seed is not None else make_seed()
        every = [replace(params, seed=seed)] * len(asked)
    else:
        every = _listed("params", params, "SamplingParams or a list of them")
    if len(every) != len(asked):
        raise InvalidRequest(f"{len(asked)} prompts, but {len(every)} params", field="params")
    return [Request(prompt=p, params=q) for p, q in zip(asked, every, strict=True)]


def _listed(name: str, values: Any, what: str) -> list[Any]:
    try:
        if isinstance(values, str | bytes | bytearray | Mapping | Set):  # no list, or one without an order
            raise TypeError
        each = iter(values)
    except TypeError:
        raise InvalidRequest(f"{name} must be {what}, not {type(values).__name__}", field=name) from None
    return list(each)


def check_job_id(job_id: str, plain_text: bool = False) -> None:
    """Raise `InvalidRequest` for a job id that is no text, empty or too long, or, as asked, not plain text."""
    if not isinstance(job_id, str):
        raise InvalidRequest(f"job_id must be a string of 1 to {MAX_JOB_ID_CHARS} characters", field="job_id")
    if not 1 <= len(job_id) <= MAX_JOB_ID_CHARS:
        raise InvalidRequest(f"job_id must have 1 to {MAX_JOB_ID_CHARS} characters, not {len(job_id)}", field="job_id")
    if plain_text and any(ord(c) < 32 or ord(c) == 127 for c in job_id):
        raise InvalidRequest("job_id holds a control character", field="job_id")


def check_seconds(name: str, value: object) -> float:
    """A time or a duration as a float; infinity is one.

    Raises:
        InvalidRequest: it is no number.
    """
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf if value > 0 else -math.inf
        if seconds == seconds:
            return seconds
    raise InvalidRequest(f"{name} must be a number of seconds, not {type(value).__name__}", field=name)


def check_token_ids(ids: Iterable[int], n_vocab: int, name: str) -> npt.NDArray[np.int32]:
    """Token ids as int32 [n].

    Raises:
        InvalidRequest: there is none, or one is no whole number or not of the vocabulary; says `name`.
    """
    try:
        if isinstance(ids, bytes | bytearray):
            raise TypeError
        if isinstance(ids, np.ndarray) and ids.dtype == np.int32 and ids.ndim == 1 and len(ids):
            if ids.min() >= 0 and ids.max() < n_vocab:
                return np.array(ids, np.int32)
        if not isinstance(ids, list):
            ids = list(ids)
        plain = _plain_ids(ids, n_vocab)
        if plain is not None:
            return plain
        numbers = [operator.index(i) for i in ids]
    except TypeError:
        raise InvalidRequest(f"{name} must be a list of token ids (or, for a prompt, text)", field=name) from None
    if any(isinstance(i, bool) for i in ids):
        raise InvalidRequest(f"{name} holds true or false, which is no token id", field=name)
    if not numbers:
        raise InvalidRequest(f"{name} holds no token", field=name)
    if min(numbers) < 0 or max(numbers) >= n_vocab:
        bad = next(i for i, n in enumerate(numbers) if not 0 <= n < n_vocab)
        raise InvalidRequest(f"{name}[{bad}] is no token id; ids are 0 to {n_vocab - 1}", field=name)
    return np.array(numbers, np.int32)


def _plain_ids(ids: list[int], n_vocab: int) -> npt.NDArray[np.int32] | None:
    """A list of nothing but plain numbers, all of them ids, as int32 [n]; None: it is something else, or empty.

    In parts, between which other threads get their turn.
    """
    taken = np.empty(len(ids), np.int32)
    for first in range(0, len(ids), _PART):
        part = ids[first : first + _PART]
        if set(map(type, part)) != {int} or min(part) < 0 or max(part) >= n_vocab:
            return None
        taken[first : first + len(part)] = part
    return taken if len(taken) else None


def _check_text(request: Request, limits: Limits) -> None:
    prompt, most = request.prompt, limits.max_prompt_chars
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("prompt must not be empty", field="prompt")
        if most is not None and len(prompt) > most:
            raise InvalidRequest(f"prompt has {len(prompt)} characters; at most {most} are taken", field="prompt")
        if limits.plain_text and "\0" in prompt:
            raise InvalidRequest("prompt holds a NUL character", field="prompt")


def _plain(params: SamplingParams) -> dict[str, Any]:
    """The fields of checked params, with plain numbers and strings in place of numpy's and of subclasses'."""
    plain: dict[str, Any] = {}
    for name, rule in RULES.items():
        value = getattr(params, name)
        if rule.kind is list:
            value = tuple(str.__str__(s) for s in value)
        elif rule.kind is tuple:
            value = tuple(int(i) for i in value)
        elif rule.kind is dict:
            value = {int(i): float(bias) for i, bias in value.items()} if value else None
        elif value is not None:
            value = rule.kind(value)
        plain[name] = value
    return plain


def _prompt_ids(model: ModelParts, request: Request, limits: Limits) -> npt.NDArray[np.int32]:
    prompt: Any = request.prompt
    if request.messages is not None:
        if model.tokenizer is None:
            raise InvalidRequest("the model file has no tokenizer, so it cannot chat", field="messages")
        prompt = model.tokenizer.apply_chat(request.messages, **request.chat)
    elif isinstance(prompt, str):
        if model.tokenizer is None:
            raise InvalidRequest(limits.without_tokenizer, field="prompt")
        prompt = model.tokenizer.encode(prompt, special=request.special, add_bos=request.add_bos)
    ids = check_token_ids(prompt, model.n_vocab, "prompt")
    if limits.max_tokens_in is not None and len(ids) > limits.max_tokens_in:
        raise InvalidRequest(f"prompt has {len(ids)} tokens; at most {limits.max_tokens_in} are taken", field="prompt")
    return ids
