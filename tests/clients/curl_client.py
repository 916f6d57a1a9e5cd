"""`curl`, as in examples that people copy."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

from target import BASE, KEY, MESSAGES, URL

CHAT = {"model": "any", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}


def curl(*args):
    done = subprocess.run(["curl", "-sS", *args], capture_output=True, timeout=60, check=True)
    return done.stdout.decode("utf-8")


def post(url, body, *more):
    head = ("-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json")
    return curl(*head, *more, "-d", json.dumps(body), url)


def test_chat():
    answer = json.loads(post(f"{BASE}/chat/completions", CHAT))
    assert answer["choices"][0]["message"]["content"]


def test_a_stream_is_lines_of_data_that_end_with_done():
    lines = post(f"{BASE}/chat/completions", {**CHAT, "stream": True}, "-N").split("\n\n")
    assert lines[-1] == "" and lines[-2] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-2])


def test_http_1_0_and_a_body_in_chunks():
    for how in (("--http1.0",), ("-H", "Transfer-Encoding: chunked")):
        assert json.loads(post(f"{BASE}/chat/completions", CHAT, *how))["choices"]


def test_a_bad_request_says_why():
    shown = post(f"{BASE}/chat/completions", {**CHAT, "temperature": "hot"}, "-w", "\n%{http_code}")
    body, status = shown.rsplit("\n", 1)
    error = json.loads(body)["error"]
    assert status == "400" and error["param"] == "temperature" and set(error) == {"message", "type", "param", "code"}


def test_tokens_there_and_back():
    ids = json.loads(post(f"{URL}/tokenize", {"prompt": "Hello, sea! 😀"}))["tokens"]
    assert json.loads(post(f"{URL}/detokenize", {"tokens": ids}))["prompt"] == "Hello, sea! 😀"


def test_a_template_is_applied():
    prompt = json.loads(post(f"{URL}/apply-template", {"messages": MESSAGES}))["prompt"]
    assert MESSAGES[0]["content"] in prompt and len(prompt) > len(MESSAGES[0]["content"])


def test_a_head_without_a_body():
    assert "HTTP/1.1 200" in curl("-I", f"{URL}/health")


def test_what_the_readme_shows_works():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^curl (http://127\.0\.0\.1:8080/v1/.*)$", text, re.MULTILINE)
    args = shlex.split(shown.replace("http://127.0.0.1:8080", URL))
    assert json.loads(curl(*args, "-H", f"Authorization: Bearer {KEY}"))["choices"][0]["message"]["content"]
