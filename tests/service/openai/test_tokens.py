"""POST /tokenize, /detokenize, /apply-template (tokens.py) and GET /v1/models (models.py) against the tokenizer."""

from __future__ import annotations

import pytest

from service.openai.asking import HELLO, error_of, ok, refused

TEXT = "naïve 日本 <|im_end|>"


def test_vllms_body(smollm2):
    tokenizer = smollm2.service.llm().tokenizer
    out = ok(smollm2, "/tokenize", model="m", prompt=TEXT, return_token_strs=True)
    ids = tokenizer.encode(TEXT, special=True)
    assert out["tokens"] == ids and out["count"] == len(ids) and out["max_model_len"] == 8192
    assert out["token_strs"] == [tokenizer.decode([i]) for i in ids]
    assert ok(smollm2, "/tokenize", prompt=TEXT, parse_special=False)["tokens"] == tokenizer.encode(TEXT)
    assert ok(smollm2, "/tokenize", messages=HELLO)["tokens"] == tokenizer.apply_chat(HELLO)
    assert ok(smollm2, "/tokenize", prompt="")["tokens"] == []


def test_llama_servers_body(smollm2):
    tokenizer = smollm2.service.llm().tokenizer
    assert ok(smollm2, "/tokenize", content=TEXT)["tokens"] == tokenizer.encode(TEXT, special=True, add_bos=False)
    assert ok(smollm2, "/tokenize", content=TEXT, parse_special=False)["tokens"] == tokenizer.encode(
        TEXT, add_bos=False
    )
    pieces = ok(smollm2, "/tokenize", content="日 👍", with_pieces=True)["tokens"]
    data = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(data).decode() == "日 👍" and any(isinstance(p["piece"], list) for p in pieces)


def test_text_of_ids_under_both_names(smollm2):
    ids = smollm2.service.llm().tokenizer.encode(TEXT)
    assert ok(smollm2, "/detokenize", tokens=ids) == {"prompt": TEXT, "content": TEXT}
    assert ok(smollm2, "/detokenize", tokens=[]) == {"prompt": "", "content": ""}


@pytest.mark.parametrize("ids", [[49152], [-1], [1.5], ["x"], [True], 3, None, [[1]]])
def test_s2_ids_that_are_none(smollm2, ids):
    assert refused(smollm2, "/detokenize", tokens=ids)["param"] == "tokens"


def test_one_of_the_three_is_needed(smollm2):
    for body in ({}, {"prompt": "x", "content": "y"}, {"prompt": "x", "messages": HELLO}):
        assert refused(smollm2, "/tokenize", **body)["param"] == "prompt"
    assert refused(smollm2, "/tokenize", messages=[])["param"] == "messages"
    for path in ("/tokenize", "/apply-template"):
        assert refused(smollm2, path, messages=HELLO, chat_template="{{ 1 }}")["param"] == "chat_template"
        assert refused(smollm2, path, messages=HELLO, tools=[{}])["param"] == "tools"


def test_a_model_without_a_template_says_so(tiny):
    for path in ("/apply-template", "/v1/chat/completions", "/tokenize"):
        assert refused(tiny, path, messages=HELLO)["param"] == "messages"


def test_special_tokens_and_the_template(smollm2):
    tokenizer = smollm2.service.llm().tokenizer
    info = smollm2.client.simulate_get("/tokenizer_info").json
    ids = ok(smollm2, "/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"]
    assert ids == [tokenizer.eos_id] and info["chat_template"] == tokenizer.chat_template
    assert info["bos_token"] == tokenizer.decode([tokenizer.bos_id])


def test_models(smollm2):
    out = smollm2.client.simulate_get("/v1/models").json
    (model,) = out["data"]
    assert out["object"] == "list" and model["object"] == "model" and model["owned_by"]
    assert model["id"] == smollm2.service.model and model["max_model_len"] == 8192 and model["created"] > 1e9
    assert smollm2.client.simulate_get(f"/v1/models/{model['id']}").json == model
    for other in ("x", "x/y", f"{model['id']}x"):
        error = error_of(smollm2.client.simulate_get(f"/v1/models/{other}"), 404)
        assert error["code"] == "model_not_found" and error["param"] == "model"
