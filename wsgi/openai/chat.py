"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import falcon

from worker_orcd.config import MAX_LOGPROBS
from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.request import Limits, Request, SamplingParams
from worker_orcd.serving.job import Completion
from worker_orcd.wsgi.openai import asked
from worker_orcd.wsgi.openai.answers import ChatAnswer, ChatChoice, ChatMessage
from worker_orcd.wsgi.openai.bodies import Bodies
from worker_orcd.wsgi.openai.fields import check_refused
from worker_orcd.wsgi.openai.formats import ChatChunks, Wanted
from worker_orcd.wsgi.openai.generation import Generation, answer
from worker_orcd.wsgi.openai.heads import cached_tokens, usage
from worker_orcd.wsgi.openai.ids import CHAT, job_ids
from worker_orcd.wsgi.openai.logprobs import chat_logprobs
from worker_orcd.wsgi.openai.messages import template_messages, template_options
from worker_orcd.wsgi.openai.types import ChatBody, ChatFields
from worker_orcd.wsgi.service import Service


class ChatCompletions:
    """POST /v1/chat/completions: the assistant's next message, `n` times."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = Bodies(service, ChatBody)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer whole or, where the body says so, with a stream; every refusal is an HTTP error before it."""
        made = Generation(self._service, req, CHAT)
        body: ChatFields = self._bodies.take(req)
        check_refused(body)
        n = asked.number_of_choices(body, 1, 0, self._service.config)
        n_top = _top_logprobs(body)
        name, max_tokens = asked.max_tokens_of(body, self._service.config, ("max_completion_tokens", "max_tokens"), 1)
        params = asked.sampling_params(body, made.llm, self._service.config.max_tokens_out, max_tokens, n_top)
        prompt = conversation_ids(made.llm, body, made.limits)
        asked.check_context(made.llm, len(prompt), max_tokens, ("messages", name))
        if n_top is not None:
            n_out = min(max_tokens or self._service.config.max_tokens_out, made.llm.info.context_length)
            asked.check_logprobs(n * n_out, n_top)
        choices = [
            Request(prompt, None, one, id, made.deadline)
            for one, id in zip(asked.choices_of(params, n), job_ids(made.head.id, n), strict=True)
        ]
        try:
            place, jobs = made.begin(choices, n=n, n_messages=len(body.messages), stream=bool(body.stream))
        except InvalidRequest as error:
            raise _renamed(error, {"prompt": "messages", "max_tokens": name}) from None
        shown = prompt.tolist() if body.return_token_ids else None
        if not body.stream:
            completions = made.wait(place, jobs)
            counts = usage([len(prompt)], cached_tokens(jobs, n), (len(c.token_ids) for c in completions))
            whole = ChatAnswer(**made.head.facts(), choices=_choices(made, completions, n_top, shown), usage=counts)
            if shown is not None:
                whole.prompt_token_ids = shown
            answer(resp, whole)
            return
        options = body.stream_options
        wanted = Wanted(
            n_top,
            shown is not None,
            bool(options and options.include_usage),
            bool(options and options.continuous_usage_stats),
        )
        made.stream(resp, place, jobs, lambda: ChatChunks(made.head, jobs, n, wanted, made.texts, prompt=shown))


def conversation_ids(llm: Any, body: Any, limits: Limits) -> Any:
    """The prompt of a body's messages, int32 [n_prompt].

    Raises:
        InvalidRequest: they are malformed, the template refuses them, or they are too long.
    """
    request = Request(messages=template_messages(body.messages), params=SamplingParams(), chat=template_options(body))
    try:
        return llm.prompt_ids(request, limits)
    except InvalidRequest as error:
        raise _renamed(error, {"prompt": "messages"}) from None


def _top_logprobs(body: ChatFields) -> int | None:
    n_top = asked.optional_whole("top_logprobs", body.top_logprobs)
    if n_top is not None and not 0 <= n_top <= MAX_LOGPROBS:
        raise InvalidRequest(f"top_logprobs must be 0 to {MAX_LOGPROBS}", field="top_logprobs")
    if n_top and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    return (n_top or 0) if body.logprobs else None


def _choices(
    made: Generation, completions: list[Completion], n_top: int | None, shown: list[int] | None
) -> list[ChatChoice]:
    choices = []
    for index, completion in enumerate(completions):
        choice = ChatChoice(
            index=index,
            message=ChatMessage(content=completion.text),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        if n_top is not None:
            choice.logprobs = chat_logprobs(made.texts, completion.token_ids, completion.logprobs or (), n_top)
        if shown is not None:
            choice.token_ids = list(completion.token_ids)
        choices.append(choice)
    return choices


def _renamed(error: InvalidRequest, names: dict[str, str]) -> InvalidRequest:
    """The error, of the field that this route has in the place of another."""
    field = error.fields.get("field")
    if field in names:
        error.fields["field"] = names[field]
    return error
