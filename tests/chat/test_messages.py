"""Messages are checked before a template sees them: content is text, everything else plain JSON."""

from __future__ import annotations

import collections
import enum

import numpy as np
import pytest

from worker_orcd.chat.messages import checked
from worker_orcd.errors import InvalidRequest

TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize("content", ["", "x", [TEXT], [TEXT, {**TEXT, "cache_control": {"a": [1]}}], (TEXT,), []])
def test_content_is_a_string_or_a_list_of_text_parts(content):
    (message,) = checked([{"role": "user", "content": content}])
    assert message == {"role": "user", "content": list(content) if isinstance(content, tuple) else content}


@pytest.mark.parametrize(
    ("content", "field", "says"),
    [
        ([TEXT, {"type": "image_url", "image_url": {"url": "x"}}], ".content[1].type", "'image_url'"),
        ([{"type": "input_audio"}], ".content[0].type", "'input_audio'"),
        ([{"type": "x\n" * 100}], ".content[0].type", "only parts of type 'text' are taken"),
        ([{"type": None, "text": "x"}], ".content[0].type", "missing"),
        ([{"text": "x"}], ".content[0].type", "missing"),
        ([{"type": "text"}], ".content[0].text", "must be a string"),
        ([{"type": "text", "text": 5}], ".content[0].text", "must be a string"),
        ([{"type": "text", "text": None}], ".content[0].text", "must be a string"),
        ([TEXT, "x"], ".content[1]", "must be an object"), ([["x"]], ".content[0]", "must be an object"),
        ([5], ".content[0]", "must be an object"), ([None], ".content[0]", "must be an object"),
        (5, ".content", "must be a string or a list"), (True, ".content", "must be a string or a list"),
        ({"text": "x"}, ".content", "must be a string or a list"), (b"x", ".content", "must be a string or a list"),
        (None, ".content", "is missing"), ([{**TEXT, "x": b""}], "", "holds a bytes"),
    ],
)  # fmt: skip
def test_other_content_is_refused_by_name(content, field, says):
    with pytest.raises(InvalidRequest) as caught:
        checked([{"role": "user", "content": "x"}, {"role": "user", "content": content}])
    assert caught.value.fields["field"] == f"messages[1]{field}"
    assert says in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 300


def test_an_assistant_may_have_no_content():
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}, {"role": "assistant"}]
    assert checked(calls) == calls


def test_keys_that_are_null_are_absent():
    message = {"role": "assistant", "content": None, "tool_calls": None, "name": None, "refusal": None}
    assert checked([message]) == [{"role": "assistant", "content": None}]
    inner = {"role": "user", "content": "x", "extra": {"kept": None}}
    assert checked([inner]) == [inner]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_what_was_thought_has_the_names_that_templates_read(name):
    (message,) = checked([{"role": "assistant", "content": "x", name: "hm", "tool_calls": None}])
    assert message == {"role": "assistant", "content": "x", name: "hm", "thinking": "hm", "reasoning_content": "hm"}


def test_numbers_of_numpy_are_numbers():
    (message,) = checked([{"role": "user", "content": "x", "n": [np.int64(3), np.float32(0.5), np.uint8(7)]}])
    assert message["n"] == [3, 0.5, 7]
    assert [type(n) for n in message["n"]] == [int, float, int]


def test_values_become_plain():
    class Role(str, enum.Enum):  # noqa: UP042 - whose text is not its value
        USER = "user"

    message = collections.OrderedDict(role=Role.USER, content="x", extra=(1, {2: 2.5}))
    (plain,) = checked((message,))
    assert plain == {"role": "user", "content": "x", "extra": [1, {"2": 2.5}]}
    assert type(plain) is dict
    assert type(plain["role"]) is str


@pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["huge", "negative"])
def test_numbers_that_json_cannot_carry_are_refused(value):
    with pytest.raises(InvalidRequest, match="more than 1024 bits"):
        checked([{"role": "user", "content": "x", "extra": value}])
