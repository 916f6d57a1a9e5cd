"""docs/http.md against the routes of the application and the fields of POST /execute."""

from __future__ import annotations

from pathlib import Path

from worker_orcd import SamplingParams
from worker_orcd.config import (
    DEFAULT_MAX_TOKENS,
    MAX_JOB_ID_CHARS,
    MAX_PROMPT_CHARS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
)
from worker_orcd.runtime.request import HTTP_FIELDS
from worker_orcd.wsgi.app import ROUTES
from worker_orcd.wsgi.native.execute import ExecuteBody

TEXT = "\n" + (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    lines = TEXT.split(f"\n{heading}\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next(i for i, line in enumerate(lines[first:], first) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]]


def test_every_route_has_its_row():
    served = {
        f"`{method} {path}`"
        for path, resource in ROUTES
        for method, responder in (("GET", "on_get"), ("POST", "on_post"))
        if hasattr(resource, responder)
    }
    assert len(served) == len(ROUTES) and {row[0] for row in rows("# HTTP API")} == served


def test_every_field_of_execute_has_its_row():
    table = {row[0].strip("`"): row[1:] for row in rows("## POST /execute")}
    assert list(table) == ["job_id", "prompt", *HTTP_FIELDS] == list(ExecuteBody.__struct_fields__)
    defaults = SamplingParams()
    special = {"max_tokens": f"{DEFAULT_MAX_TOKENS}, or", "stop": "`[]`", "seed": "made up"}
    for name in HTTP_FIELDS:
        assert table[name][1].startswith(special.get(name, str(getattr(defaults, name)))), name
    assert f"1-{MAX_JOB_ID_CHARS} characters" in table["job_id"][0]
    assert f"1-{MAX_PROMPT_CHARS:,} characters" in table["prompt"][0]
    assert f"up to {MAX_STOPS} strings of at most {MAX_STOP_TOKENS} tokens" in table["stop"][0]


def test_the_switches_that_docs_name_are_there():
    from worker_orcd.cli.main import cli

    flags = {flag for parameter in cli.commands["serve"].params for flag in parameter.opts}
    named = {word for word in TEXT.replace("`", " ").split() if word.startswith("--")}
    assert named and named <= flags
