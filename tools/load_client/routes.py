"""The routes that generate: how a job is asked for, and how its answer is read and checked event by event.

A `Reading` follows one answer. What breaks a rule of the wire (order, one terminal event, indices, JSON, UTF-8) goes to
its `faults`; whether the text is right is for the caller, who has the expected one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: what two answers to one case must have in common: the texts and finish reasons of the choices, (tokens in, out)
Result = tuple[tuple[str, ...], tuple[str | None, ...], tuple[int | None, int | None]]


@dataclass(frozen=True)
class Case:
    """One job that can be asked for again: same case, same route, same bytes."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, object]:
        """Every sampling field of /execute, so that no default of a route decides."""
        fields: dict[str, object] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "top_p": 0.95,
            "top_k": 50,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if self.stop:
            fields["stop"] = list(self.stop)
        return fields


@dataclass
class Reading:
    """One answer as it is read.

    Attributes:
        texts: the text so far of each choice.
        n_events: pieces of text so far.
        terminal: "end" or "error", once it has come.
        code: of an error.
        reasons: finish_reason of each choice.
        tokens: (in, out) as the answer tells.
    """

    job_id: str
    n_choices: int = 1
    texts: list[str] = field(default_factory=list)
    n_events: int = 0
    terminal: str | None = None
    code: str | None = None
    reasons: list[str | None] = field(default_factory=list)
    tokens: tuple[int | None, int | None] = (None, None)
    faults: list[str] = field(default_factory=list)
    _buffer: bytes = b""

    def __post_init__(self) -> None:
        self.texts = [""] * self.n_choices
        self.reasons = [None] * self.n_choices

    def feed(self, data: bytes) -> None:
        """Take a piece of the body."""
        *blocks, self._buffer = (self._buffer + data).split(b"\n\n")
        for block in blocks:
            if block.startswith(b":"):
                continue
            try:
                self._block(block)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                self.fault(f"{type(error).__name__} {error} in the event {block[:120]!r}")

    def _block(self, block: bytes) -> None:
        raise NotImplementedError

    def ended(self) -> None:
        """The body is whole."""
        if self._buffer:
            self.fault(f"an unfinished event at the end: {self._buffer[:80]!r}")
        if self.terminal is None:
            self.fault("no terminal event")

    def fault(self, what: str) -> None:
        """Note a broken rule."""
        if len(self.faults) < 5:
            self.faults.append(what)

    def result(self) -> Result:
        """What has come so far."""
        return (tuple(self.texts), tuple(self.reasons), self.tokens)


class ExecuteReading(Reading):
    """The events of POST /execute."""

    _last = ""

    def _block(self, block: bytes) -> None:
        head, mark, data = block.partition(b"\ndata: ")
        if not mark or not head.startswith(b"event: ") or b"\n" in data:
            raise ValueError("not one event with one line of data")
        name = head[7:].decode()
        values = json.loads(data.decode("utf-8"))
        if self.terminal is not None:
            self.fault(f"{name} behind the terminal event")
        elif name == "started":
            if self._last:
                self.fault(f"started behind {self._last}")
            if values["job_id"] != self.job_id:
                self.fault(f"started of the job {values['job_id']!r}, not {self.job_id!r}")
            self.tokens = (values["tokens_in"], None)
        elif not self._last:
            self.fault(f"{name} before started")
        elif name == "token":
            if self._last not in ("started", "token"):
                self.fault(f"token behind {self._last}")
            if values["i"] != self.n_events:
                self.fault(f"token {values['i']} where {self.n_events} is due")
            values["t"].encode("utf-8")  # a lone surrogate is no text
            self.texts[0] += values["t"]
            self.n_events += 1
        elif name == "metrics":
            if self._last == "metrics":
                self.fault("metrics twice")
        elif name == "end":
            self.terminal = "end"
            self.reasons[0] = values["finish_reason"]
            self.tokens = (self.tokens[0], values["tokens_out"])
        elif name == "error":
            self.terminal, self.code = "error", values["code"]
            if not values["message"] or not isinstance(values["retriable"], bool):
                self.fault("an error event without message or retriable")
        else:
            self.fault(f"an event {name!r}, which nobody knows")
        self._last = name


