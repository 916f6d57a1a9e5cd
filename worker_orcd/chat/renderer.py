"""The process that renders chat templates: started and fed by process.py, limited in time and memory.

A template is a program out of a model file. jinja2's sandbox keeps it from objects it must not touch, but cannot keep
`{% set s = s ~ s %}` forty times from filling memory or two loops from running for days; a process of its own can be
given limits that hold: `RLIMIT_AS`, a timer of processor time whose signal ends the process, and an output that is
counted as it grows. Imports the standard library, jinja2 and its neighbours here only, so that it starts quickly.

Frames, both ways: 4 bytes of length (big-endian), then that many bytes of JSON. It says `{"ready": true}` by itself.
The first frame in holds `template`, `bos_token`, `eos_token` and the limits; each later one `messages`,
`add_generation_prompt`, `documents` and further `variables`, by name. Every frame in is answered by one out:
`{"text": ..., "origins": ...}`, with one character of provenance.py for each of the text's, or `{"error": ...}` where
the template or the messages are at fault, or `{"fault": ...}` where neither is.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import jinja2
from jinja2.exceptions import SecurityError

from worker_orcd.chat.content import Conversation, users
from worker_orcd.chat.environment import compiled
from worker_orcd.chat.provenance import Text, concat, origins_of

T = TypeVar("T")


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame, or None where the other side has closed."""
    head = stream.read(4)
    body = stream.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    frame: dict[str, Any] | None = json.loads(body) if body else None
    return frame


def as_frame(frame: dict[str, Any]) -> bytes:
    """A frame as it is sent."""
    body = json.dumps(frame, ensure_ascii=False).encode()
    return len(body).to_bytes(4, "big") + body


def explain(error: BaseException) -> str:
    """One line for the reader of the error."""
    if isinstance(error, RecursionError):
        return "nests or calls itself too deeply"
    if isinstance(error, MemoryError):
        return "needs more memory than allowed"
    # to who reads it, text is a string
    said = (
        str(error).replace(f"{Text.__module__}.{Text.__name__} object", "str object").replace("'Text' obj", "'str' obj")
    )
    if isinstance(error, SecurityError):
        return f"does what a template must not do: {said}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"has a syntax error in line {error.lineno}: {error.message}"
    if isinstance(error, jinja2.UndefinedError):
        return f"uses what the messages do not have: {said}"
    if isinstance(error, jinja2.TemplateError):
        return f"refuses the messages: {said}"
    return f"failed with {type(error).__name__}: {said}"


class Renderer:
    """One compiled template.

    Args:
        setup: the first frame.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._cpu_seconds: float = setup["cpu_seconds"]
        self._max_chars: int = setup["max_chars"]
        self._tokens = {"bos_token": setup["bos_token"], "eos_token": setup["eos_token"]}
        self._environment, self._template = self.limited(lambda: compiled(setup["template"]))

    def limited(self, work: Callable[[], T]) -> T:
        """Run `work` under the timer: where it runs out, SIGPROF ends this process."""
        signal.setitimer(signal.ITIMER_PROF, self._cpu_seconds)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def render(self, request: dict[str, Any]) -> str:
        """The text of one conversation."""
        others = {name: users(value) for name, value in request.get("variables", {}).items()}
        others["documents"] = users(request.get("documents"))
        others["add_generation_prompt"] = request.get("add_generation_prompt", False)
        conversation = Conversation(request["messages"])
        return self.limited(lambda: conversation.run(lambda m, finds_parts: self._render(m, finds_parts, others)))

    def _render(self, messages: list[dict[str, Any]], finds_parts: bool, others: dict[str, Any]) -> str:
        self._environment.finds_parts = finds_parts
        parts, n_chars = [], 0
        for part in self._template.generate(**self._tokens, messages=messages, **others, tools=None):
            n_chars += len(part)
            if n_chars > self._max_chars:
                raise jinja2.TemplateError(f"its text has more than {self._max_chars} characters")
            parts.append(part)
        return concat(parts)


def limit_memory(extra_bytes: int) -> None:
    """Let the address space grow by `extra_bytes` from here, and no further; no core files."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    most = now + extra_bytes if allowed == resource.RLIM_INFINITY else min(now + extra_bytes, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer(renderer: Renderer | None, frame: dict[str, Any]) -> tuple[Renderer | None, bytes]:
    """The renderer after a frame, and the frame that answers."""
    try:
        if renderer is None:
            limit_memory(frame["extra_bytes"])
    except (OSError, ValueError) as e:
        return None, as_frame({"fault": f"its memory cannot be limited: {e}"})
    try:
        if renderer is None:
            renderer, text = Renderer(frame), ""
        else:
            text = renderer.render(frame)
        return renderer, as_frame({"text": text, "origins": origins_of(text).decode()})
    except Exception as e:
        return renderer, as_frame({"error": explain(e)[:1000]})


def main() -> None:
    """Answer frames until the other side closes."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing but frames on the pipe
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the thread that started this one blocks and ignores
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    renderer = None
    said = as_frame({"ready": True})
    while True:
        sink.write(said)
        sink.flush()
        if (frame := read_frame(source)) is None:
            return
        renderer, said = answer(renderer, frame)


if __name__ == "__main__":
    main()
