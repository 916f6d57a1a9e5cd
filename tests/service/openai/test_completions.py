"""POST /v1/completions on the CPU engine (completions.py, asked.py, generation.py, heads.py, answers.py) against
the runtime."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.openai.asking import COMPLETIONS, joined, ok, refused, streamed
from worker_orcd import SamplingParams

PROMPT = "The quick brown fox"
DRAWN = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, top_k=40, seed=7)
BODY = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 7}


def generated(app, prompt, params):
    llm = app.service.llm()
    return llm.generate([prompt], params)[0]


def test_an_answer_has_openais_shape_and_the_runtimes_text(tiny):
    whole = ok(tiny, COMPLETIONS, prompt=PROMPT, **BODY)
    expected = generated(tiny, PROMPT, DRAWN)
    assert whole["id"].startswith("cmpl-") and whole["object"] == "text_completion"
    assert whole["model"] == tiny.service.model and whole["system_fingerprint"].startswith("fp_")
    assert abs(whole["created"] - 1e-9) > 1e9
    assert whole["choices"] == [
        {
            "index": 0,
            "text": expected.text,
            "logprobs": None,
            "finish_reason": expected.finish_reason,
            "stop_reason": None,
        }
    ]
    n_in, n_out = expected.tokens_in, len(expected.token_ids)
    counts = {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}
    assert {**whole["usage"], "prompt_tokens_details": None} == {**counts, "prompt_tokens_details": None}
    assert 0 <= whole["usage"]["prompt_tokens_details"]["cached_tokens"] < n_in


def test_choices_are_separate_requests_prompt_by_prompt(tiny):
    prompts = [[1, 2, 3], [400, 5], [77] * 30]
    whole = ok(tiny, COMPLETIONS, prompt=prompts, n=3, return_token_ids=True, **BODY)
    expected = [generated(tiny, p, replace(DRAWN, seed=7 + i)) for p in prompts for i in range(3)]
    assert [c["token_ids"] for c in whole["choices"]] == [list(e.token_ids) for e in expected]
    assert [c["text"] for c in whole["choices"]] == [e.text for e in expected]
    assert [c["prompt_token_ids"] for c in whole["choices"]] == [p for p in prompts for _ in range(3)]
    assert [c["index"] for c in whole["choices"]] == list(range(9))
    assert len({c["text"] for c in whole["choices"]}) > 3, "seeds make a difference"
    assert whole["usage"]["prompt_tokens"] == sum(map(len, prompts)), "each prompt counts once"
    assert whole["usage"]["completion_tokens"] == sum(len(e.token_ids) for e in expected)
    texts = ok(tiny, COMPLETIONS, prompt=["one", "two"], **BODY)
    alone = [ok(tiny, COMPLETIONS, prompt=p, **BODY)["choices"][0]["text"] for p in ("one", "two")]
    assert [c["text"] for c in texts["choices"]] == alone


def test_seeds_wrap_at_64_bits_and_negative_ones_are_taken(tiny):
    last = ok(tiny, COMPLETIONS, prompt=PROMPT, **{**BODY, "seed": 2**64 - 1}, n=2)["choices"]
    assert ok(tiny, COMPLETIONS, prompt=PROMPT, **{**BODY, "seed": -1}, n=2)["choices"] == last
    assert ok(tiny, COMPLETIONS, prompt=PROMPT, **{**BODY, "seed": 0})["choices"][0]["text"] == last[1]["text"]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 3},
        {"return_token_ids": True},
        {"max_tokens": 0, "echo": True},
    ],
    ids=str,
)
def test_a_stream_says_what_a_whole_answer_says(tiny, extra):
    body = {"prompt": [PROMPT, "日本"], "n": 2, **BODY, **extra}
    whole = ok(tiny, COMPLETIONS, **body)
    chunks = streamed(tiny, COMPLETIONS, **body)
    assert len({chunk["id"] for chunk in chunks}) == 1 and not any("usage" in chunk for chunk in chunks)
    for choice, together in zip(whole["choices"], joined(chunks), strict=True):
        assert together["text"] == choice["text"] and together["finish_reason"] == choice["finish_reason"]
        assert together["logprobs"] == (choice["logprobs"] or {})
        assert together["token_ids"] == choice.get("token_ids", [])


def test_usage_is_the_last_chunk_where_it_is_asked_for(tiny):
    body = {"prompt": PROMPT, **BODY}
    usage = ok(tiny, COMPLETIONS, **body)["usage"]
    *chunks, last = streamed(tiny, COMPLETIONS, **body, stream_options={"include_usage": True})
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    del usage["prompt_tokens_details"], last["usage"]["prompt_tokens_details"]
    assert last["usage"] == usage
    running = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c["usage"]["completion_tokens"] for c in streamed(tiny, COMPLETIONS, **body, stream_options=running)]
    assert counts == sorted(counts) and counts[-1] == usage["completion_tokens"] and len(set(counts)) > 2


def test_stop_strings_and_stop_tokens_end_the_text_and_are_told(tiny):
    full = generated(tiny, PROMPT, DRAWN)
    stop = full.text[3:6]
    (choice,) = ok(tiny, COMPLETIONS, prompt=PROMPT, stop=stop, **BODY)["choices"]
    assert choice["text"] == full.text[: full.text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    token = full.token_ids[4]
    (choice,) = ok(tiny, COMPLETIONS, prompt=PROMPT, stop_token_ids=[token], return_token_ids=True, **BODY)["choices"]
    assert choice["token_ids"] == list(full.token_ids[: full.token_ids.index(token)])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    chunks = streamed(tiny, COMPLETIONS, prompt=PROMPT, stop_token_ids=[token], **BODY)
    assert chunks[-1]["choices"][0]["stop_reason"] == token


def test_vllms_parameters_reach_the_sampler(tiny):
    expected = generated(
        tiny,
        PROMPT,
        replace(DRAWN, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.7, logit_bias={65: 5.0}),
    )
    (choice,) = ok(
        tiny,
        COMPLETIONS,
        prompt=PROMPT,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        logit_bias={"65": 5},
        **BODY,
    )["choices"]
    assert choice["text"] == expected.text != generated(tiny, PROMPT, DRAWN).text
    ends = {"logit_bias": {"511": 100}, "temperature": 0}
    (choice,) = ok(tiny, COMPLETIONS, prompt=PROMPT, **{**BODY, **ends})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    more = ok(tiny, COMPLETIONS, prompt=PROMPT, min_tokens=4, **{**BODY, **ends})["usage"]
    assert more["completion_tokens"] == 4
    more = ok(tiny, COMPLETIONS, prompt=PROMPT, ignore_eos=True, **{**BODY, **ends})["usage"]
    assert more["completion_tokens"] == 12
    word = "__("
    assert word in generated(tiny, [1, 2, 3], DRAWN).text
    assert word not in ok(tiny, COMPLETIONS, prompt=[1, 2, 3], bad_words=[word], **BODY)["choices"][0]["text"]


def test_what_looks_like_a_control_token_is_text_unless_the_caller_says_otherwise(tiny):
    llm = tiny.service.llm()
    control = llm.tokenizer.decode([511])
    for special in (False, True):
        whole = ok(tiny, COMPLETIONS, prompt=f"a{control}", parse_special=special, return_token_ids=True, max_tokens=1)
        assert whole["choices"][0]["prompt_token_ids"] == llm.tokenizer.encode(f"a{control}", special=special)
        assert (whole["choices"][0]["prompt_token_ids"][-1] == 511) == special


def test_nothing_is_generated_for_max_tokens_0(tiny):
    whole = ok(tiny, COMPLETIONS, prompt=[[5, 6], [70, 71]], max_tokens=0, echo=True)
    texts = [tiny.service.llm().tokenizer.decode(ids) for ids in ([5, 6], [70, 71])]
    assert [c["text"] for c in whole["choices"]] == texts
    assert whole["usage"]["completion_tokens"] == 0 and whole["choices"][0]["finish_reason"] == "length"
    assert refused(tiny, COMPLETIONS, prompt=PROMPT, max_tokens=0, bad_words=["\x00"])["param"] == "bad_words"
    chunks = streamed(tiny, COMPLETIONS, prompt=PROMPT, max_tokens=0, stream_options={"include_usage": True})
    assert [len(c["choices"]) for c in chunks] == [1, 0] and chunks[1]["usage"]["total_tokens"] > 0
