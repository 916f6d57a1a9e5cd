"""GET /openapi.json: the worker's whole HTTP API as an OpenAPI 3.1 document.

The schemas are made from the structures that bodies are decoded into, and their ranges from the rules that requests are
checked by. What those leave open is added here: what the loaded model sets (its vocabulary), and what one field says of
another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import falcon
import msgspec

import worker_orcd
from worker_orcd.config import MAX_JOB_ID_CHARS, MAX_PROMPT_CHARS, MAX_STOPS
from worker_orcd.runtime.request import HTTP_FIELDS, RULES
from worker_orcd.wsgi.http_errors import is_openai
from worker_orcd.wsgi.native.cancel import CancelBody
from worker_orcd.wsgi.native.execute import ExecuteBody
from worker_orcd.wsgi.openai import answers, types
from worker_orcd.wsgi.openai.generation import answer
from worker_orcd.wsgi.openai.ids import MAX_CHOICES
from worker_orcd.wsgi.openai.operations import ID, JSON, OPERATIONS, Operation, Schema, ref
from worker_orcd.wsgi.service import Service

#: what every route may answer: status -> when
_ERRORS = {
    400: "a field breaks its rule, which the answer names; or the body is no JSON object",
    401: "the API key is missing or wrong",
    403: "the sender is nobody who may talk to this worker",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "the body is not said to be JSON",
    500: "a fault of the device or the worker",
    503: "loading, unhealthy or stopping",
}
#: and those that begin jobs
_JOB_ERRORS = {
    409: "a job of this id is queued or running",
    429: "the queue is full",
    499: "the job was cancelled",
    504: "the job passed its deadline",
}
#: in a path as Falcon writes it: its name, and how much of the path it is
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ROLE = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string", "pattern": types.NO_NUL}},
}
_CONTENT = [{"type": "string", "pattern": types.NO_NUL}, {"type": "array", "items": _PART}]
#: names of the worker's own error in JSON
_NATIVE_ERROR = {
    "type": "object",
    "required": ["code", "message", "retriable"],
    "properties": {
        "code": {"type": "string"},
        "message": {"type": "string"},
        "retriable": {"type": "boolean"},
        "field": {"type": "string"},
    },
}


class OpenApi:
    """GET /openapi.json.

    Attributes:
        routes: path and resource of every route; set by the application.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.routes: Sequence[tuple[str, Any]] = ()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 at any time; once the model is loaded with what it sets."""
        config = self._service.config
        facts: dict[str, Any] = self._service.health()[1]
        answer(
            resp,
            document(
                {path: OPERATIONS.get(path) or _told(resource) for path, resource in self.routes},
                max_tokens_out=config.max_tokens_out,
                max_jobs=config.max_streams,
                n_vocab=facts.get("vocab_size") if facts["status"] != "loading" else None,
                with_key=config.api_key is not None,
            ),
        )


def _told(resource: Any) -> dict[str, Operation]:
    """What the document says of a resource that has no row here."""
    summary = (resource.__doc__ or "").split("\n", 1)[0]
    methods = {"get": "on_get", "post": "on_post"}
    return {method: Operation(summary, {200: {}}) for method, name in methods.items() if hasattr(resource, name)}


def document(
    operations: Mapping[str, Mapping[str, Operation]],
    *,
    max_tokens_out: int,
    max_jobs: int,
    n_vocab: int | None,
    with_key: bool,
) -> Schema:
    """The document.

    Args:
        operations: by path and method.
        max_tokens_out, max_jobs: of the worker.
        n_vocab: size of the model's vocabulary; None: not known yet.
        with_key: whether the worker asks for a key.
    """
    paths: dict[str, Any] = {}
    for path, methods in operations.items():
        shown = _PARAMETER.sub(r"{\1}", path)
        paths[shown] = {method: _operation(path, one, with_key) for method, one in methods.items()}
        named: Schema = {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        if parameters := [{"name": found[1], **named} for found in _PARAMETER.finditer(path)]:
            paths[shown]["parameters"] = parameters
    whole: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "worker-orcd", "version": worker_orcd.__version__},
        "paths": paths,
        "components": {"schemas": _schemas(max_tokens_out, max_jobs, n_vocab)},
    }
    if with_key:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return whole


def _operation(path: str, one: Operation, with_key: bool) -> Schema:
    error = ref("ErrorAnswer" if is_openai(path) else "Error")
    errors = {**_ERRORS, **(_JOB_ERRORS if one.jobs else {}), **dict.fromkeys(one.errors, "there is no such thing")}
    if one.open or not with_key:
        del errors[401]
    responses = {str(code): {"description": why, "content": {JSON: {"schema": error}}} for code, why in errors.items()}
    for code, kinds in one.answers.items():
        content = {kind: {} if schema is None else {"schema": schema} for kind, schema in kinds.items()}
        responses[str(code)] = {"description": one.summary, "content": content}
    out: Schema = {"summary": one.summary, "responses": dict(sorted(responses.items()))}
    if one.body is not None:
        out["requestBody"] = {"required": True, "content": {JSON: {"schema": ref(one.body)}}}
    if with_key and not one.open:
        out["security"] = [{"key": []}]
    return out


def _schemas(max_tokens_out: int, max_jobs: int, n_vocab: int | None) -> Schema:
    bodies = (*types.BODIES, ExecuteBody, CancelBody)
    answered = (answers.CompletionAnswer, answers.ChatAnswer, answers.ChatChunk, answers.ModelList, answers.ErrorAnswer)
    _, schemas = msgspec.json.schema_components((*bodies, *answered), ref_template="#/components/schemas/{name}")
    schemas["Error"] = _NATIVE_ERROR
    for schema in schemas.values():
        for one in schema["properties"].values():
            if "type" in one:  # said by hand, and narrower
                one.pop("anyOf", None)
    for name in ("CompletionBody", "ChatBody", "ExecuteBody"):
        _set_limits(schemas[name]["properties"], max_tokens_out, n_vocab)
    for name in ("CompletionBody", "ChatBody"):
        schemas[name]["properties"]["n"]["maximum"] = min(MAX_CHOICES, max_jobs)
    _set_native(schemas["ExecuteBody"]["properties"])
    schemas["CancelBody"]["properties"]["job_id"] = schemas["ExecuteBody"]["properties"]["job_id"]
    ids = {"type": "array", "minItems": 1, "items": _id(n_vocab)}
    text = {"type": "string", "minLength": 1, "pattern": types.NO_NUL}
    schemas["CompletionBody"]["properties"]["prompt"] = {
        "anyOf": [
            text,
            ids,
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": text},
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": ids},
        ]
    }
    for name in ("ChatBody", "TemplateBody", "TokenizeBody"):
        _set_template(schemas[name])
    schemas["TokenizeBody"]["oneOf"] = [
        {
            "required": [given],
            "properties": {n: {"not": {"type": "null"}} if n == given else {"type": "null"} for n in _TOKENIZED},
        }
        for given in _TOKENIZED
    ]
    schemas["DetokenizeFields"]["properties"]["tokens"]["items"] = _id(n_vocab)
    schemas["ChatBody"]["if"] = {
        "required": ["top_logprobs"],
        "properties": {"top_logprobs": {"type": "integer"}},
    }
    schemas["ChatBody"]["then"] = {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}}
    return dict(schemas)


_TOKENIZED = ("prompt", "content", "messages")


def _id(n_vocab: int | None) -> Schema:
    return {**ID, **({} if n_vocab is None else {"maximum": n_vocab - 1})}


def _set_limits(properties: Schema, max_tokens_out: int, n_vocab: int | None) -> None:
    """The limits that the worker and its model set."""
    for name in ("max_tokens", "max_completion_tokens"):
        if name in properties:
            least = 0 if "echo" in properties else 1
            properties[name] = {"type": ["integer", "null"], "minimum": least, "maximum": max_tokens_out}
    if "min_tokens" in properties:
        properties["min_tokens"]["maximum"] = max_tokens_out
    if n_vocab is None:
        return
    properties["top_k"]["maximum"] = n_vocab
    if "stop_token_ids" in properties:
        properties["stop_token_ids"]["items"] = _id(n_vocab)
    if "logit_bias" in properties:
        properties["logit_bias"]["propertyNames"] = {"pattern": f"^(?:{below(n_vocab)})$"}


def _set_native(properties: Schema) -> None:
    """The rules of POST /execute."""
    for name, kind in HTTP_FIELDS.items():
        if name not in ("max_tokens", "top_k", "stop"):
            rule, one = RULES[name], properties[name]
            one.pop("anyOf", None)
            one["type"] = ["integer" if kind is int else "number", "null"]
            one["exclusiveMinimum" if rule.above else "minimum"] = rule.least
            one["maximum"] = rule.most
    properties["top_k"] = {
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": properties["top_k"].get("maximum", 2**31),
    }
    properties["stop"] = {
        "type": ["array", "null"],
        "maxItems": MAX_STOPS,
        "items": {"type": "string", "minLength": 1, "pattern": types.NO_NUL},
    }
    properties["prompt"] = {"type": "string", "minLength": 1, "maxLength": MAX_PROMPT_CHARS, "pattern": types.NO_NUL}
    pattern = r"^[^\x00-\x1f\x7f]*$"
    properties["job_id"] = {"type": "string", "minLength": 1, "maxLength": MAX_JOB_ID_CHARS, "pattern": pattern}


def _set_template(schema: Schema) -> None:
    """The rules of messages and of the template's variables."""
    said = {"role": _ROLE, "content": {"anyOf": _CONTENT}}
    silent = {"role": {"const": "assistant"}, "content": {"type": "null"}}
    kinds = [
        {"type": "object", "required": ["role", "content"], "properties": said},
        {"type": "object", "required": ["role"], "properties": silent},
    ]
    messages: Schema = {"type": "array", "minItems": 1, "items": {"anyOf": kinds}}
    properties = schema["properties"]
    required = "messages" in schema.get("required", ())
    properties["messages"] = messages if required else {"anyOf": [messages, {"type": "null"}]}
    properties["chat_template_kwargs"]["propertyNames"] = {"pattern": "^[A-Za-z][A-Za-z0-9_]*$"}
    both = {name: {"const": True} for name in ("add_generation_prompt", "continue_final_message")}
    schema["not"] = {"required": list(both), "properties": both}


def below(n: int) -> str:
    """A regular expression of the decimal numbers 0 to n - 1, without leading zeros; n is at least 1."""
    digits = str(n - 1)
    parts = ["0"]
    for length in range(1, len(digits)):
        parts.append("[1-9]" + (f"[0-9]{{{length - 1}}}" if length > 1 else ""))
    for place, digit in enumerate(digits):  # as long as the largest, and smaller from this place on
        least = 1 if place == 0 else 0
        if int(digit) > least:
            rest = len(digits) - place - 1
            tail = f"[0-9]{{{rest}}}" if rest else ""
            parts.append(f"{digits[:place]}[{least}-{int(digit) - 1}]{tail}")
    return "|".join([*parts, digits])
