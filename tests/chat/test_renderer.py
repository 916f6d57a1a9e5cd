"""The process that renders templates, spoken to by hand: frames in, frames out, one line for everything that fails."""

from __future__ import annotations

import datetime
import io
import json
import signal
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
    said = b"".join(map(renderer.as_frame, frames))
    done = subprocess.run(
        # by its name, by which coverage knows it
        [sys.executable, "-m", "worker_orcd.chat.renderer"], input=said, capture_output=True, timeout=60,
        check=True)  # fmt: skip
    assert done.stderr == b""
    answers, stream = [], io.BytesIO(done.stdout)
    while (answer := renderer.read_frame(stream)) is not None:
        answers.append(answer)
    assert answers[0] == {"ready": True}
    assert len(answers) == len(frames) + 1
    return answers[1:]


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    """Answers by what was asked, all of one process."""
    asks = ["hello", "refuse", "undefined", "change", "divide", "recurse", "fill", "write", "json", "year", "break"]
    ready, *rest = talk(SETUP, *map(asked, asks), asked("with a prompt", True))
    assert ready == {"text": "", "origins": ""}
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
    assert answers[what]["text"] == text
    assert len(answers[what]["origins"]) == len(text)


def test_origins_tell_whose_a_character_is(answers):
    assert answers["hello"]["origins"] == "tttuuuuutttt"


def test_a_conversation_without_content_and_one_of_parts_are_rendered():
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "you"}]
    null, listed = ({"messages": [{"role": "assistant", "content": c}]} for c in (None, parts))
    answers = talk({**SETUP, "template": "{{ '>' + messages[0].content }}"}, null, listed)
    assert [a["text"] for a in answers] == ["", ">", ">hello\nyou"]


def test_text_that_is_no_unicode_is_an_error_of_the_template():
    (answer,) = talk({**SETUP, "template": "{{ '\\ud800' }}"}, asked(""))[1:]
    assert answer["error"].startswith("failed with UnicodeEncodeError")


def test_memory_that_cannot_be_limited_is_not_the_fault_of_the_template(monkeypatch):
    def refuse(*_: object) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(renderer.resource, "setrlimit", refuse)
    made, frame = renderer.answer(None, SETUP)
    assert made is None
    assert renderer.read_frame(io.BytesIO(frame)) == {"fault": "its memory cannot be limited: not allowed"}


def test_memory_stays_below_a_limit_that_is_there(monkeypatch):
    limits = {}
    monkeypatch.setattr(renderer.resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr(renderer.resource, "setrlimit", limits.__setitem__)
    renderer.limit_memory(64 << 20)
    assert limits[renderer.resource.RLIMIT_AS] == (1 << 20, 1 << 20)


def test_signals_that_the_starting_thread_blocks_still_end_a_template():
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    said = b"".join(map(renderer.as_frame, ({**SETUP, "template": endless, "cpu_seconds": 0.1}, asked(""))))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "worker_orcd.chat.renderer"], input=said, capture_output=True, timeout=60,
            check=False)  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert done.returncode == -signal.SIGPROF


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
    frame = {"text": "日本語 \U0001f600 \0 \n"}
    sent = renderer.as_frame(frame)
    assert int.from_bytes(sent[:4], "big") == len(json.dumps(frame, ensure_ascii=False).encode())
    assert renderer.read_frame(io.BytesIO(sent)) == frame
