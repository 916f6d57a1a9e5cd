"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import falcon

from worker_orcd.config import MAX_LOGPROBS
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.request import Request, SamplingParams
from worker_orcd.serving.job import Completion, Job
from worker_orcd.wsgi.openai import asked
from worker_orcd.wsgi.openai.answers import CompletionAnswer, CompletionChoice, CompletionLogprobs
from worker_orcd.wsgi.openai.asked import whole_numbers
from worker_orcd.wsgi.openai.bodies import Bodies
from worker_orcd.wsgi.openai.fields import check_refused
from worker_orcd.wsgi.openai.formats import CompletionChunks, Wanted, silent_stream
from worker_orcd.wsgi.openai.generation import Generation, answer
from worker_orcd.wsgi.openai.heads import cached_tokens, usage
from worker_orcd.wsgi.openai.ids import COMPLETION, job_ids
from worker_orcd.wsgi.openai.logprobs import Likely, Offsets, add_end, completion_logprobs
from worker_orcd.wsgi.openai.types import CompletionBody, CompletionFields
from worker_orcd.wsgi.service import Service


@dataclass
class Asked:
    """A checked body.

    Attributes:
        prompts: their ids, int32 [n_prompt] each.
        echoes: the text of each prompt, where it is shown; else empty.
        n_begin: tokens before each text that are no part of it.
        n: choices of a prompt.
        params: of each choice of a prompt.
        generates: whether there is anything to generate, and not only an echo.
        n_top: most likely tokens of each place; None: no log-probabilities.
        echo: whether prompts are shown.
        token_ids: whether ids are shown.
    """

    prompts: list[Any]
    echoes: list[str]
    n_begin: list[int]
    n: int
    params: list[SamplingParams]
    generates: bool
    n_top: int | None
    echo: bool
    token_ids: bool

    @property
    def scores(self) -> bool:
        """Whether prompts have log-probabilities."""
        return self.echo and self.n_top is not None


class Completions:
    """POST /v1/completions: every prompt of the body is continued `n` times."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = Bodies(service, CompletionBody)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer whole or, where the body says so, with a stream; every refusal is an HTTP error before it."""
        made = Generation(self._service, req, COMPLETION)
        body: CompletionFields = self._bodies.take(req)
        ask = _asked(made, body)
        facts = {"n": ask.n, "n_prompts": len(ask.prompts), "stream": bool(body.stream)}
        n_jobs = ask.n * len(ask.prompts) if ask.generates else 0
        ids = job_ids(made.head.id, n_jobs + len(ask.prompts))
        choices = [
            Request(prompt, None, params, ids[ask.n * i + k], made.deadline)
            for i, prompt in enumerate(ask.prompts)
            for k, params in enumerate(ask.params)
            if ask.generates
        ]
        scored = [
            Request(prompt, None, ask.params[0], id, made.deadline, score=ask.n_top)
            for prompt, id in zip(ask.prompts, ids[n_jobs:], strict=True)
            if ask.scores
        ]
        if not body.stream:
            jobs: list[Job] = []
            completions: list[Completion] = []
            if choices or scored:  # else there is only a text to give back
                place, jobs = made.begin([*choices, *scored], **facts)
                completions = made.wait(place, jobs)
            answer(resp, _whole(made, ask, jobs[:n_jobs], completions[:n_jobs], jobs[n_jobs:]))
            return
        scores: list[Job] = []
        if scored:
            place, scores = made.begin(scored, **facts)
            made.wait(place, scores)
        openings = [_opening(made, ask, i, scores) for i in range(ask.n * len(ask.prompts))]
        if not choices:
            whole = _whole(made, ask, (), (), scores)
            made.stream_ready(
                resp, silent_stream(whole, bool(body.stream_options and body.stream_options.include_usage))
            )
            return
        place, jobs = made.begin(choices, **facts)
        options = body.stream_options
        wanted = Wanted(
            ask.n_top,
            ask.token_ids,
            bool(options and options.include_usage),
            bool(options and options.continuous_usage_stats),
        )
        made.stream(
            resp, place, jobs, lambda: CompletionChunks(made.head, jobs, ask.n, wanted, made.texts, openings=openings)
        )


