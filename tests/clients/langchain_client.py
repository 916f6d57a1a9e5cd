"""LangChain's ChatOpenAI."""

from __future__ import annotations

import asyncio

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from target import BASE, KEY, PROMPT

chat = ChatOpenAI(base_url=BASE, api_key=KEY, model="any", temperature=0, max_tokens=12, max_retries=0)
TALK = [SystemMessage("Be short."), HumanMessage("Hi."), AIMessage("Hello."), HumanMessage("Name a colour.")]


def test_invoke_and_stream():
    answer = chat.invoke(TALK)
    assert answer.content and answer.usage_metadata["output_tokens"] <= 12
    assert "".join(chunk.content for chunk in chat.stream(TALK)) == answer.content


def test_batch_and_async():
    one = chat.invoke("Name a colour.").content
    assert [a.content for a in chat.batch(["Name a colour."] * 3)] == [one] * 3
    assert asyncio.run(chat.ainvoke("Name a colour.")).content == one


def test_stop_and_n():
    text = chat.invoke(TALK).content
    word = text.split()[-1]
    assert chat.invoke(TALK, stop=[word]).content == text[: text.index(word)]
    two = chat.generate([TALK], n=2, temperature=1.0, seed=1).generations[0]
    assert len(two) == 2


def test_logprobs():
    answer = chat.bind(logprobs=True).invoke(TALK)
    assert answer.response_metadata["logprobs"]["content"]


def test_plain_completions():
    llm = OpenAI(base_url=BASE, api_key=KEY, model="any", temperature=0, max_tokens=12)
    assert llm.invoke(PROMPT)
