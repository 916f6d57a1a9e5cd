"""What bodies may hold: fields.py, types.py, asked.py, bodies.py. Values as S1-S3 and S5 of bad input."""

from __future__ import annotations

import json
import time

import pytest

from service.openai.asking import CHAT, COMPLETIONS, HELLO, error_of, ok, post, refused
from worker_orcd.config import MAX_BODY_BYTES
from worker_orcd.errors import InvalidRequest
from worker_orcd.wsgi.openai import asked
from worker_orcd.wsgi.openai.bodies import MAX_DEPTH, MAX_TOLD, too_deep
from worker_orcd.wsgi.openai.fields import HARMLESS, REFUSED
from worker_orcd.wsgi.openai.ids import MAX_CHOICES
from worker_orcd.wsgi.openai.types import BODIES, ChatBody, CompletionBody

SAY = {COMPLETIONS: {"prompt": "say hi"}, CHAT: {"messages": [{"role": "user", "content": "say hi"}]}}
ROUTES = tuple(SAY)


def job_of(app):
    """The last job of the fake model."""
    return list(app.service.llm().jobs.values())[-1]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name_and_what_asks_for_nothing_is_taken(app, path, name):
    body = CompletionBody if path == COMPLETIONS else ChatBody
    if name not in body.__struct_fields__ or name in ("echo",):
        ok(app, path, **SAY[path], **{name: {"x": 1}})  # of the other route: not known here
        assert app.log[-1]["event"] != "refused"
        return
    for value in ("x", 1.5, {"type": "json_object"}, ["x"], True):
        if not any(type(value) is type(off) and value == off for off in REFUSED[name].off):
            error = refused(app, path, **SAY[path], **{name: value})
            assert error["param"] == name and name in error["message"]
    for off in (None, *REFUSED[name].off):
        ok(app, path, **SAY[path], **{name: off})


@pytest.mark.parametrize("path", ROUTES)
def test_harmless_fields_and_nulls_change_nothing(app, path):
    kind = CompletionBody if path == COMPLETIONS else ChatBody
    nulls = {name: None for name in kind.__struct_fields__ if name not in SAY[path]}
    plain = ok(app, path, **SAY[path])["choices"]
    assert ok(app, path, **SAY[path], **nulls)["choices"] == plain
    values = {name: {"a": ["b", {"c": None}]} for name in HARMLESS}
    assert ok(app, path, **SAY[path], **values)["choices"] == plain
    assert not [e for e in app.log if e["event"] == "field_ignored"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("name", "values"),
    {
        "n": (0, -1, MAX_CHOICES + 1, 1.5, "2", True, 1e300, 10**30),
        "max_tokens": (-1, 2049, 1.5, "3", False, 10**40),
        "temperature": (-0.1, 2.1, "1", True, 1e300),
        "top_p": (-0.1, 1.1, [], True),
        "top_k": (-2, 1000, 2.5, "x", 2**70),
        "min_p": (-1, 2, {}),
        "repetition_penalty": (0, -1, 2.5, "x"),
        "presence_penalty": (-2.1, 2.1, "x"),
        "frequency_penalty": (-2.1, 2.1, True),
        "seed": (1.5, 2**64, -(2**63) - 1, "1", True, 10**400),
        "stop": ("", [""], ["a"] * 5, [3], 3, "x" * 257, ["\x00"]),
        "logit_bias": ({"512": 1}, {"-1": 1}, {"x": 1}, {"01": 1}, {"1": 101}, {"1": "x"}, {"1.0": 1}, [], "x"),
        "min_tokens": (-1, 2049, 1.5, "x"),
        "stop_token_ids": ([512], [-1], ["x"], [1.5], [True], "x", 3),
        "bad_words": ([""], "x", [3], ["\x00"], ["y" * 40]),
        "ignore_eos": (1, "true"),
        "stream": (1, "true", []),
        "stream_options": (True, [], {"include_usage": 1}),
        "model": (3, [], True),
    }.items(),
)
def test_s1_values_that_break_their_rule_are_refused_by_name(app, path, name, values):
    for value in values:
        error = refused(app, path, **SAY[path], **{name: value})
        assert (error["param"] or "").split("[")[0] == name, (value, error)
        assert error["type"] == "invalid_request_error"
    assert not app.service.llm().jobs


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["x", 1], ["x", [1]], [[1], 2], [512], [-1], [1.5], [True], ["a", ""], "\x00", None, 3, {}]
)
def test_s2_s5_prompts_that_are_none(app, prompt):
    assert refused(app, COMPLETIONS, prompt=prompt)["param"] == "prompt"


