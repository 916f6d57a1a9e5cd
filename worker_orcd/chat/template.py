"""Chat templates: messages -> the prompt text of the model file's template, with what users wrote kept apart.

The template runs in a process of its own (renderer.py) with limits on time, memory and output, so that no template
can hang or fill this one. It works on the true text, and tells of every character of the prompt whether it is the
template's own or a user's (provenance.py). A control token of the prompt that is not wholly the template's is *marked*
here: one character that occurs nowhere else is put inside it, so that it is not found; `Tokenizer.apply_chat` takes the
marks out again after looking.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from worker_orcd.chat.messages import checked, plain_value
from worker_orcd.chat.process import Ended, Process, start
from worker_orcd.chat.provenance import USER
from worker_orcd.errors import InternalError, InvalidRequest, excerpt, quoted

#: processor time of one rendering; published templates take about a millisecond
CPU_SECONDS = 1.5
#: memory that compiling and rendering may add
EXTRA_BYTES = 64 << 20
#: characters of a rendered prompt, and of the messages it is made of
MAX_CHARS = 1 << 20
#: characters of what a template or jinja2 says of an error; published templates explain themselves in up to 200
MAX_REASON = 300
#: private-use characters that have no meaning in any text; the first that a prompt does not hold marks it
_MARKS = [chr(c) for c in range(0x10FF00, 0x10FFF0)]
#: variables of a template that have another source than `variables`
_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token")
)


class ChatTemplate:
    """One template, rendered on demand. Safe to use from several threads.

    Args:
        source: jinja2 source.
        path: the file it came from, for messages.
        bos_text, eos_text: what `bos_token` and `eos_token` stand for in it.
        control_texts: texts of the control tokens, which users' text must not become.
    """

    def __init__(self, source: str, path: str, bos_text: str, eos_text: str, control_texts: Sequence[str]) -> None:
        self.source = source
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._path = path
        self._setup = {
            "template": source, "bos_token": bos_text, "eos_token": eos_text,
            "cpu_seconds": CPU_SECONDS, "max_chars": MAX_CHARS, "extra_bytes": EXTRA_BYTES,
        }  # fmt: skip
        self._marker = _Marker(control_texts)
        #: one for each process, by its id: in a forked child the parent's may stay held for ever
        self._locks: dict[int, threading.Lock] = {}
        self._process: Process | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, str]:
        """The prompt text.

        Args:
            messages: dicts with `role` and `content` (a string, a list of text parts or, of an assistant, None), and
                what else the template reads, in order. The role `developer` is `system` for a template that does not
                know it.
            add_generation_prompt: end with the start of the assistant's turn.
            continue_final_message: end where the content of the last message does, as a rule an assistant's.
            documents: the template's variable of this name, dicts of JSON values.
            variables: further variables of the template, JSON values by name.

        Returns:
            (text, mark): the text, and the character inside it that is to be removed once control tokens are found.

        Raises:
            InvalidRequest: the messages are malformed, the template refuses them, breaks the sandbox or its limits, or
                does not write the message that is to be continued as it is.
            InternalError: the process that renders it cannot be started, or was ended by something else.
        """
        plain = checked(messages)
        if "developer" not in self.source:
            plain = [{**m, "role": "system"} if m["role"] == "developer" else m for m in plain]
        final = _final_content(plain, bool(add_generation_prompt)) if continue_final_message else ""
        stand_in = ""
        if continue_final_message and not final.strip():  # no text of its own says where it ends
            stand_in = _unused_mark(json.dumps(plain, ensure_ascii=False))
            plain[-1] = _ending_with(stand_in, plain[-1])
        request = {
            "messages": plain,
            "add_generation_prompt": bool(add_generation_prompt),
            "documents": _documents(documents),
            "variables": _variables(variables or {}),
        }
        n_chars = len(json.dumps(request, ensure_ascii=False))
        if n_chars > MAX_CHARS:
            raise InvalidRequest(f"messages hold {n_chars} characters, limit {MAX_CHARS}", field="messages")
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            answer = self._ask(request)
        text, origins = answer["text"], answer["origins"].encode()
        if continue_final_message:
            end = _end_of(stand_in or final, text, origins) - len(stand_in)
            text, origins = text[:end], origins[:end]
        mark = _unused_mark(text)
        return self._marker.mark(text, origins, mark), mark

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            # a process forked from this one shares the pipes and must not use them
            if self._process is not None and self._process.owner == os.getpid():
                try:
                    return self._checked(self._process.ask(request))
                except Ended:  # since the last time; a new one may do
                    pass
            self._process = None
            process = start(CPU_SECONDS)
            self._checked(process.ask(self._setup))
            self._process = process  # not before it knows the template, whenever an interrupt comes
            return self._checked(process.ask(request))
        except (Ended, TimeoutError) as e:
            self._process = None
            reason = f"the process that renders the chat template of {self._path} failed: {e}"
            raise InternalError(reason) from None

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "text" in answer:
            return answer
        if self._process is not None and not self._process.alive:
            self._process = None
        if "fault" in answer:
            self._process = None
            reason = f"the process that renders the chat template of {self._path} failed: {answer['fault']}"
            raise InternalError(reason)
        reason = excerpt(" ".join(answer["error"].split()), MAX_REASON)
        raise InvalidRequest(f"the chat template of {self._path} {reason}", field="messages")


def _documents(documents: object) -> list[Any] | None:
    if documents is None:
        return None
    if not isinstance(documents, Sequence) or isinstance(documents, str | bytes):
        raise InvalidRequest("documents must be a list of objects", field="documents")
    for i, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise InvalidRequest(f"documents[{i}] must be an object", field="documents")
    return [plain_value(document, "documents") for document in documents]


def _variables(variables: object) -> dict[str, Any]:
    where = "chat_template_kwargs"
    if not isinstance(variables, Mapping):
        raise InvalidRequest(f"{where} must be an object", field=where)
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise InvalidRequest(f"{where} holds {quoted(str(name))}, which is no name of a variable", field=where)
        if name in _RESERVED:
            raise InvalidRequest(f"{where} holds {name}, which a template gets from elsewhere", field=where)
    return {str(name): plain_value(value, where) for name, value in variables.items()}


def _final_content(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """The text of the last message, which is to be continued."""
    name = "continue_final_message"
    if add_generation_prompt:
        raise InvalidRequest(f"{name} and add_generation_prompt exclude each other", field=name)
    content = messages[-1].get("content")
    return str(content if isinstance(content, str) else content[-1]["text"] if content else "")


def _ending_with(end: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with `end` after the text of its content."""
    content = message.get("content")
    if isinstance(content, list) and content:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + end}]}
    return {**message, "content": (content or "") + end}


