"""docs/python.md against `LLM`: its arguments and methods, and what they give."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from worker_orcd import LLM, Completion, TextPiece
from worker_orcd.serving.job import Finished, Job, Timings

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text()


def rows(first: str) -> dict[str, list[str]]:
    """The table whose head has `first` in its first column: names of that column -> the other cells."""
    lines = TEXT.split(f"\n| {first} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: others for names, *others in cells for name in re.findall(r"`(\w+)(?:\(.*?\))?`", names)}


def test_every_argument_of_a_model_has_its_row():
    signature = inspect.signature(LLM.__init__).parameters
    table = rows("argument")
    assert list(table) == [name for name in signature if name != "self"]
    for name, (default, _) in table.items():
        value = signature[name].default
        if isinstance(value, bool | float) or name == "max_queue":
            assert default.strip("`") == str(value), name


def test_every_method_of_a_model_has_its_row():
    public = {name for name in dir(LLM) if not name.startswith("_")} | {"info", "tokenizer"}
    assert set(rows("method")) == public


def test_everything_that_a_result_holds_is_named():
    table = {name: set(re.findall(r"`(\w+)", others[0])) for name, others in rows("result").items()}
    for name, kind in (
        ("Completion", Completion),
        ("TextPiece", TextPiece),
        ("Finished", Finished),
        ("timings", Timings),
    ):
        assert table[name] == {field.name for field in dataclasses.fields(kind)}, name
    assert all(hasattr(Job, name) for name in ("state", "completion", "cancel", "next_event"))
    assert {name for name in table["Job"] if not hasattr(Job, name)} == {
        "job_id",
        "seed",
        "tokens_in",
        "cached_tokens",
        "outcome",
    }
    assert table["Job"] >= {"state", "tokens_out", "completion", "cancel"}
