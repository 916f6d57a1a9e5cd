"""The official `openai` client: what its users do."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path

import openai
import pytest
from target import BASE, KEY, MESSAGES, PROMPT, ask, nothing_runs, read

client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=60)
GREEDY = {"model": "any", "temperature": 0}


def complete(**more):
    return client.completions.create(**{"prompt": PROMPT, "max_tokens": 12, **GREEDY, **more})


def chat(**more):
    return client.chat.completions.create(**{"messages": MESSAGES, "max_tokens": 12, **GREEDY, **more})


def test_models():
    (model,) = client.models.list().data
    assert model.object == "model" and model.id
    assert client.models.retrieve(model.id).id == model.id


def test_completion_and_usage():
    answer = complete()
    (choice,) = answer.choices
    assert choice.text and choice.finish_reason == "length" and choice.index == 0
    assert answer.object == "text_completion" and answer.id and answer.created > 1_700_000_000
    assert answer.usage.completion_tokens == 12 and answer.usage.prompt_tokens == len(
        ask("/tokenize", {"prompt": PROMPT})["tokens"]
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer.system_fingerprint and answer.system_fingerprint == complete().system_fingerprint


def test_streamed_completion_is_the_whole_one():
    whole = complete().choices[0]
    chunks = list(complete(stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.text
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length" and len({c.id for c in chunks}) == 1


def test_streamed_usage():
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])


def test_it_is_the_text_of_execute():
    fields = {"job_id": "clients", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    pieces = [
        json.loads(line[6:])["t"] for line in read("/execute", fields).split("\n") if line.startswith('data: {"t"')
    ]
    assert "".join(pieces) == complete().choices[0].text


def test_prompts_as_text_ids_and_lists():
    ids = ask("/tokenize", {"prompt": PROMPT})["tokens"]
    alone = complete().choices[0].text
    assert complete(prompt=ids).choices[0].text == alone
    both = complete(prompt=[PROMPT, "The capital of France is"])
    assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == alone
    assert [c.text for c in complete(prompt=[ids, ids]).choices] == [alone, alone]


def test_echo():
    answer = complete(echo=True)
    assert answer.choices[0].text == PROMPT + complete().choices[0].text


def test_n_2_draws_with_seed_and_seed_plus_1():
    answer = complete(n=2, temperature=1.0, seed=7)
    assert [c.index for c in answer.choices] == [0, 1]
    alone = [complete(temperature=1.0, seed=seed).choices[0].text for seed in (7, 8)]
    assert [c.text for c in answer.choices] == alone and alone[0] != alone[1]
    assert answer.usage.completion_tokens == 24
    streamed = ["", ""]
    for chunk in complete(n=2, temperature=1.0, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == alone


def test_stop():
    text = complete().choices[0].text
    word = text.split()[2]
    answer = complete(stop=[word])
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == text[: text.index(word)]
    assert complete(stop=word).choices[0].text == answer.choices[0].text


def test_logprobs_of_completions():
    given = complete(logprobs=3).choices[0]
    assert "".join(given.logprobs.tokens) == given.text and len(given.logprobs.token_logprobs) == 12
    assert given.logprobs.text_offset[0] == 0
    for chosen, top in zip(given.logprobs.token_logprobs, given.logprobs.top_logprobs, strict=True):
        assert math.isclose(max(top.values()), chosen, abs_tol=1e-6), "greedy takes the most likely token"
    whole = complete(logprobs=0, echo=True).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text and whole.logprobs.token_logprobs[0] is None
    assert whole.logprobs.token_logprobs[-12:] == given.logprobs.token_logprobs


def test_chat():
    answer = chat()
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content and answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 12
    chunks = list(chat(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    short = chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=3)
    assert short.usage.completion_tokens == 3


def test_parts_of_text_are_one_text():
    first, second = "Say a short sentence", "about the sea."
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in (first, second)]}]
    answers = {
        chat(messages=[{"role": "user", "content": first + between + second}]).choices[0].message.content
        for between in ("", "\n")
    }
    assert chat(messages=parts).choices[0].message.content in answers


def test_chat_logprobs():
    answer = chat(logprobs=True, top_logprobs=2).choices[0]
    tokens = answer.logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == answer.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 2 and math.isclose(token.top_logprobs[0].logprob, token.logprob, abs_tol=1e-6)
    streamed = [
        t
        for c in chat(logprobs=True, top_logprobs=2, stream=True)
        if c.choices[0].logprobs
        for t in c.choices[0].logprobs.content
    ]
    assert [t.logprob for t in streamed] == [t.logprob for t in tokens]


def test_penalties_bias_and_extensions():
    plain = complete(max_tokens=40).choices[0].text
    assert complete(max_tokens=40, frequency_penalty=1.5, presence_penalty=1.0).choices[0].text != plain
    token = ask("/tokenize", {"prompt": " the"})["tokens"][0]
    forced = complete(logit_bias={str(token): 100}, max_tokens=4)
    assert forced.choices[0].text == " the" * 4
    more = {"top_k": 1, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 3, "bad_words": [" the"]}
    assert " the" not in complete(temperature=1.0, seed=3, extra_body=more).choices[0].text
    ended = complete(
        extra_body={"stop_token_ids": [token], "ignore_eos": True, "return_token_ids": True}, max_tokens=60
    )
    assert ended.choices[0].finish_reason in ("stop", "length")


def test_raw_answers_carry_a_correlation_id():
    raw = client.completions.with_raw_response.create(
        prompt="a", max_tokens=1, model="any", extra_headers={"X-Correlation-Id": "from-a-client"}
    )
    assert raw.headers["x-correlation-id"] == "from-a-client" and raw.parse().choices


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"top_p": "x"}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_field_is_a_bad_request_error_that_names_it(more, field):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(**more)
    error = refused.value
    assert error.status_code == 400 and error.param and error.param.startswith(field) and field in error.message, (
        error.body
    )


def test_what_is_not_built_yet_is_a_clear_400():
    for more in (
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(**more)
        assert refused.value.param in more, refused.value.body


def test_errors_have_their_classes():
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=BASE, api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="a")
    with pytest.raises(openai.APIStatusError) as too_large:
        complete(prompt="x" * (2 << 20))
    assert too_large.value.status_code == 413
    with pytest.raises(openai.BadRequestError):
        complete(prompt="word " * 20_000)  # past the context
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(
            prompt=PROMPT, max_tokens=2000, **GREEDY, extra_body={"ignore_eos": True}
        )
    assert nothing_runs(), "the job of a client that gave up goes on"
    assert complete().choices[0].text


def test_closing_a_stream_cancels():
    stream = complete(stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert nothing_runs(), "the job goes on"
    with complete(stream=True, max_tokens=2000, extra_body={"ignore_eos": True}) as stream:
        for n, _ in enumerate(stream):
            if n == 3:
                break
    assert nothing_runs(), "the job goes on"


async def _async_work():
    asynchronous = openai.AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=60)
    expected = [complete(temperature=1.0, seed=n).choices[0].text for n in range(6)]
    calls = [
        asynchronous.completions.create(prompt=PROMPT, max_tokens=12, model="any", temperature=1.0, seed=n)
        for n in range(6)
    ]
    assert [a.choices[0].text for a in await asyncio.gather(*calls)] == expected

    async def streamed(n):
        stream = await asynchronous.chat.completions.create(
            messages=MESSAGES, model="any", stream=True, max_tokens=12, temperature=1.0, seed=n
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    alone = [await streamed(n) for n in range(4)]
    assert await asyncio.gather(*(streamed(n) for n in range(4))) == alone
    call = asyncio.create_task(
        asynchronous.completions.create(prompt=PROMPT, max_tokens=2000, extra_body={"ignore_eos": True}, **GREEDY)
    )
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asynchronous.close()


def test_async_in_a_crowd_and_cancelled():
    asyncio.run(_async_work())
    assert nothing_runs(), "the job of a cancelled call goes on"


@pytest.mark.parametrize("page", ["README.md", "docs/openai.md"])
def test_what_the_page_shows_works(page, capsys):
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    (program,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import OpenAI" in code]
    assert "http://127.0.0.1:8080/v1" in program and 'api_key="none"' in program
    program = program.replace("http://127.0.0.1:8080/v1", BASE).replace('api_key="none"', f"api_key={KEY!r}")
    exec(compile(program, page, "exec"), {})
    assert capsys.readouterr().out.strip()
