"""POST /tokenize, /detokenize and /apply-template, and GET /tokenizer_info, as vLLM and llama-server have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import falcon

from worker_orcd.errors import InvalidRequest
from worker_orcd.runtime.request import check_token_ids
from worker_orcd.wsgi.openai.asked import limits_of, whole_numbers
from worker_orcd.wsgi.openai.bodies import Bodies
from worker_orcd.wsgi.openai.chat import conversation_ids
from worker_orcd.wsgi.openai.fields import check_refused
from worker_orcd.wsgi.openai.generation import answer
from worker_orcd.wsgi.openai.logprobs import TokenTexts
from worker_orcd.wsgi.openai.messages import template_messages, template_options
from worker_orcd.wsgi.openai.types import (
    ChatTemplateFields,
    DetokenizeBody,
    DetokenizeFields,
    TemplateBody,
    TokenizeBody,
    TokenizeFields,
)
from worker_orcd.wsgi.service import Service

if TYPE_CHECKING:
    from worker_orcd.runtime.llm import LLM


class Tokenize:
    """POST /tokenize: a text or a conversation -> ids."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = Bodies(service, TokenizeBody)
        self._limits = limits_of(service.config)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The ids, how many they are, and how many the context holds."""
        llm = self._service.llm()
        body: TokenizeFields = self._bodies.take(req)
        check_refused(body)
        given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise InvalidRequest("one of prompt, content and messages is needed", field="prompt")
        if body.messages is not None:
            ids = conversation_ids(llm, body, self._limits).tolist()
        else:
            ids = _encoded(llm, body)
        texts = TokenTexts(llm.tokenizer)
        out: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": llm.info.context_length}
        if body.with_pieces:
            out["tokens"] = [{"id": i, "piece": _piece(texts.data(i))} for i in ids]
        if body.return_token_strs:
            out["token_strs"] = [texts.text(i) for i in ids]
        answer(resp, out)


class Detokenize:
    """POST /detokenize: ids -> text."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = Bodies(service, DetokenizeBody)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The text, under the names of both."""
        llm = self._service.llm()
        body: DetokenizeFields = self._bodies.take(req)
        ids = whole_numbers("tokens", body.tokens)
        check_token_ids(ids or [0], llm.info.n_vocab, "tokens")
        text = _tokenizer(llm).decode(ids)
        answer(resp, {"prompt": text, "content": text})


class ApplyTemplate:
    """POST /apply-template: a conversation -> the text of its prompt."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = Bodies(service, TemplateBody)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """The text."""
        llm = self._service.llm()
        body: ChatTemplateFields = self._bodies.take(req)
        check_refused(body)
        text = _tokenizer(llm).chat_text(template_messages(body.messages), **template_options(body))
        answer(resp, {"prompt": text})


class TokenizerInfo:
    """GET /tokenizer_info: the texts of the special tokens, and the chat template."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """What lm-eval asks vLLM for before it uses /tokenize and /detokenize."""
        llm = self._service.llm()
        tokenizer = _tokenizer(llm)
        answer(
            resp,
            {
                "tokenizer_class": tokenizer.kind,
                "bos_token": _text_of(tokenizer, tokenizer.bos_id),
                "eos_token": _text_of(tokenizer, tokenizer.eos_id),
                "unk_token": _text_of(tokenizer, tokenizer.unk_id),
                "pad_token": _text_of(tokenizer, tokenizer.pad_id),
                "chat_template": tokenizer.chat_template,
                "model_max_length": llm.info.context_length,
            },
        )


def _text_of(tokenizer: Any, token: int | None) -> str | None:
    return None if token is None else tokenizer.token_bytes(token).decode("utf-8", "replace")


def _encoded(llm: LLM, body: TokenizeFields) -> list[int]:
    if body.content is not None:  # of llama-server, where a text begins with BOS only if it is asked for
        text, begin = body.content, bool(body.add_special)
    else:
        text, begin = body.prompt or "", body.add_special_tokens is not False
    tokenizer = _tokenizer(llm)
    ids: list[int] = tokenizer.encode(
        text, special=body.parse_special is not False, add_bos=begin and tokenizer.add_bos
    )
    return ids


def _tokenizer(llm: LLM) -> Any:
    if llm.tokenizer is None:
        raise InvalidRequest("the model has no tokenizer; the worker can be given one with --tokenizer")
    return llm.tokenizer


def _piece(data: bytes) -> str | list[int]:
    """As llama-server writes it: text, or its bytes where they are no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
