"""docs/openai.md against the structures: every field taken, refused or of no effect, the limits, the switches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from worker_orcd import SamplingParams
from worker_orcd.cli.main import cli
from worker_orcd.config import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS, MAX_STOPS
from worker_orcd.wsgi.app import ROUTES
from worker_orcd.wsgi.openai.asked import MAX_LOGPROBS_IN_ALL
from worker_orcd.wsgi.openai.fields import HARMLESS, REFUSED
from worker_orcd.wsgi.openai.ids import MAX_CHOICES
from worker_orcd.wsgi.openai.types import ChatFields, CompletionFields, SamplingFields

TEXT = "\n" + (Path(__file__).resolve().parents[3] / "docs" / "openai.md").read_text()


def rows(heading: str) -> dict[str, list[str]]:
    """The other cells of each row of the first table after a heading, by the name in its first."""
    lines = TEXT.split(f"\n{heading}\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next(i for i, line in enumerate(lines[first:], first) if not line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]]
    return {name.strip("`"): others for name, *others in cells}


def test_every_sampling_field_has_its_row():
    table = rows("## Sampling fields")
    assert list(table) == list(SamplingFields.__struct_fields__)
    defaults = SamplingParams()
    for name, (_, default) in table.items():
        value = getattr(defaults, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert default == str(value), name
    assert f"up to {MAX_STOPS}, each at most {MAX_STOP_CHARS} characters" in table["stop"][0]
    assert f"up to {MAX_LOGIT_BIAS:,}" in table["logit_bias"][0]
    assert f"up to {MAX_STOP_TOKEN_IDS} ids" in table["stop_token_ids"][0]
    assert f"1-{MAX_CHOICES} choices" in table["n"][0]


@pytest.mark.parametrize(
    ("heading", "kind", "logprobs"),
    [
        ("## POST /v1/completions", CompletionFields, "logprobs"),
        ("## POST /v1/chat/completions", ChatFields, "top_logprobs"),
    ],
)
def test_every_field_of_a_route_has_its_row(heading, kind, logprobs):
    table = rows(heading)
    own = [name for name in kind.__struct_fields__ if name not in SamplingFields.__struct_fields__]
    assert sorted(table) == sorted(own)
    assert f"0-{MAX_LOGPROBS} most likely" in table[logprobs][0]
    assert f"hold {MAX_LOGPROBS_IN_ALL:,} of them" in " ".join(TEXT.split())


def test_every_refused_field_has_its_row():
    table = rows("## Fields that are refused")
    assert list(table) == list(REFUSED)
    for name, (off,) in table.items():
        shown = re.findall(r"`(.*?)`", off)
        literal = {"false": False}
        values = [literal[one] if one in literal else eval(one) for one in shown]
        assert values == list(REFUSED[name].off), name


def test_every_field_without_effect_is_named():
    told = TEXT.split("Taken, and of no effect: ", 1)[1].split(".\n", 1)[0]
    assert tuple(re.findall(r"`(\w+)`", told)) == HARMLESS


def test_the_routes_and_switches_that_it_names_are_there():
    paths = {path.replace(":path}", "}") for path, _ in ROUTES}
    named = set(re.findall(r"`(?:GET|POST) (/[\w/{}.-]+)", TEXT))
    assert len(named) > 9 and named <= paths, named - paths
    flags = {flag for parameter in cli.commands["serve"].params for flag in parameter.opts}
    switches = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    assert switches and switches <= flags
