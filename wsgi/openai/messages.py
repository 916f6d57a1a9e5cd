"""The messages of a chat completion, as clients of OpenAI write them, in the form that the runtime takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi.openai.bodies import MAX_DEPTH, too_deep
from worker_orcd.wsgi.openai.types import ChatTemplateFields, TokenizeFields


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the arguments of tool calls as objects, which templates are written for, and refusals as text.

    Raises:
        InvalidRequest: arguments are no JSON object; names the field. What else is wrong is found later.
    """
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def template_options(body: ChatTemplateFields | TokenizeFields) -> dict[str, Any]:
    """How the chat template is applied: arguments of `Tokenizer.apply_chat`.

    Raises:
        InvalidRequest: `add_generation_prompt` and `continue_final_message` exclude each other.
    """
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    continues, prompts = bool(body.continue_final_message), body.add_generation_prompt
    return {
        "add_generation_prompt": not continues if prompts is None else prompts,
        "continue_final_message": continues,
        "documents": body.documents,
        "variables": variables,
    }


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = dict(message)
    content, calls = given.get("content"), given.get("tool_calls")
    if isinstance(content, list):
        content = given["content"] = [_part(part) for part in content]
    if any("\0" in text for text in _texts(content)):
        raise InvalidRequest(f"{where}.content holds a NUL character", field=f"{where}.content")
    if isinstance(calls, list):
        given["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return given


def _texts(content: Any) -> list[str]:
    """The strings of a content, whatever else is wrong with it."""
    parts = content if isinstance(content, list) else [{"text": content}]
    found = (part.get("text") for part in parts if isinstance(part, dict))
    return [text for text in found if isinstance(text, str)]


def _part(part: Any) -> Any:
    """A part of a content: an assistant's refusal is text to the next turn."""
    if isinstance(part, dict) and part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    return part


def _call(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    field = f"{where}.function.arguments"
    return {**call, "function": {**function, "arguments": _arguments(function["arguments"], field)}}


def _arguments(text: str, field: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    wrong = InvalidRequest(f"{field} must be the JSON text of an object", field=field)
    if too_deep(text.encode("utf-8", "surrogatepass"), MAX_DEPTH):
        raise wrong
    try:
        value = json.loads(text, parse_constant=_no_number)
    except ValueError:  # a number of more digits than Python reads, too
        raise wrong from None
    if not isinstance(value, dict):
        raise wrong
    return value


def _no_number(name: str) -> None:
    raise ValueError(name)
