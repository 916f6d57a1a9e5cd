"""Fields that clients send and that have no effect here: refused where their client would be misled, else taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from worker_orcd.errors import InvalidRequest

_ALL = frozenset(("completions", "chat"))
_CHAT = frozenset(("chat",))
_TEMPLATE = frozenset(("chat", "template"))


@dataclass(frozen=True)
class Refused:
    """A field that cannot be honoured.

    Attributes:
        reason: what its client is told.
        off: values that ask for nothing, beside null.
        routes: "completions", "chat" or "template" (the routes that only apply the chat template).
    """

    reason: str
    off: tuple[Any, ...] = ()
    routes: frozenset[str] = _ALL


_NO_GRAMMAR = "constrained output is not supported"
_NO_TOOLS = "tools are not supported"

#: by the field's name
REFUSED: dict[str, Refused] = {
    "response_format": Refused(_NO_GRAMMAR, ({"type": "text"},)),
    "structured_outputs": Refused(_NO_GRAMMAR),
    "guided_json": Refused(_NO_GRAMMAR),
    "guided_regex": Refused(_NO_GRAMMAR),
    "guided_choice": Refused(_NO_GRAMMAR),
    "guided_grammar": Refused(_NO_GRAMMAR),
    "guided_decoding_backend": Refused(_NO_GRAMMAR),
    "guided_whitespace_pattern": Refused(_NO_GRAMMAR),
    "grammar": Refused(_NO_GRAMMAR, ("",)),
    "json_schema": Refused(_NO_GRAMMAR),
    "tools": Refused(_NO_TOOLS, ([],), _TEMPLATE),
    "tool_choice": Refused(_NO_TOOLS, ("none", "auto"), _CHAT),
    "functions": Refused(_NO_TOOLS, ([],), _CHAT),
    "function_call": Refused(_NO_TOOLS, ("none", "auto"), _CHAT),
    "web_search_options": Refused("there is no web search", (), _CHAT),
    "audio": Refused("audio is not supported", (), _CHAT),
    "modalities": Refused("text is the only modality", (["text"],), _CHAT),
    "chat_template": Refused("the chat template is the model file's", (), _TEMPLATE),
    "suffix": Refused("insertion is not supported", ("",), frozenset(("completions",))),
    "best_of": Refused("all n choices are given back", (1,), frozenset(("completions",))),
    "use_beam_search": Refused("beam search is not supported", (False,)),
    "prompt_logprobs": Refused("only completions have log-probabilities of the prompt: with echo and logprobs"),
    "allowed_token_ids": Refused("allowed tokens are not supported"),
    "logits_processors": Refused("programs of a client are not run", ([],)),
    "truncate_prompt_tokens": Refused("prompts are not cut"),
    "include_stop_str_in_output": Refused("the text ends before the stop string", (False,)),
}

#: fields that change nothing in what is generated: the client's own notes, and hints
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "priority",
    "request_id",
    "cache_prompt",
    "cache_salt",
)


def refused_schema(rule: Refused) -> dict[str, Any]:
    """The JSON Schema of a field that is refused unless it asks for nothing."""
    return {"enum": [None, *rule.off], "description": rule.reason}


def check_refused(body: msgspec.Struct) -> None:
    """Raise `InvalidRequest`, naming the field, where a body asks for what cannot be honoured."""
    for name in body.__struct_fields__:
        rule = REFUSED.get(name)
        if rule is None:
            continue
        value = getattr(body, name)
        if value is not None and not any(_same(value, off) for off in rule.off):
            raise InvalidRequest(f"{name} is not taken: {rule.reason}", field=name)


def _same(value: Any, off: Any) -> bool:
    """Whether two JSON values are one: 1.0 is the integer 1, but false and 0, which are equal in Python, are two."""
    return value == off and isinstance(value, bool) == isinstance(off, bool)