def _asked(made: Generation, body: CompletionFields) -> Asked:
    check_refused(body)
    llm, config = made.llm, made.service.config
    echo, token_ids = bool(body.echo), bool(body.return_token_ids)
    n_top = asked.optional_whole("logprobs", body.logprobs)
    if n_top is not None and not 0 <= n_top <= MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs must be 0 to {MAX_LOGPROBS}", field="logprobs")
    _, max_tokens = asked.max_tokens_of(body, config, ("max_tokens",), 0)
    generates = max_tokens != 0
    texts = _prompts(body.prompt)
    n = asked.number_of_choices(body, len(texts), int(echo and n_top is not None), config)
    first = asked.sampling_params(body, llm, config.max_tokens_out, max_tokens if generates else 1, n_top)
    prompts, echoes, n_begin = [], [], []
    for text in texts:
        request = Request(text, None, first, special=bool(body.parse_special), add_bos=body.add_special_tokens)
        ids = llm.prompt_ids(request, made.limits)
        asked.check_context(llm, len(ids), max_tokens, ("prompt", "max_tokens"))
        prompts.append(ids)
        echoes.append(_text(made, text) if echo else "")
        n_begin.append(_begin(made, body.add_special_tokens) if isinstance(text, str) else 0)
    if not generates:
        for text in texts:  # what says nothing of an echo must be right all the same
            llm.check_request(Request(text, None, first, score=0), made.limits)
    if n_top is not None:
        n_out = n * len(prompts) * min(max_tokens or config.max_tokens_out, llm.info.context_length)
        n_in = n * sum(map(len, prompts)) if echo else 0
        asked.check_logprobs(n_in + (n_out if generates else 0), n_top)
    return Asked(prompts, echoes, n_begin, n, asked.choices_of(first, n), generates, n_top, echo, token_ids)


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """Each a text or ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if not prompt:
        raise InvalidRequest("prompt is empty", field="prompt")
    if kinds <= {int, float}:
        return [whole_numbers("prompt", prompt)]
    if len(kinds) > 1:
        raise InvalidRequest("prompt mixes texts, ids and lists of ids", field="prompt")
    return prompt if kinds == {str} else [whole_numbers("prompt", ids) for ids in prompt]


def _text(made: Generation, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "" if made.llm.tokenizer is None else made.llm.tokenizer.decode(prompt)


def _begin(made: Generation, add_bos: bool | None) -> int:
    """Tokens that are put before a text. One that begins with the text of such a token has it as a part."""
    tokenizer = made.llm.tokenizer
    return 0 if tokenizer is None else len(tokenizer.encode("", add_bos=add_bos))


def _whole(
    made: Generation, ask: Asked, jobs: Sequence[Job], completions: Sequence[Completion], scores: Sequence[Any]
) -> CompletionAnswer:
    choices = []
    for i in range(ask.n * len(ask.prompts)):
        choice = _opening(made, ask, i, scores) or CompletionChoice(index=i, text="")
        if completions:
            _add(made, ask, choice, jobs[i], completions[i])
        else:
            choice.finish_reason = "length"
        choices.append(choice)
    counts = usage(map(len, ask.prompts), cached_tokens(jobs, ask.n), (len(c.token_ids) for c in completions))
    return CompletionAnswer(**made.head.facts(), choices=choices, usage=counts)


def _opening(made: Generation, ask: Asked, index: int, scores: Sequence[Any]) -> CompletionChoice | None:
    """What stands before the generated text of a choice; None: nothing."""
    if not (ask.echo or ask.token_ids):
        return None
    at = index // ask.n
    ids = ask.prompts[at].tolist()
    choice = CompletionChoice(index=index, text=ask.echoes[at])
    if ask.token_ids:
        choice.prompt_token_ids, choice.token_ids = ids, []
    if ask.scores:
        choice.logprobs = _echo_logprobs(made, ids, ask.n_begin[at], scores[at].prompt_logprobs, ask.echoes[at])
    return choice


def _echo_logprobs(
    made: Generation, ids: list[int], n_begin: int, likely: Sequence[Likely], text: str
) -> CompletionLogprobs:
    begin = completion_logprobs(made.texts, ids[:n_begin], likely[:n_begin], Offsets(made.texts, True))
    rest = completion_logprobs(made.texts, ids[n_begin:], likely[n_begin:], Offsets(made.texts, False, given=text))
    return CompletionLogprobs(
        [0] * n_begin + rest.text_offset,
        begin.token_logprobs + rest.token_logprobs,
        begin.tokens + rest.tokens,
        begin.top_logprobs + rest.top_logprobs,
    )


def _add(made: Generation, ask: Asked, choice: CompletionChoice, job: Job, completion: Completion) -> None:
    """Add what was generated to an opening."""
    start = len(choice.text)
    choice.text += completion.text
    choice.finish_reason, choice.stop_reason = completion.finish_reason, completion.stop_reason
    if ask.token_ids:
        choice.token_ids = list(completion.token_ids)
    if ask.n_top is None:
        return
    offsets = Offsets(made.texts, True, start)
    new = completion_logprobs(made.texts, completion.token_ids, completion.logprobs or (), offsets)
    add_end(made.texts, new, job, completion, offsets)
    old = choice.logprobs
    if old is None:
        choice.logprobs = new
        return
    for name in CompletionLogprobs.__struct_fields__:
        getattr(old, name).extend(getattr(new, name))
