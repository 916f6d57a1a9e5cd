"""What each route of the worker does, for the OpenAPI document: its bodies, its answers, whether it begins jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]

JSON, EVENTS = "application/json", "text/event-stream"
METRICS, OPEN_METRICS = "text/plain", "application/openmetrics-text"


@dataclass(frozen=True)
class Operation:
    """What one method of a route does.

    Attributes:
        summary: of it.
        answers: status -> media type -> schema; None: any text. No media type: no body.
        body: name of the schema of its body.
        jobs: whether it begins jobs.
        errors: further statuses of errors.
        open: whether it answers without a key.
    """

    summary: str
    answers: Mapping[int, Mapping[str, Schema | None]]
    body: str | None = None
    jobs: bool = False
    errors: tuple[int, ...] = ()
    open: bool = False


def ref(name: str) -> Schema:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


_TEXT = {"type": "string"}
ID = {"type": "integer", "minimum": 0}
_PIECE = _object(id=ID, piece={"anyOf": [_TEXT, {"type": "array", "items": ID}]})
_STATUS = _object(status=_TEXT)
_TOKENS = _object(
    tokens={"anyOf": [{"type": "array", "items": ID}, {"type": "array", "items": _PIECE}]},
    count=ID,
    max_model_len=ID,
)

#: path as routed -> method -> operation; of a route that is not here the document says what its resource says of itself
OPERATIONS: dict[str, dict[str, Operation]] = {
    "/execute": {"post": Operation("Run a job, its events streamed", {200: {EVENTS: None}}, "ExecuteBody", jobs=True)},
    "/cancel": {
        "post": Operation("End a job", {202: {JSON: _object(job_id=_TEXT, state=_TEXT)}}, "CancelBody"),
    },
    "/health": {
        "get": Operation("What the worker is and how it is", {200: {JSON: _STATUS}, 503: {JSON: _STATUS}}, open=True)
    },
    "/ready": {
        "get": Operation(
            "Whether jobs are taken",
            {code: {JSON: _object(ready={"type": "boolean"}, status=_TEXT)} for code in (200, 503)},
            open=True,
        )
    },
    "/metrics": {"get": Operation("All metrics as text for Prometheus", {200: {METRICS: None, OPEN_METRICS: None}})},
    "/": {"get": Operation("The page", {200: {"text/html": None}, 304: {}}, open=True)},
    "/static/{name}": {
        "get": Operation(
            "A file of the page",
            {200: dict.fromkeys(("text/css", "text/javascript", "image/svg+xml", "text/html")), 304: {}},
            errors=(404,),
            open=True,
        )
    },
    "/shutdown": {"post": Operation("End the worker", {202: {JSON: _STATUS}})},
    "/v1/models": {"get": Operation("The served model", {200: {JSON: ref("ModelList")}})},
    "/v1/models/{model:path}": {
        "get": Operation("The served model by its name", {200: {JSON: ref("Model")}}, errors=(404,))
    },
    "/v1/completions": {
        "post": Operation(
            "Continue texts", {200: {JSON: ref("CompletionAnswer"), EVENTS: None}}, "CompletionBody", jobs=True
        )
    },
    "/v1/chat/completions": {
        "post": Operation(
            "Continue a conversation", {200: {JSON: ref("ChatAnswer"), EVENTS: None}}, "ChatBody", jobs=True
        )
    },
    "/tokenize": {"post": Operation("Ids of a text or of a conversation", {200: {JSON: _TOKENS}}, "TokenizeBody")},
    "/detokenize": {
        "post": Operation("Text of ids", {200: {JSON: _object(prompt=_TEXT, content=_TEXT)}}, "DetokenizeFields")
    },
    "/apply-template": {
        "post": Operation("Text of a conversation", {200: {JSON: _object(prompt=_TEXT)}}, "TemplateBody")
    },
    "/tokenizer_info": {
        "get": Operation("Special tokens and chat template", {200: {JSON: _object(tokenizer_class=_TEXT)}})
    },
    "/openapi.json": {"get": Operation("This document", {200: {JSON: {"type": "object"}}})},
}
