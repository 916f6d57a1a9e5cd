"""The bodies of answers of the OpenAI-compatible routes, as typed structures. openapi.py makes their schemas of them.

A field that is UNSET is left out of the JSON, one that is None is null there.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class CachedTokens(msgspec.Struct):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of all prompts and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(msgspec.Struct):
    """A list entry a token. A token that is no UTF-8 is written bytes:\\xNN\\xNN."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation of one prompt; the choices of the first prompt come first. `stop_reason`: which of `stop` or of
    `stop_token_ids` ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionAnswer(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/completions, and each chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(msgspec.Struct):
    """A token that was likely in its place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token that was drawn; a token that is no UTF-8 has U+FFFD in its text, and its true bytes."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """A list entry a token."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    """What the assistant says."""

    role: str = "assistant"
    content: str | None = None
    refusal: None = None


class ChatDelta(msgspec.Struct):
    """What comes next of it."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One continuation of the conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatAnswer(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """The next piece of one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One chunk of the stream of POST /v1/chat/completions."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Model(msgspec.Struct):
    """The one model that is served."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "worker-orcd"


class ModelList(msgspec.Struct):
    """The answer of GET /v1/models."""

    data: list[Model]
    object: str = "list"


class ErrorFacts(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct):
    """An error, in OpenAI's shape."""

    error: ErrorFacts