def _unused_mark(text: str) -> str:
    """One character that a text does not hold.

    Raises:
        InvalidRequest: there is none.
    """
    mark = next((m for m in _MARKS if m not in text), None)
    if mark is None:
        raise InvalidRequest("messages hold every private-use character that could mark them", field="messages")
    return mark


def _end_of(content: str, text: str, origins: bytes) -> int:
    """Where `content` ends for the last time that a user's text is it; blanks at its ends count if they are there."""
    core = content.strip()
    at = text.rfind(core)
    while at >= 0 and origins.count(USER, at, at + len(core)) != len(core):
        at = text.rfind(core, 0, at + len(core) - 1)
    if at < 0:
        reason = "the chat template does not write the content of the last message as it is"
        raise InvalidRequest(f"continue_final_message: {reason}", field="continue_final_message")
    whole = content.lstrip()
    return at + len(whole if text.startswith(whole, at) else core)


class _Marker:
    """Puts a mark into every control token's text that holds a character of a user.

    Args:
        control_texts: texts of two or more characters.
    """

    def __init__(self, control_texts: Sequence[str]) -> None:
        self._texts = tuple(dict.fromkeys(control_texts))
        #: a text with none of these holds no control token; there are few, while the tokens can be hundreds
        self._heads = {t[:2] for t in control_texts}

    def mark(self, text: str, origins: bytes, mark: str) -> str:
        """The text, marked.

        Args:
            text: a prompt.
            origins: of its characters.
            mark: a character that it does not hold.
        """
        if USER not in origins or not any(head in text for head in self._heads):
            return text
        places = set()
        for token in self._texts:
            start = text.find(token)
            while start >= 0:
                first = origins.find(USER, start, start + len(token))
                if first >= 0:  # beside a character of the user's no token is cut that is the template's alone
                    places.add(max(first, start + 1))
                start = text.find(token, start + 1)
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[a:b] for a, b in itertools.pairwise(cuts))
