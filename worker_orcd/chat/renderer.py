"""The process that renders chat templates: run as a script, fed by template.py, limited in time and memory.

A template is a program out of a model file. jinja2's sandbox keeps it from objects it must not touch, but cannot keep
`{% set s = s ~ s %}` forty times from filling memory or two loops from running for days; a process of its own can be
given limits that hold: `RLIMIT_AS`, a timer of processor time whose signal ends the process, and an output that is
counted as it grows. Imports the standard library and jinja2 only, so that it starts quickly.

Frames, both ways: 4 bytes of length (big-endian), then that many bytes of JSON. The first frame in holds `template`,
`bos_token`, `eos_token` and the limits; each later one `messages` and `add_generation_prompt`. Every frame in is
answered by one out: `{"text": ...}` or `{"error": ...}`.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

T = TypeVar("T")


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame, or None where the other side has closed."""
    head = stream.read(4)
    body = stream.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    frame: dict[str, Any] | None = json.loads(body) if body else None
    return frame


def write_frame(stream: BinaryIO, frame: dict[str, Any]) -> None:
    """Send one frame."""
    body = json.dumps(frame, ensure_ascii=False).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def raise_exception(message: str) -> None:
    """What templates call to refuse messages, such as roles in the wrong order."""
    raise jinja2.TemplateError(str(message))


def strftime_now(form: str) -> str:
    """Local time; some templates tell the model the date."""
    return datetime.datetime.now().strftime(form)


def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
           separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
    """JSON as it is, where jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """The sandbox, with what chat templates are written for: block trimming, loop controls and four helpers."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.pop("lipsum", None)
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return env


def explain(error: BaseException) -> str:
    """One line for the reader of the error."""
    if isinstance(error, RecursionError):
        return "nests or calls itself too deeply"
    if isinstance(error, MemoryError):
        return "needs more memory than allowed"
    if isinstance(error, SecurityError):
        return f"does what a template must not do: {error}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"has a syntax error in line {error.lineno}: {error.message}"
    if isinstance(error, jinja2.UndefinedError):
        return f"uses what the messages do not have: {error}"
    if isinstance(error, jinja2.TemplateError):
        return f"refuses the messages: {error}"
    return f"failed with {type(error).__name__}: {error}"


class Renderer:
    """One compiled template.

    Args:
        setup: the first frame.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._cpu_seconds: float = setup["cpu_seconds"]
        self._max_chars: int = setup["max_chars"]
        self._tokens = {"bos_token": setup["bos_token"], "eos_token": setup["eos_token"]}
        self._template = self.limited(lambda: environment().from_string(setup["template"]))

    def limited(self, work: Callable[[], T]) -> T:
        """Run `work` under the timer: where it runs out, SIGPROF ends this process."""
        signal.setitimer(signal.ITIMER_PROF, self._cpu_seconds)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def render(self, request: dict[str, Any]) -> str:
        """The text of one conversation."""
        return self.limited(lambda: self._render(request))

    def _render(self, request: dict[str, Any]) -> str:
        parts, n_chars = [], 0
        for part in self._template.generate(**self._tokens, **request, tools=None, documents=None):
            n_chars += len(part)
            if n_chars > self._max_chars:
                raise jinja2.TemplateError(f"its text has more than {self._max_chars} characters")
            parts.append(part)
        return "".join(parts)


def limit_memory(extra_bytes: int) -> None:
    """Let the address space grow by `extra_bytes` from here, and no further; no core files."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answer frames until the other side closes."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing but frames on the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    renderer = None
    while (frame := read_frame(source)) is not None:
        try:
            if renderer is None:
                limit_memory(frame["extra_bytes"])
                renderer = Renderer(frame)
                answer = {"text": ""}
            else:
                answer = {"text": renderer.render(frame)}
        except Exception as e:
            answer = {"error": explain(e)[:1000]}
        write_frame(sink, answer)


if __name__ == "__main__":
    main()