class OpenAIReading(Reading):
    """The chunks of a streamed /v1 answer, up to [DONE]."""

    kind = "text_completion"
    _id: str | None = None
    _ended = False

    def _text(self, choice: dict[str, Any]) -> str:
        text: str = choice["text"]
        return text

    def _block(self, block: bytes) -> None:
        if not block.startswith(b"data: ") or b"\n" in block:
            raise ValueError("not one line of data")
        data = block[6:]
        if self._ended:
            self.fault(f"an event behind [DONE]: {data[:60]!r}")
            return
        if data == b"[DONE]":
            self._ended = True
            if self.terminal is None:
                self.terminal = "end"
                if None in self.reasons:
                    self.fault("[DONE] before each choice has a finish_reason")
            return
        values = json.loads(data.decode("utf-8"))
        if self.terminal == "error":
            self.fault("a chunk behind the error")
        elif "error" in values:
            self.terminal, self.code = "error", str(values["error"]["code"])
            if not values["error"]["message"] or not values["error"]["type"]:
                self.fault("an error without message or type")
        else:
            self._chunk(values)

    def _chunk(self, values: dict[str, Any]) -> None:
        self._id = self._id or values["id"]
        if values["id"] != self._id or values["object"] != self.kind:
            self.fault(f"a chunk of {values['id']!r}, {values['object']!r}, not {self._id!r}, {self.kind!r}")
        if (usage := values.get("usage")) is not None:
            self.tokens = (usage["prompt_tokens"], usage["completion_tokens"])
        for choice in values["choices"]:
            index = choice["index"]
            text = self._text(choice)
            text.encode("utf-8")
            if self.reasons[index] is not None:
                self.fault(f"more of choice {index} behind its finish_reason")
            self.texts[index] += text
            self.n_events += bool(text)
            self.reasons[index] = choice.get("finish_reason")

    def ended(self) -> None:
        """The body is whole."""
        super().ended()
        if self.terminal == "end" and not self._ended:
            self.fault("no [DONE] at the end")


class ChatReading(OpenAIReading):
    """The chunks of a streamed chat completion."""

    kind = "chat.completion.chunk"

    def _text(self, choice: dict[str, Any]) -> str:
        text: str = choice["delta"].get("content") or ""
        return text


class WholeReading(Reading):
    """A /v1 answer in one JSON object."""

    def feed(self, data: bytes) -> None:
        """Keep a piece of the body."""
        self._buffer += data

    def ended(self) -> None:
        """Read the object."""
        try:
            values = json.loads(self._buffer.decode("utf-8"))
            usage = values["usage"]
            self.tokens = (usage["prompt_tokens"], usage["completion_tokens"])
            if usage["total_tokens"] != sum(t for t in self.tokens if t is not None):
                self.fault(f"usage that does not add up: {usage}")
            if [choice["index"] for choice in values["choices"]] != list(range(self.n_choices)):
                self.fault(f"{len(values['choices'])} choices, not {self.n_choices} in order")
            for choice in values["choices"]:
                message = choice.get("message")
                text = choice["text"] if message is None else message["content"] or ""
                text.encode("utf-8")
                self.texts[choice["index"]] = text
                self.reasons[choice["index"]] = choice["finish_reason"]
            self.terminal = "end"
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            self.fault(f"{type(error).__name__} {error} in the answer {self._buffer[:120]!r}")


@dataclass(frozen=True)
class Route:
    """One way to ask for a job.

    Attributes:
        streamed: the answer is a stream of events.
        has_job_id: the client names the job, so that /cancel can.
        weight: how often it is taken.
    """

    name: str
    path: str
    body: Callable[[Case, str], dict[str, object]]
    reading: type[Reading]
    streamed: bool = True
    has_job_id: bool = False
    n: int = 1
    weight: int = 2

    def ask(self, case: Case, job_id: str) -> bytes:
        """The body of a request."""
        return json.dumps(self.body(case, job_id)).encode()


def _execute(case: Case, job_id: str) -> dict[str, object]:
    return {"job_id": job_id, "prompt": case.prompt, **case.params}


def _completion(stream: bool, n: int) -> Callable[[Case, str], dict[str, object]]:
    options: dict[str, object] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}

    def body(case: Case, job_id: str) -> dict[str, object]:
        return {"model": "any", "prompt": case.prompt, "n": n, **case.params, **options}

    return body


def _chat(stream: bool) -> Callable[[Case, str], dict[str, object]]:
    options: dict[str, object] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}

    def body(case: Case, job_id: str) -> dict[str, object]:
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": case.prompt}]
        return {"model": "any", "messages": messages, **case.params, **options}

    return body


EXECUTE = Route("execute", "/execute", _execute, ExecuteReading, has_job_id=True, weight=6)
V1_ROUTES = (
    Route("completions, streamed", "/v1/completions", _completion(True, 1), OpenAIReading),
    Route("completions", "/v1/completions", _completion(False, 1), WholeReading, streamed=False),
    Route("completions, n=2", "/v1/completions", _completion(True, 2), OpenAIReading, n=2, weight=1),
    Route("chat, streamed", "/v1/chat/completions", _chat(True), ChatReading),
    Route("chat", "/v1/chat/completions", _chat(False), WholeReading, streamed=False),
)
#: which routes answer a case with the same text as /execute
LIKE_EXECUTE = ("completions, streamed", "completions")