def test_numbers_with_a_point_are_whole_where_they_are(app):
    ok(app, COMPLETIONS, prompt=[115.0, 97, 121, 32, 104, 105], n=2.0, max_tokens=4.0, top_k=-1, seed=-1)
    job = job_of(app)
    assert (job.params.max_tokens, job.params.top_k, job.params.seed) == (4, 0, 0), "the second choice: -1 + 1"


def test_prompts_and_choices_have_a_limit_together(app):
    assert refused(app, COMPLETIONS, prompt=["say hi"] * 65, n=2)["param"] == "n"
    assert refused(app, COMPLETIONS, prompt=["say hi"] * 129)["param"] == "prompt"
    error = refused(app, COMPLETIONS, prompt="say hi", n=97)  # 32 run, 64 wait
    assert error["param"] == "n" and "96" in error["message"]
    assert len(ok(app, COMPLETIONS, prompt=["say hi"] * 8, n=4)["choices"]) == 32


def test_the_servers_limits_hold_and_are_named(app):
    assert "2048" in refused(app, COMPLETIONS, prompt="say hi", max_tokens=3000)["message"]
    error = refused(app, COMPLETIONS, prompt="x" * 39_000, max_tokens=2000)
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    assert "maximum context length is 40000 tokens" in error["message"]
    error = refused(app, CHAT, messages=[{"role": "user", "content": "x" * 40_000}])
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    error = refused(app, CHAT, messages=[{"role": "user", "content": "x" * 39_000}], max_completion_tokens=2000)
    assert error["param"] == "max_completion_tokens"
    ok(app, COMPLETIONS, prompt="say hi")
    assert job_of(app).params.max_tokens == 2048
    ok(app, COMPLETIONS, prompt="say " + "x" * 39_900, max_tokens=None)
    assert job_of(app).params.max_tokens == 40_000 - 39_904, "what the context leaves"


def test_a_silent_request_gets_what_the_model_file_recommends_and_a_loud_one_what_it_says(app):
    app.service.llm().sampling_defaults = {"temperature": 0.3, "top_k": 20}
    ok(app, CHAT, messages=[{"role": "user", "content": "say hi"}], top_k=5)
    params = job_of(app).params
    assert (params.temperature, params.top_k, params.top_p) == (0.3, 5, 1.0)
    ok(app, CHAT, messages=[{"role": "user", "content": "say hi"}], temperature=1, top_k=-1)
    assert (job_of(app).params.temperature, job_of(app).params.top_k) == (1.0, 0)


def test_unknown_fields_are_told_once(app):
    for _ in range(2):
        ok(app, CHAT, messages=[{"role": "user", "content": "say hi"}], zork=1, thinking={"a": 1})
    ignored = [e for e in app.log if e["event"] == "field_ignored"]
    assert [(e["field"], e["path"]) for e in ignored] == [("thinking", CHAT), ("zork", CHAT)]
    ok(app, CHAT, **SAY[CHAT], **{"a secret sentence of a prompt": 1, "x" * 80: 2})
    assert "secret" not in app.out.getvalue() and "xxx" not in app.out.getvalue()
    ok(app, CHAT, **SAY[CHAT], **{f"f{i}": 1 for i in range(500)})
    assert len([e for e in app.log if e["event"] == "field_ignored"]) == MAX_TOLD


