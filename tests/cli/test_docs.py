"""Command lines that README, docs and examples show: the commands and flags that they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from worker_orcd.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]


def shown(page: Path) -> list[tuple[str, list[str]]]:
    """(command, its flags) of every `worker-orcd COMMAND ...` on a page; a backslash joins lines."""
    text = page.read_text().replace("\\\n", " ")
    calls = re.findall(r"worker-orcd ([a-z-]+)((?: [^\n`|]*)?)", text)
    return [(name, re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest)) for name, rest in calls if name in cli.commands]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_is_there(page):
    for name, flags in shown(page):
        known = {flag for option in cli.commands[name].params for flag in (*option.opts, *option.secondary_opts)}
        assert set(flags) <= {*known, "--help"}, name


def test_pages_show_every_command():
    assert {name for page in PAGES for name, _ in shown(page)} == set(cli.commands)
    assert sum(len(flags) for page in PAGES for _, flags in shown(page)) > 40
