"""What a completion's body asks for, as the runtime takes it: sampling parameters, limits, numbers of choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from worker_orcd.config import MAX_STOP_CHARS, ServeConfig
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.request import RULES, Limits, SamplingParams, make_seed
from worker_orcd.wsgi.native.requests import whole
from worker_orcd.wsgi.openai.ids import MAX_CHOICES
from worker_orcd.wsgi.openai.types import SamplingFields

if TYPE_CHECKING:
    from worker_orcd.runtime.llm import LLM

#: sampling fields that are taken under their own names
_NAMES = tuple(
    name for name in RULES if name in SamplingFields.__struct_fields__ and name not in ("max_tokens", "seed")
)
#: log-probabilities that one answer may hold: each takes about 100 bytes until it is sent
MAX_LOGPROBS_IN_ALL = 1 << 20
_SEEDS = 1 << 64


class ContextExceeded(InvalidRequest):
    """Prompt and answer do not fit the context; clients know this error by its code."""

    openai_code = "context_length_exceeded"


def limits_of(config: ServeConfig) -> Limits:
    """What a worker allows on these routes. The prompt's characters are bounded by the body's bytes."""
    return Limits(
        max_tokens_in=config.max_tokens_in,
        max_tokens_out=config.max_tokens_out,
        default_tokens=config.max_tokens_out,
        max_stop_chars=MAX_STOP_CHARS,
        plain_text=True,
        without_tokenizer="the model has no tokenizer; the worker can be given one with --tokenizer",
    )


def optional_whole(name: str, value: int | float | None) -> int | None:
    """A JSON number as the integer that it is; see `whole`."""
    return None if value is None else whole(name, value)


def whole_numbers(name: str, values: Iterable[int | float]) -> list[int]:
    """JSON numbers as integers; see `whole`."""
    return [whole(name, value) for value in values]


def max_tokens_of(
    body: SamplingFields, config: ServeConfig, names: Sequence[str], least: int
) -> tuple[str, int | None]:
    """The name and the value of the first of several fields that is given: tokens to generate at most.

    Args:
        names: of the fields, the first before the others.
        least: of their range.

    Raises:
        InvalidRequest: one of them is out of range, whether it counts or not.
    """
    given = {name: optional_whole(name, getattr(body, name)) for name in names}
    for name, value in given.items():
        if value is not None and not least <= value <= config.max_tokens_out:
            raise InvalidRequest(f"{name} must be {least} to {config.max_tokens_out}, not {_shown(value)}", field=name)
    return next((item for item in given.items() if item[1] is not None), (names[-1], None))


def sampling_params(
    body: SamplingFields, llm: LLM, max_tokens_out: int, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """How every choice is sampled; the first one's seed is set.

    Where the body is silent, the model file's own settings count, and after them OpenAI's.

    Raises:
        InvalidRequest: naming the field; values are checked later.
    """
    given: dict[str, Any] = dict(llm.sampling_defaults)
    for name in _NAMES:
        value = getattr(body, name)
        if value is not None:
            given[name] = whole(name, value) if RULES[name].kind is int else value
    if "stop_token_ids" in given:
        given["stop_token_ids"] = whole_numbers("stop_token_ids", given["stop_token_ids"])
    if "min_tokens" in given:
        given["min_tokens"] = _min_tokens(given["min_tokens"], max_tokens, max_tokens_out)
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if "logit_bias" in given:
        given["logit_bias"] = {_token_id(key): value for key, value in given["logit_bias"].items()}
    return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, seed=first_seed(body))


def first_seed(body: SamplingFields) -> int:
    """The seed of the first choice, made up where none is given.

    Raises:
        InvalidRequest: it has more than 64 bits.
    """
    seed = optional_whole("seed", body.seed)
    if seed is None:
        return make_seed()
    if not -_SEEDS // 2 <= seed < _SEEDS:
        raise InvalidRequest("seed must be an integer of 64 bits, -2^63 to 2^64-1", field="seed")
    return seed % _SEEDS


def choices_of(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The parameters of `n` choices: number i draws with seed + i, modulo 2^64."""
    seed = params.seed or 0
    return [replace(params, seed=(seed + i) % _SEEDS) for i in range(n)]


def number_of_choices(body: SamplingFields, n_prompts: int, jobs_per_prompt: int, config: ServeConfig) -> int:
    """`n`, which together with the number of prompts must be what can ever run.

    Args:
        n_prompts: prompts of the request.
        jobs_per_prompt: jobs of each prompt beside its choices.

    Raises:
        InvalidRequest: it is out of range.
    """
    n = optional_whole("n", body.n)
    n = 1 if n is None else n
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidRequest(f"n must be 1 to {MAX_CHOICES}", field="n")
    name = "n" if n > 1 or n_prompts == 1 else "prompt"
    if n * n_prompts > MAX_CHOICES:
        raise InvalidRequest(f"{n} x {n_prompts} choices; at most {MAX_CHOICES} are made at once", field=name)
    n_jobs = (n + jobs_per_prompt) * n_prompts
    if n_jobs > config.max_streams:
        reason = f"{n_jobs} jobs; at most {config.max_streams} run and wait here"
        raise InvalidRequest(f"{n} x {n_prompts} choices need {reason}", field=name)
    return n


def check_context(llm: LLM, n_prompt: int, max_tokens: int | None, names: tuple[str, str]) -> None:
    """Raise `ContextExceeded` where a prompt, or a prompt and what is asked for, is longer than the context.

    Args:
        n_prompt: tokens of the prompt.
        max_tokens: None: at least one.
        names: of the fields that are too large: the prompt's and the other.
    """
    context, wanted = llm.info.context_length, 1 if max_tokens is None else max_tokens
    if n_prompt + wanted > context:
        name = names[0] if n_prompt + min(wanted, 1) > context else names[1]
        raise ContextExceeded(
            f"This model's maximum context length is {context} tokens. However, {n_prompt + wanted} tokens are needed "
            f"({n_prompt} in the prompt, {wanted} in the completion).",
            field=name,
        )


def check_logprobs(n_tokens: int, n_top: int) -> None:
    """Raise `InvalidRequest` where one answer would hold too many log-probabilities."""
    n_all = n_tokens * (n_top + 1)
    if n_all > MAX_LOGPROBS_IN_ALL:
        reason = f"{n_all} log-probabilities; an answer has at most {MAX_LOGPROBS_IN_ALL}"
        raise InvalidRequest(f"logprobs: {n_tokens} tokens may have {reason}", field="logprobs")


def _shown(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"


def _min_tokens(least: int, max_tokens: int | None, max_tokens_out: int) -> int:
    if not 0 <= least <= max_tokens_out:
        raise InvalidRequest(f"min_tokens must be 0 to {max_tokens_out}, not {_shown(least)}", field="min_tokens")
    return least if max_tokens is None else min(least, max_tokens)


def _token_id(key: str) -> int:
    # as JSON has no other keys than strings
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
        raise InvalidRequest("logit_bias must have token ids as its keys", field="logit_bias")
    return int(key)