BODIES_THAT_ARE_NONE = {
    "empty": b"",
    "blank": b"  \n",
    "list": b"[]",
    "string": b'"x"',
    "null": b"null",
    "cut": b'{"prompt": "x"',
    "bom": b'\xef\xbb\xbf{"prompt": "x"}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "not utf-8": b'{"prompt": "\xff"}',
    "surrogate": rb'{"prompt": "\ud800"}',
    "surrogate in what is ignored": rb'{"prompt": "x", "zork": "\ud800"}',
    "not utf-8 in a name that is ignored": b'{"prompt": "x", "messages": [], "tokens": [1], "\xcfx": 4}',
    "not utf-8 in what is ignored": b'{"prompt": "x", "messages": [], "tokens": [1], "zork": "\xff"}',
    "a surrogate in what is ignored, in utf-8": b'{"prompt": "x", "tokens": [1], "zork": "\xed\xa0\x80"}',
    "a line break in what is ignored": b'{"prompt": "x", "messages": [], "tokens": [1], "zork": "a\nb"}',
    "an escape that is none in what is ignored": b'{"prompt": "x", "tokens": [1], "zork": "\\q"}',
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "huge": b'{"prompt": "x", "temperature": 1e999}',
    "huge in what is ignored": b'{"prompt": "x", "user": 1e999}',
    "digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "twice": b'{"prompt": "x", "prompt": "y"}',
    "twice inside": b'{"prompt": "x", "metadata": {"a": 1, "a": 2}}',
    "deep": b'{"prompt": "x", "metadata": ' + b"[" * 64 + b"]" * 64 + b"}",
    "very deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep and open": b'{"prompt": ' + b'{"a":' * 100_000,
}
#: those with a number that is wrong for a field which other routes do not know
OF_COMPLETIONS = [BODIES_THAT_ARE_NONE[name] for name in ("huge", "huge in what is ignored", "digits")]


@pytest.mark.parametrize("body", BODIES_THAT_ARE_NONE.values(), ids=BODIES_THAT_ARE_NONE)
def test_s3_bodies_that_are_none(app, body):
    others = () if body in OF_COMPLETIONS else ("/tokenize", "/detokenize", "/apply-template")
    for path in (COMPLETIONS, CHAT, *others):
        error_of(post(app, path, body))
    assert not app.service.llm().jobs


def test_depth_up_to_the_limit_is_taken(app):
    inner = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    body = b'{"prompt": "say hi", "metadata": ' + inner + b"}"
    assert post(app, COMPLETIONS, body).status_code == 200
    text = json.dumps({"prompt": "say " + "[{" * 5000 + '\\"' * 100}).encode()
    assert not too_deep(text) and post(app, COMPLETIONS, text).status_code == 200


HOSTILE = {
    "deep": b"[" * 500_000 + b"]" * 500_000,
    "open": b'{"a":' * 200_000,
    "open string": b'{"a":"' + b'\\"[[[' * 200_000,
    "open escape": b"[" * 70 + b'"' + b"\\\\" * 400_000 + b"\\",
    "pairs": b"[" + b"[]," * 300_000 + b"[]]",
    "quotes": b"[" * 70 + b'"' * 900_000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_depth_is_known_in_time_that_grows_with_the_body_alone(body):
    began = time.monotonic()
    too_deep(body)
    assert time.monotonic() - began < 2, "a quadratic one takes minutes"


@pytest.mark.parametrize(("body", "depth"), [(b"{}", 1), (b'[{"a":[]},[[[]]]]', 4), (b'{"a":"[[[[","b":[1,[2]]}', 3)])
def test_depth_is_counted_outside_of_strings(body, depth):
    assert not too_deep(body * 40, depth) and too_deep(body * 40, depth - 1)


def test_a_body_over_the_limit_is_413(app):
    body = json.dumps({"prompt": "x" * MAX_BODY_BYTES}).encode()
    error = error_of(post(app, COMPLETIONS, body), 413)
    assert error["type"] == "invalid_request_error"


def test_s5_prompts_longer_than_those_of_execute_are_taken(app):
    ok(app, COMPLETIONS, prompt="say " + "x" * 36_000)


def test_the_names_of_all_bodies_may_be_logged(app):
    refused(app, CHAT, **SAY[CHAT], tools=[{"type": "function"}])
    assert app.log[-1]["event"] == "refused" and app.log[-1]["field"] == "tools"
    refused(app, CHAT, messages=[{"role": "user"}])
    assert app.log[-1]["field"] == "messages" and len(BODIES) == 5
    post(app, COMPLETIONS, b'{"prompt": "x", "a sentence of mine": 1, "a sentence of mine": 2}')
    assert app.log[-1]["event"] == "refused" and "sentence" not in app.out.getvalue()


def test_seeds_of_choices():
    params = asked.SamplingParams(seed=2**64 - 2)
    assert [p.seed for p in asked.choices_of(params, 4)] == [2**64 - 2, 2**64 - 1, 0, 1]
    with pytest.raises(InvalidRequest, match="token ids"):
        asked._token_id("٣")
    assert HELLO[0]["role"] == "user"
