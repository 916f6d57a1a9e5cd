"""The process that renders templates, spoken to by hand: frames in, frames out, one line for everything that fails."""

from __future__ import annotations

import datetime
import io
import json
import subprocess
import sys
from typing import Any

import pytest

from worker_orcd.chat import renderer

#: does what the first message says
TEMPLATE = """
{%- macro again() %}{{ again() }}{% endmacro %}
{%- set what = messages[0].content %}
{%- if what == 'refuse' %}{{ raise_exception('roles must alternate') }}
{%- elif what == 'undefined' %}{{ messages[0].tool.name }}
{%- elif what == 'change' %}{{ messages.append(1) }}
{%- elif what == 'divide' %}{{ 1 // 0 }}
{%- elif what == 'recurse' %}{{ again() }}
{%- elif what == 'fill' %}{% set s = [what * 1000] * 1000000 %}{{ s | join | length }}
{%- elif what == 'write' %}{% for i in range(1000) %}{{ i }} and {% endfor %}
{%- elif what == 'json' %}{{ messages | tojson }}
{%- elif what == 'year' %}{{ strftime_now('%Y') }}
{%- elif what == 'break' %}{% for i in range(9) %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}
{%- else %}{{ bos_token }}{{ what }}{{ eos_token }}{% if add_generation_prompt %}|{% endif %}{% endif %}"""
SETUP = {"template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>", "cpu_seconds": 5.0, "max_chars": 500,
         "extra_bytes": 256 << 20}  # fmt: skip


def asked(what: str, generate: bool = False) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": what}], "add_generation_prompt": generate}


def talk(*frames: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to `frames`, from a process that ends by itself when its input does."""
    said = io.BytesIO()
    for frame in frames:
        renderer.write_frame(said, frame)
    done = subprocess.run(
        # by its name, by which coverage knows it
        [sys.executable, "-m", "worker_orcd.chat.renderer"], input=said.getvalue(), capture_output=True, timeout=60,
        check=True)  # fmt: skip
    assert done.stderr == b""
    answers, stream = [], io.BytesIO(done.stdout)
    while (answer := renderer.read_frame(stream)) is not None:
        answers.append(answer)
    assert len(answers) == len(frames)
    return answers


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    """Answers by what was asked, all of one process."""
    asks = ["hello", "refuse", "undefined", "change", "divide", "recurse", "fill", "write", "json", "year", "break"]
    ready, *rest = talk(SETUP, *map(asked, asks), asked("with a prompt", True))
    assert ready == {"text": ""}
    return dict(zip([*asks, "prompt"], rest, strict=True))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("hello", "<s>hello</s>"),
        ("prompt", "<s>with a prompt</s>|"),
        ("json", '[{"role": "user", "content": "json"}]'),
        ("year", str(datetime.datetime.now().year)),
        ("break", "012"),
    ],
)
def test_texts(what: str, text: str, answers):
    assert answers[what] == {"text": text}


@pytest.mark.parametrize(
    ("what", "begins"),
    [
        ("refuse", "refuses the messages: roles must alternate"),
        ("undefined", "uses what the messages do not have: "),
        ("change", "does what a template must not do: "),
        ("divide", "failed with ZeroDivisionError: "),
        ("recurse", "nests or calls itself too deeply"),
        ("fill", "needs more memory than allowed"),
        ("write", "refuses the messages: its text has more than 500 characters"),
    ],
)
def test_errors_are_one_line_and_the_process_goes_on(what: str, begins: str, answers):
    assert list(answers[what]) == ["error"]
    assert answers[what]["error"].startswith(begins) and "\n" not in answers[what]["error"]


def test_a_template_with_a_syntax_error_is_refused_with_its_line():
    (answer,) = talk({**SETUP, "template": "fine\n{% if %}"})
    assert answer["error"].startswith("has a syntax error in line 2: ")


@pytest.mark.parametrize("cut", [b"", b"\0\0", b"\0\0\0\0"])
def test_a_frame_that_is_cut_is_the_end(cut: bytes):
    assert renderer.read_frame(io.BytesIO(cut)) is None


def test_frames_hold_any_text():
    stream = io.BytesIO()
    frame = {"text": "日本語 \U0001f600 \0 \n"}
    renderer.write_frame(stream, frame)
    head = stream.getvalue()[:4]
    assert int.from_bytes(head, "big") == len(json.dumps(frame, ensure_ascii=False).encode())
    assert renderer.read_frame(io.BytesIO(stream.getvalue())) == frame
