"""POST /v1/chat/completions with SmolLM2: chat.py, messages.py, the template, against tokenizer and runtime."""

from __future__ import annotations

import pytest

from service.openai.asking import CHAT, HELLO, joined, ok, refused, streamed
from worker_orcd import SamplingParams
from worker_orcd.errors import InvalidRequest
from worker_orcd.serving.prefix_cache import MIN_PART
from worker_orcd.wsgi.openai.messages import template_messages

SHORT = {"max_tokens": 8, "seed": 11}


def prompt_of(app, messages, **body):
    """The prompt that a body becomes, as text and as ids."""
    text = ok(app, "/apply-template", messages=messages, **body)["prompt"]
    ids = ok(app, "/tokenize", messages=messages, **body)["tokens"]
    assert app.service.llm().tokenizer.decode(ids) == text
    return text


def test_an_answer_has_openais_shape_and_the_runtimes_text(smollm2):
    whole = ok(smollm2, CHAT, messages=HELLO, **SHORT)
    expected = smollm2.service.llm().chat(HELLO, SamplingParams(**SHORT))
    assert whole["id"].startswith("chatcmpl-") and whole["object"] == "chat.completion"
    assert whole["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected.text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert whole["usage"]["prompt_tokens"] == expected.tokens_in and whole["usage"]["completion_tokens"] == 8
    assert ok(smollm2, CHAT, messages=HELLO, max_completion_tokens=3, max_tokens=7)["usage"]["completion_tokens"] == 3
    assert refused(smollm2, CHAT, messages=HELLO, max_completion_tokens=3, max_tokens=9999)["param"] == "max_tokens"


@pytest.mark.parametrize("end", [{"max_tokens": 150}, {"max_tokens": 150, "stop": ["."]}], ids=str)
def test_the_usage_of_a_second_turn_counts_the_answer_among_the_cached_tokens(smollm2, end):
    """As far as the text of the chat becomes the tokens that the model has read and drawn."""
    llm = smollm2.service.llm()
    chat = [{"role": "user", "content": f"Tell me a story about a ship. {len(end)}"}]
    first = ok(smollm2, CHAT, messages=chat, temperature=0, return_token_ids=True, **end)
    read = ok(smollm2, "/tokenize", messages=chat)["tokens"] + first["choices"][0]["token_ids"]
    chat += [first["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    asked = ok(smollm2, "/tokenize", messages=chat)["tokens"]
    common = next((i for i, (a, b) in enumerate(zip(read, asked, strict=False)) if a != b), len(read))
    assert common > first["usage"]["prompt_tokens"] + 10
    before = llm.stats()
    usage = ok(smollm2, CHAT, messages=chat, temperature=0, max_tokens=5)["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    print(f"{len(asked)} tokens, {common} of them read before, {cached} cached")
    assert common - MIN_PART <= cached <= common + 1, "but for a few at the start of a block, and the last drawn"
    after = llm.stats()
    assert usage["prompt_tokens"] == len(asked) == after.prefix_queries - before.prefix_queries
    assert cached == after.prefix_hits - before.prefix_hits


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}, {"return_token_ids": True}], ids=str)
def test_a_stream_says_what_a_whole_answer_says(smollm2, extra):
    body = {"messages": HELLO, "n": 2, **SHORT, **extra}
    whole = ok(smollm2, CHAT, **body)
    chunks = streamed(smollm2, CHAT, **body)
    assert [c["choices"][0]["delta"] for c in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert all(c["object"] == "chat.completion.chunk" for c in chunks)
    for choice, together in zip(whole["choices"], joined(chunks), strict=True):
        assert together["text"] == choice["message"]["content"]
        assert together["finish_reason"] == choice["finish_reason"]
        assert together["token_ids"] == choice.get("token_ids", [])
        assert together["logprobs"].get("content", []) == (choice["logprobs"] or {"content": []})["content"]
    assert whole["choices"][0] != whole["choices"][1]
    second = ok(smollm2, CHAT, messages=HELLO, max_tokens=8, seed=12)["choices"][0]["message"]
    assert whole["choices"][1]["message"] == second


def test_a_developer_is_the_system_where_the_template_knows_none(smollm2):
    by = [prompt_of(smollm2, [{"role": r, "content": "Be brief"}, *HELLO]) for r in ("system", "developer")]
    assert by[0] == by[1] and by[0].startswith("<|im_start|>system\nBe brief<|im_end|>")


def test_parts_refusals_names_and_tool_calls_of_the_history(smollm2):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
    history = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not"}]},
        {"role": "user", "content": "go on"},
    ]
    text = prompt_of(smollm2, history)
    assert "one" in text and "two" in text and "<|im_start|>tool\n4<|im_end|>" in text and "I will not" in text
    (_, told, *_) = template_messages(history)
    assert told["tool_calls"][0]["function"]["arguments"] == {"a": [1, "x"]}
    assert history[1]["tool_calls"][0]["function"]["arguments"] == '{"a": [1, "x"]}', "the caller's stays as it is"


@pytest.mark.parametrize("arguments", ["{", "[1]", "nan", "3", '{"a":' * 70 + "1" + "}" * 70, '{"a": NaN}'])
def test_arguments_that_are_no_object_are_refused_by_name(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(InvalidRequest) as caught:
        template_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert caught.value.fields["field"] == "messages[0].tool_calls[0].function.arguments"


def test_a_final_message_is_continued(smollm2):
    said = [*HELLO, {"role": "assistant", "content": "  Hello, my name "}]
    text = prompt_of(smollm2, said, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\n  Hello, my name ")
    whole = ok(smollm2, CHAT, messages=said, continue_final_message=True, **SHORT, return_token_ids=True)
    assert whole["prompt_token_ids"][-1] != smollm2.service.llm().tokenizer.eot_id
    parts = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    assert prompt_of(smollm2, parts, continue_final_message=True).endswith("assistant\nHello")
    # what another message says again is not where the last one ends
    twice = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab"}]
    assert prompt_of(smollm2, twice, continue_final_message=True).endswith("<|im_start|>assistant\nab")
    # an empty one begins its turn
    begun = [*HELLO, {"role": "assistant", "content": ""}]
    assert prompt_of(smollm2, begun, continue_final_message=True) == prompt_of(smollm2, HELLO)
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refused(smollm2, CHAT, messages=said, **both)["param"] == "continue_final_message"


def test_control_tokens_that_a_user_writes_stay_text(smollm2):
    tokenizer = smollm2.service.llm().tokenizer
    said = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    for body in ({}, {"continue_final_message": True}):
        ids = ok(smollm2, "/tokenize", messages=said, **body)["tokens"]
        controls = tokenizer.encode("<|im_end|>", special=True)
        plain = [{"role": m["role"], "content": "x"} for m in said]
        wanted = ok(smollm2, "/tokenize", messages=plain, **body)["tokens"]
        assert ids.count(controls[0]) == wanted.count(controls[0])


def test_add_generation_prompt_can_be_left_out(smollm2):
    text = prompt_of(smollm2, HELLO, add_generation_prompt=False)
    assert text.endswith("<|im_end|>\n") and prompt_of(smollm2, HELLO) == text + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "us er", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": "a\0b"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "\0"}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([*HELLO, {"role": "user", "content": [{"type": "input_audio"}]}], "messages[1].content[0].type"),
        ([{"role": "user", "content": "word " * 9000}], "messages"),
    ],
)
def test_messages_that_cannot_be_taken_are_refused_by_name(smollm2, messages, param):
    error = refused(smollm2, CHAT, messages=messages)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    if len(str(messages)) > 9000:
        assert error["code"] == "context_length_exceeded"


def test_variables_of_the_template(smollm2):
    for variables in ({"messages": []}, {"tools": []}, {"bos_token": "x"}, {"_x": 1}, {"a b": 1}):
        error = refused(smollm2, CHAT, messages=HELLO, chat_template_kwargs=variables)
        assert error["param"] == "chat_template_kwargs"
    assert refused(smollm2, CHAT, messages=HELLO, documents=[3])["param"] == "documents"
    ok(smollm2, CHAT, messages=HELLO, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low", **SHORT)
