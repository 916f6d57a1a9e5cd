"""Hostile requests to /v1, and hostile chat templates, on a real server with a small model: S is what a client sends, C
what the template of a model file does."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import tiny_chat
from load_client.broken import shape_fault
from load_client.watch import sample

from service.client import Worker

pytestmark = pytest.mark.timeout(120)

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
TALK = [{"role": "user", "content": "fine"}]
#: by the first message: what the template does
TEMPLATE = """
{%- set what = messages[0]['content'] -%}
{%- if what == 'mro' %}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif what == 'globals' %}{{ cycler.__init__.__globals__.os.popen('id').read() }}
{%- elif what == 'format' %}{{ '{0.__class__.__init__.__globals__}'.format(messages) }}
{%- elif what == 'attr' %}{{ messages|attr('__class__')|attr('__base__') }}
{%- elif what == 'range' %}{% for i in range(10**9) %}{% set x = i %}{% endfor %}
{%- elif what == 'loops' %}{% for i in range(9999) %}{% for j in range(9999) %}{% set x = j %}{% endfor %}{% endfor %}
{%- elif what == 'power' %}{% set n = 10 %}{{ n ** (n ** n) % 7 }}
{%- elif what == 'macro' %}{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}
{%- elif what == 'output' %}{{ 'x' * (10 ** 9) }}
{%- elif what == 'many' %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}
{%- elif what == 'raise' %}{{ raise_exception('no such thing') }}
{%- else %}it says {{ what }}{% endif -%}
"""
ATTACKS = ("mro", "globals", "format", "attr", "range", "loops", "power", "macro", "output", "many", "raise")


@pytest.fixture(scope="module")
def worker(goldens_dir, tmp_path_factory):
    model = tiny_chat.write(goldens_dir, tmp_path_factory.mktemp("hostile"), 256, TEMPLATE)
    command = [sys.executable, "-m", "worker_orcd", "serve", "--device", "cpu", "--port", "0", "--model", str(model)]
    worker = Worker([*command, "--max-tokens-out", "16"])
    yield worker
    code, seconds = worker.stop()
    worker.kill()
    assert code == 0 and seconds < 5
    assert not worker.events("error") and "Traceback" not in "".join(worker.raw_log)


def ask(worker, path, body):
    """(status, object) of a POST of JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, headers, text = worker.request("POST", path, data, {"Content-Type": "application/json"})
    if status >= 400:
        assert not shape_fault("/v1/" if path.startswith("/v1") else path, status, headers["Content-Type"], text) or (
            not shape_fault("/v1/", status, headers["Content-Type"], text)
        ), text
    return status, json.loads(text)


def speaks(worker):
    status, answer = ask(worker, CHAT, {"messages": TALK, "max_tokens": 2, "ignore_eos": True})
    return status == 200 and answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("what", ATTACKS)
def test_c1_c2_a_hostile_template_is_one_error_and_holds_up_nobody(worker, what):
    before = sample(worker.process.pid)
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        attack = pool.submit(ask, worker, CHAT, {"messages": [{"role": "user", "content": what}], "max_tokens": 1})
        assert worker.json("GET", "/health")[0] == 200
        assert ask(worker, COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200, "others wait"
        status, answer = attack.result()
        seconds = time.monotonic() - began
    print(f"{what}: {status} after {seconds:.2f} s: {str(answer)[:140]}")
    assert status == 400 and "uid=" not in str(answer)
    # an attribute that the sandbox does not give is undefined, so nothing is said: a prompt without a token
    assert ("prompt holds no token" if what == "attr" else "template") in answer["error"]["message"]
    after = sample(worker.process.pid)
    assert after.anon_kib - before.anon_kib < 64 << 10
    assert speaks(worker)


def test_c3_a_template_comes_from_the_file_alone(worker):
    evil = "{{ 'mine' }}"
    for more in ({"chat_template": evil}, {"chat_template_kwargs": {"chat_template": evil}}):
        status, answer = ask(worker, "/apply-template", {"messages": TALK, **more})
        assert status == 400 or answer["prompt"] == "it says fine"
    said = [e for e in worker.log if "chat_template_sha256" in e]
    assert said and len(said[0]["chat_template_sha256"]) == 64


NUMBERS = (-1, 1 << 70, -(1 << 70), "5", True, [], {}, 1.5, 1e300)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "field",
    [
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
        "top_k",
    ],
)
def test_s1_a_number_that_breaks_its_rule_is_named(worker, path, field):
    good = {"prompt": "a"} if path == COMPLETIONS else {"messages": TALK}
    fits = {"temperature": {1.5}, "presence_penalty": {-1, 1.5}, "frequency_penalty": {-1, 1.5}, "top_k": {-1}}
    refused = 0
    for value in NUMBERS:
        if value is not True and not isinstance(value, list | dict | str) and value in fits.get(field, set()):
            continue
        status, answer = ask(worker, path, {**good, field: value})
        assert status in (200, 400), answer
        if status == 400:
            refused += 1
            assert answer["error"]["param"] == field and field in answer["error"]["message"], answer
    assert refused >= len(NUMBERS) - 3
    for raw in ("NaN", "1e999", "-Infinity", "9" * 5000):
        body = json.dumps({**good, field: "@"}).replace('"@"', raw).encode()
        assert ask(worker, path, body)[0] == 400
    assert speaks(worker)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [512]}, "prompt"),
        (COMPLETIONS, {"prompt": [[0], [1 << 40]]}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [512]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"512": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        (DETOKENIZE, {"tokens": [-1]}, "tokens"),
        (DETOKENIZE, {"tokens": [512]}, "tokens"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 5}, "stop"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages"),
        (CHAT, {"messages": "a"}, "messages"),
        (CHAT, {}, "messages"),
    ],
)
def test_s2_s5_what_cannot_be_is_named(worker, path, body, param):
    status, answer = ask(worker, path, body)
    assert status == 400 and answer["error"]["param"].startswith(param), answer


#: what no string of JSON holds, which must be seen where nobody reads it too: in names and values of unknown fields
NO_TEXTS = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", rb"\ud800", b"a\nb", rb"\q")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, TOKENIZE, "/apply-template"])
def test_s3_bodies_that_are_no_flat_good_json(worker, path):
    good = {"prompt": "a", "messages": TALK, "max_tokens": 1}
    text = json.dumps(good)
    for body in (
        b"",
        b"nonsense",
        b"[]",
        text[:-1].encode(),
        text.encode("utf-16"),
        b"\xef\xbb\xbf" + text.encode(),
        text.replace('"a"', '"\\ud800"').replace("fine", "\\ud800").encode(),
        text.replace('"a"', '"\xff"').replace("fine", "\xff").encode("latin-1"),
        b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"prompt":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        text.replace('"max_tokens": 1', '"max_tokens": 1, "max_tokens": 2').encode(),
        *(text.replace('"max_tokens"', '"@": 1, "max_tokens"').encode().replace(b"@", raw) for raw in NO_TEXTS),
        *(text.replace('"max_tokens"', '"zork": ["@"], "max_tokens"').encode().replace(b"@", raw) for raw in NO_TEXTS),
        *(text.replace('"content"', '"zork": "@", "content"').encode().replace(b"@", raw) for raw in NO_TEXTS),
    ):
        status, answer = ask(worker, path, body)
        assert status == 400, (body[:60], answer)
    nul = text.replace('"a"', '"a\\u0000b"').replace("fine", "a\\u0000b").encode()
    assert ask(worker, path, nul)[0] in (200, 400)
    assert speaks(worker)
