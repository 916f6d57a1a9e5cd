"""The `llm` program, told of the worker in its file of models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from target import BASE, KEY


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    home = tmp_path_factory.mktemp("llm")
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: any\n  api_base: {BASE}\n  api_key_name: here\n"
        f"- model_id: here-text\n  model_name: any\n  api_base: {BASE}\n  api_key_name: here\n  completion: true\n"
    )
    program = Path(sys.executable).parent / "llm"

    def run(*args, text=None):
        env = {**os.environ, "LLM_USER_PATH": str(home)}
        done = subprocess.run(
            [program, *args], capture_output=True, text=True, timeout=60, env=env, input=text, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("keys", "set", "here", "--value", KEY)
    return run


def test_it_answers_streamed_and_not(llm):
    options = ("-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "12")
    streamed = llm("Name a colour.", *options)
    assert streamed.strip() and llm("Name a colour.", "--no-stream", *options) == streamed


def test_a_conversation_goes_on(llm):
    llm("My name is Ada.", "-m", "here", "-o", "max_tokens", "8")
    assert llm("-c", "What is my name?", "-o", "max_tokens", "8").strip()


def test_plain_completion_with_text_from_a_pipe(llm):
    assert llm("-m", "here-text", "-o", "max_tokens", "8", text="Once upon a time").strip()
