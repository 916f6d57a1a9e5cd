"""Chat templates: messages -> the prompt text of the model file's template, with what users wrote kept apart.

The template runs in a process of its own (renderer.py) with limits on time, memory and output, so that no template
can hang or fill this one. Users' text that looks like a control token is *marked* before rendering: one character that
occurs nowhere else is put inside it, so that only control tokens which the template itself wrote are found in the
result; `Tokenizer.apply_chat` takes the marks out again after looking.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any, cast

from worker_orcd.errors import InternalError, InvalidRequest

#: processor time of one rendering (published templates take about a millisecond)
CPU_SECONDS = 0.7
#: wall-clock time of one answer, for a renderer that sleeps or is starved
WALL_SECONDS = 20.0
#: memory that compiling and rendering may add
EXTRA_BYTES = 64 << 20
#: characters of a rendered prompt, and of the messages it is made of
MAX_CHARS = 1 << 20
#: containers within one another in a message (tool calls have arguments of any JSON)
MAX_DEPTH = 32

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: private-use characters that have no meaning in any text; the first that a conversation does not hold marks it
_MARKS = [chr(c) for c in range(0x10FF00, 0x10FFF0)]
_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "renderer.py")


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
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> tuple[str, str]:
        """The prompt text.

        Args:
            messages: dicts with `role` and `content` (and what else the template reads), in order.
            add_generation_prompt: end with the start of the assistant's turn.

        Returns:
            (text, mark): the text, and the character inside it that is to be removed once control tokens are found.

        Raises:
            InvalidRequest: the messages are malformed, the template refuses them, breaks the sandbox or its limits.
        """
        plain = _checked(messages)
        held = json.dumps(plain, ensure_ascii=False)
        if len(held) > MAX_CHARS:
            raise InvalidRequest(f"messages hold {len(held)} characters, limit {MAX_CHARS}", field="messages")
        mark = next((m for m in _MARKS if m not in held), None)
        if mark is None:
            raise InvalidRequest("messages hold every private-use character that could mark them", field="messages")
        marked = [{k: v if k == "role" else self._marker.mark(v, mark) for k, v in m.items()} for m in plain]
        request = {"messages": marked, "add_generation_prompt": bool(add_generation_prompt)}
        with self._lock:
            return self._ask(request), mark

    def _ask(self, request: dict[str, Any]) -> str:
        # a process forked from this one shares the pipes and must not use them
        if self._process is None or self._process.owner != os.getpid():
            process = _Process()
            self._check(process, process.ask(self._setup))
            self._process = process
        return self._check(self._process, self._process.ask(request))

    def _check(self, process: _Process, answer: dict[str, Any]) -> str:
        if "text" in answer:
            text: str = answer["text"]
            return text
        if not process.alive:
            self._process = None
        reason = " ".join(answer["error"].split())
        raise InvalidRequest(f"the chat template of {self._path} {reason}", field="messages")


def _checked(messages: object) -> list[dict[str, Any]]:
    """The messages as plain JSON values, or InvalidRequest naming what is wrong with which."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequest("messages must be a non-empty list", field="messages")
    out = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{where} must be an object with role and content", field=where)
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            reason = "must be 1 to 64 letters, digits, '_', '.' or '-'"
            raise InvalidRequest(f"{where}.role {reason}", field=f"{where}.role")
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise InvalidRequest(f"{where}.content must be a string or a list of parts", field=f"{where}.content")
        if message.get("content") is None and role != "assistant":  # an assistant may only call tools
            raise InvalidRequest(f"{where}.content is missing", field=f"{where}.content")
        out.append({str(k): _plain(v, where, MAX_DEPTH) for k, v in message.items()})
    return out


def _plain(value: object, where: str, depth: int) -> Any:
    if depth == 0:
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} levels deep", field=where)
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise InvalidRequest(f"{where} holds surrogate code points, which no UTF-8 text can", field=where)
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(k), where, depth - 1): _plain(v, where, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, where, depth - 1) for v in value]
    raise InvalidRequest(f"{where} holds a {type(value).__name__}, which is no JSON value", field=where)


class _Marker:
    """Puts a mark into every control token's text, and behind a text's end that could become one with what follows.

    Args:
        control_texts: texts of two or more characters (the mark goes between the first two).
    """

    def __init__(self, control_texts: Sequence[str]) -> None:
        longest_first = sorted(control_texts, key=len, reverse=True)
        self._found = re.compile(f"(?=(?:{'|'.join(map(re.escape, longest_first))}))(.)", re.DOTALL)
        self._prefixes = frozenset(t[:k] for t in control_texts for k in range(1, len(t)))
        self._longest = max(map(len, control_texts), default=0)

    def mark(self, value: Any, mark: str) -> Any:
        """A JSON value with every string in it marked."""
        if isinstance(value, str) and self._longest:
            tails = (value[-k:] for k in range(1, min(self._longest, len(value) + 1)))
            end = mark if any(t in self._prefixes for t in tails) else ""
            return self._found.sub(rf"\1{mark}", value) + end
        if isinstance(value, dict):
            return {self.mark(k, mark): self.mark(v, mark) for k, v in value.items()}
        if isinstance(value, list):
            return [self.mark(v, mark) for v in value]
        return value


class _Process:
    """A running renderer.py. Used under the lock of its template."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _SCRIPT],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        except OSError as e:
            raise InternalError(f"the process that renders chat templates cannot be started: {e}") from None
        # both are there: they were asked for
        self._stdin, self._stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        self._end = weakref.finalize(self, _end, self._process, (self._stdin, self._stdout), self.owner)

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._end.alive

    def ask(self, frame: dict[str, Any]) -> dict[str, Any]:
        """Send a frame and wait for its answer; `{"error": ...}` also where the process ended over it."""
        body = json.dumps(frame, ensure_ascii=False).encode()
        try:
            self._stdin.write(len(body).to_bytes(4, "big") + body)
            self._stdin.flush()
            deadline = time.monotonic() + WALL_SECONDS
            answer: dict[str, Any] = json.loads(self._read(int.from_bytes(self._read(4, deadline), "big"), deadline))
            return answer
        except TimeoutError:
            self._end()
            return {"error": f"did not finish within {WALL_SECONDS:g} s"}
        except (EOFError, BrokenPipeError):
            self._end()
            if self._process.returncode == -signal.SIGPROF:
                return {"error": f"needs more than {CPU_SECONDS:g} s of processor time"}
            return {"error": f"ended the process that renders it (status {self._process.returncode})"}

    def _read(self, n_bytes: int, deadline: float) -> bytes:
        fd, out = self._stdout.fileno(), bytearray()
        poll = select.poll()  # select() fails on file numbers from 1024 on, which a busy server has
        poll.register(fd, select.POLLIN)
        while len(out) < n_bytes:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(fd, n_bytes - len(out))
            if not part:
                raise EOFError
            out += part
        return bytes(out)


def _end(process: subprocess.Popen[bytes], pipes: tuple[IO[bytes], ...], owner: int) -> None:
    """Close the pipes and reap the process, in the process that started it only."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in pipes:
        try:
            pipe.close()
        except OSError:  # what could not be flushed is of no use to a process that ended
            pass
    process.wait()
