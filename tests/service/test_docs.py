"""docs/http.md against the application: routes, fields of POST /execute and GET /health, errors, events of the log."""

from __future__ import annotations

import io
import re
from pathlib import Path

from worker_orcd import SamplingParams, observe, wsgi
from worker_orcd.config import (
    DEFAULT_MAX_TOKENS,
    MAX_JOB_ID_CHARS,
    MAX_PROMPT_CHARS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    ServeConfig,
)
from worker_orcd.errors import InsufficientMemory, InsufficientVram, InvalidRequest, WorkerError
from worker_orcd.observe.events import EventLog
from worker_orcd.runtime.request import HTTP_FIELDS
from worker_orcd.wsgi.app import ROUTES
from worker_orcd.wsgi.native.execute import ExecuteBody
from worker_orcd.wsgi.service import Service, _facts

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


def section(heading: str) -> str:
    """What stands below a heading, up to the next one of its level."""
    return TEXT.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]


def test_everything_that_health_shows_is_named():
    service = Service(ServeConfig(model="m.gguf", device="cpu"), EventLog(io.StringIO()))
    shown = {*service.health()[1], *_facts(service.config, {}), "uptime_seconds"}
    named = set(re.findall(r"\w+", section("## GET /health")))
    assert len(shown) > 20 and shown <= named, shown - named


def test_every_event_of_the_log_is_named():
    sources = [path for room in (wsgi, observe) for path in Path(room.__file__).parent.rglob("*.py")]
    written = {name for path in sources for name in re.findall(r'\.(?:emit|line)\(\s*"(\w+)"', path.read_text())}
    named = set(re.findall(r"`(\w+)`", section("## Log")))
    assert {"startup", "execute_end", "log_lines_dropped"} <= written <= named, written - named


def test_every_error_that_a_client_can_meet_has_its_row():
    def kinds(of: type[WorkerError]) -> list[type[WorkerError]]:
        return [kind for sub in of.__subclasses__() for kind in (sub, *kinds(sub))]

    # a load ends with these, and nobody is answered before it has ended
    of_loads = {InsufficientVram, InsufficientMemory}
    status_of = {kind.code: kind.status for kind in (WorkerError, *kinds(WorkerError)) if kind not in of_loads}
    status_of["INVALID_REQUEST"] = InvalidRequest.status  # BodyTooLarge has another
    table = {code: row[1] for row in rows("## Errors") for code in re.findall(r"`([A-Z_]+)`", row[0]) if row[0]}
    assert {code: str(status) for code, status in status_of.items()} == table
