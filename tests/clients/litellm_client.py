"""`litellm`, which many programs use to talk to many servers."""

from __future__ import annotations

import litellm
import pytest
from target import BASE, KEY, MESSAGES, PROMPT

ASK = {"api_base": BASE, "api_key": KEY, "temperature": 0, "max_tokens": 12}


def test_chat_streamed_and_not():
    whole = litellm.completion(model="openai/any", messages=MESSAGES, **ASK)
    assert whole.choices[0].message.content and whole.usage.completion_tokens == 12
    chunks = litellm.completion(model="openai/any", messages=MESSAGES, stream=True, **ASK)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_text_completion():
    answer = litellm.text_completion(model="text-completion-openai/any", prompt=PROMPT, **ASK)
    assert answer.choices[0].text and answer.usage.completion_tokens == 12


def test_hosted_vllm_with_its_extensions():
    answer = litellm.completion(
        model="hosted_vllm/any", messages=MESSAGES, extra_body={"top_k": 1, "min_p": 0.1}, **ASK
    )
    assert answer.choices[0].message.content


def test_errors_are_mapped():
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(model="openai/any", messages=MESSAGES, **{**ASK, "temperature": 9})
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(model="openai/any", messages=MESSAGES, **{**ASK, "api_key": "wrong"})
