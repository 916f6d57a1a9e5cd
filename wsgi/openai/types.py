"""The bodies of requests of the OpenAI-compatible routes, as typed structures; those of answers are in `answers`.

Types are checked while a body is decoded; what the values may be is checked where a request is prepared, in the
runtime. The JSON Schemas of openapi.py are made from these structures, so what a range is stands here too, taken from
the rules that the runtime checks by.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from worker_orcd.config import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS, MAX_STOPS
from worker_orcd.runtime.request import RULES
from worker_orcd.wsgi.openai.fields import HARMLESS, REFUSED, refused_schema
from worker_orcd.wsgi.openai.ids import MAX_CHOICES

_WHOLE: dict[str, Any] = {"type": ["integer", "null"]}


def _range(name: str) -> Meta:
    """The schema of the sampling field `name`."""
    rule = RULES[name]
    schema: dict[str, Any] = {"type": ["integer" if rule.kind is int else "number", "null"]}
    if rule.least is not None:
        schema["exclusiveMinimum" if rule.above else "minimum"] = rule.least
    if rule.most is not None:
        schema["maximum"] = rule.most
    return Meta(extra_json_schema=schema)


def _whole(least: int, most: int) -> Meta:
    return Meta(extra_json_schema={**_WHOLE, "minimum": least, "maximum": most})


def _text_list(**bounds: int) -> dict[str, Any]:
    return {"items": {"type": "string", "minLength": 1, "pattern": NO_NUL, **bounds}}


#: of a JSON Schema: a string without NUL
NO_NUL = r"^[^\x00]*$"
_TEXT = {"minLength": 1, "maxLength": MAX_STOP_CHARS, "pattern": NO_NUL}
_TEXTS = Meta(extra_json_schema={**_TEXT, **_text_list(maxLength=MAX_STOP_CHARS), "maxItems": MAX_STOPS})
_ID = {"type": "integer", "minimum": 0}


class StreamOptions(msgspec.Struct):
    """`stream_options`. Without effect on an answer that is no stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What both kinds of completion take."""

    model: Annotated[str | None, Meta(description="any name; the served one answers")] = None
    max_tokens: int | float | None = None
    n: Annotated[int | float | None, _whole(1, MAX_CHOICES)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[str | list[str] | None, _TEXTS] = None
    seed: Annotated[
        int | float | None,
        Meta(
            extra_json_schema={**_WHOLE, "minimum": -(2**63), "maximum": 2**64 - 1},
            description="choice i draws with seed + i; both are taken modulo 2^64",
        ),
    ] = None
    temperature: Annotated[float | None, _range("temperature")] = None
    top_p: Annotated[float | None, _range("top_p")] = None
    top_k: Annotated[
        int | float | None, Meta(extra_json_schema={**_WHOLE, "minimum": -1}, description="0 and -1 are off")
    ] = None
    min_p: Annotated[float | None, _range("min_p")] = None
    repetition_penalty: Annotated[float | None, _range("repetition_penalty")] = None
    presence_penalty: Annotated[float | None, _range("presence_penalty")] = None
    frequency_penalty: Annotated[float | None, _range("frequency_penalty")] = None
    logit_bias: Annotated[
        dict[str, float] | None,
        Meta(
            extra_json_schema={
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "maxProperties": MAX_LOGIT_BIAS,
            }
        ),
    ] = None
    min_tokens: Annotated[
        int | float | None,
        Meta(extra_json_schema={**_WHOLE, "minimum": 0}, description="max_tokens ends the text all the same"),
    ] = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[
        list[int | float] | None, Meta(extra_json_schema={"items": _ID, "maxItems": MAX_STOP_TOKEN_IDS})
    ] = None
    bad_words: Annotated[list[str] | None, Meta(extra_json_schema=_text_list())] = None
    return_token_ids: bool | None = None


class CompletionFields(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | float | list[int | float]]
    echo: bool | None = None
    logprobs: Annotated[int | float | None, _whole(0, MAX_LOGPROBS)] = None
    add_special_tokens: Annotated[bool | None, Meta(description="begin text with BOS; absent: as the file says")] = None
    parse_special: Annotated[bool | None, Meta(description="the text of a control token is the token")] = None


class ChatTemplateFields(msgspec.Struct, kw_only=True):
    """What is said of a conversation and of its template."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Annotated[str | None, Meta(description="a variable of the template")] = None


class ChatFields(SamplingFields, kw_only=True):
    """POST /v1/chat/completions. (A structure has one base: the fields of the template stand here again.)"""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Annotated[str | None, Meta(description="a variable of the template")] = None
    max_completion_tokens: int | float | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | float | None, _whole(0, MAX_LOGPROBS)] = None


class TokenizeFields(msgspec.Struct, kw_only=True):
    """POST /tokenize, of vLLM (`prompt` or `messages`) and of llama-server (`content`)."""

    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class DetokenizeFields(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[list[int | float], Meta(extra_json_schema={"items": _ID})]


def _with_others(name: str, of: type[msgspec.Struct], route: str) -> Any:
    """A structure with the fields that are refused or of no effect too."""
    known = set(of.__struct_fields__)
    refused = [
        (field, Annotated[Any, Meta(extra_json_schema=refused_schema(rule))], None)
        for field, rule in REFUSED.items()
        if field not in known and route in rule.routes
    ]
    harmless = [
        (field, Annotated[Any, Meta(description="of no effect")], None) for field in HARMLESS if field not in known
    ]
    return msgspec.defstruct(name, [*refused, *harmless], bases=(of,), kw_only=True, module=__name__)


CompletionBody = _with_others("CompletionBody", CompletionFields, "completions")
ChatBody = _with_others("ChatBody", ChatFields, "chat")
TemplateBody = _with_others("TemplateBody", ChatTemplateFields, "template")
TokenizeBody = _with_others("TokenizeBody", TokenizeFields, "template")
DetokenizeBody = DetokenizeFields
#: of all routes
BODIES = (CompletionBody, ChatBody, TemplateBody, TokenizeBody, DetokenizeBody)
