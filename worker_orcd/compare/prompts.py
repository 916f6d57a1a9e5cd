"""The prompts of a comparison: a file of text, one prompt a line, or of JSON objects."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from worker_orcd.config import MAX_PROMPT_CHARS
from worker_orcd.errors import InvalidRequest, quoted

MAX_FILE_BYTES: Final = 16 << 20
MAX_PROMPTS: Final = 10_000


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what is asked; None where the file gives token ids.
        ids: token ids, where the file gives them.
        targets: strings that a continuation must not hold.
        line: its line in the file, from 1.
    """

    text: str | None
    ids: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    line: int = 0

    @property
    def label(self) -> str:
        """How a report shows it."""
        return self.text if self.text is not None else f"token ids {list(self.ids)}"


def read_prompts(path: str | os.PathLike[str], targets: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of a file.

    Args:
        path: a name that ends in ``.jsonl`` holds one object a line, ``{"prompt": text or [token ids], "targets":
            [strings]}`` with `targets` optional; any other file is text, one prompt a line. Empty lines are skipped.
        targets: target strings of every prompt, in addition to its own.

    Raises:
        InvalidRequest: the file cannot be read, is too large or holds no prompt; a line breaks a rule, named by number.
    """
    name = os.fsdecode(path)
    lines = _lines(name, "prompts")
    parse = _parse_json if name.endswith(".jsonl") else lambda line, where: Prompt(line)
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        p = parse(line, where)
        if p.text is not None and len(p.text) > MAX_PROMPT_CHARS:
            raise _bad(f"{where}: the prompt has {len(p.text)} characters, limit {MAX_PROMPT_CHARS}")
        prompts.append(Prompt(p.text, p.ids, tuple(dict.fromkeys((*targets, *p.targets))), number))
        if len(prompts) > MAX_PROMPTS:
            raise _bad(f"{name}: more than {MAX_PROMPTS} prompts")
    if not prompts:
        raise _bad(f"{name}: there is no prompt in it")
    return prompts


def read_targets(path: str | os.PathLike[str]) -> list[str]:
    """Target strings of a file, one a line; empty lines are skipped.

    Raises:
        InvalidRequest: the file cannot be read, is too large, or holds nothing.
    """
    targets = [line for line in _lines(os.fsdecode(path), "targets") if line.strip()]
    if not targets:
        raise _bad(f"{os.fsdecode(path)}: there is no target string in it", "targets")
    return targets


def _lines(path: str, field: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise _bad(f"{path}: larger than {MAX_FILE_BYTES} bytes", field)
        # not splitlines(): a prompt may hold U+2028 and the like
        return raw.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise _bad(f"{path}: {error.strerror or error}", field) from None
    except UnicodeDecodeError as error:
        raise _bad(f"{path}: no UTF-8 text (byte {error.start})", field) from None


def _parse_json(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{where}: no JSON: {error}") from None
    if not isinstance(entry, dict):
        raise _bad(f"{where}: must be an object")
    unknown = entry.keys() - {"prompt", "targets"}
    if unknown:
        raise _bad(f"{where}: unknown field {quoted(min(unknown))}")
    targets = entry.get("targets", [])
    if not (isinstance(targets, list) and all(isinstance(t, str) and t for t in targets)):
        raise _bad(f"{where}: targets must be a list of strings that are not empty")
    prompt = entry.get("prompt")
    if isinstance(prompt, str) and prompt:
        return Prompt(prompt, targets=tuple(targets))
    if isinstance(prompt, list) and prompt and all(map(_is_id, prompt)):
        return Prompt(None, tuple(prompt), tuple(targets))
    raise _bad(f"{where}: prompt must be text or a list of token ids, and not empty")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _bad(message: str, field: str = "prompts") -> InvalidRequest:
    return InvalidRequest(message, field=field)
