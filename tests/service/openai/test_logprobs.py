"""Log-probabilities over /v1 (logprobs.py) and of given texts (score_job.py) against `LLM.logits` and top_logprobs."""

from __future__ import annotations

import json
import threading
import time

import pytest

from service.openai.asking import CHAT, COMPLETIONS, HELLO, ok, refused
from worker_orcd import SamplingParams
from worker_orcd.errors import Cancelled, InferenceTimeout
from worker_orcd.runtime.request import Request
from worker_orcd.serving.logprobs import top_logprobs
from worker_orcd.serving.score_job import ScoreJob

LONG = [int(x) for x in (37 * i % 500 for i in range(230))]


def expected_of(llm, ids, n_top):
    """What predicts each token, from the whole matrix."""
    logits = llm.logits(ids)
    return [None] + [top_logprobs(logits[i], ids[i + 1], n_top) for i in range(len(ids) - 1)]


@pytest.mark.parametrize("n_top", [0, 1, 5])
def test_a_score_job_gives_the_bits_that_the_logits_give(tiny, n_top):
    llm = tiny.service.llm()
    (job,) = llm.submit_requests([Request(LONG, score=n_top)])
    assert isinstance(job, ScoreJob) and job.completion().token_ids == () and job.tokens_in == len(LONG)
    expected = expected_of(llm, LONG, n_top)
    assert [None if d is None else list(d.items()) for d in job.prompt_logprobs] == [
        None if d is None else list(d.items()) for d in expected
    ]


def test_a_score_job_can_be_cancelled_and_has_a_deadline(tiny):
    llm = tiny.service.llm()
    before = [Request(LONG, score=20)] * 30  # whose turn comes first: else it might be done before it is ended
    for ended_by, last in (
        (Cancelled, Request(LONG, job_id="scored", score=20)),
        (InferenceTimeout, Request(LONG, score=20, deadline=time.monotonic())),
    ):
        *others, job = llm.submit_requests([*before, last])
        if ended_by is Cancelled:
            assert llm.cancel("scored") == "cancelling"
        with pytest.raises(ended_by):
            job.completion()
        for other in others:
            other.cancel()
    after = llm.submit_requests([Request(LONG[:3], score=0)])[0]
    assert after.completion().finish_reason == "length" and len(after.prompt_logprobs) == 3


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_as_lm_eval_reads_it(tiny, max_tokens, stop_early):
    """lm-eval takes token_logprobs[len(context):-1] of an echo with one token more, which may end the text."""
    llm = tiny.service.llm()
    bias = {"logit_bias": {"511": 100}} if stop_early else {}
    body = {"prompt": [LONG, LONG[:7]], "max_tokens": max_tokens, "echo": True, "logprobs": 1, "temperature": 0, **bias}
    whole = ok(tiny, COMPLETIONS, **body)
    for choice, ids in zip(whole["choices"], (LONG, LONG[:7]), strict=True):
        found = choice["logprobs"]
        expected = expected_of(llm, ids, 1)
        assert {len(values) for values in found.values()} == {len(ids) + max_tokens}
        assert found["token_logprobs"][: len(ids)] == [
            None if d is None else d[i] for d, i in zip(expected, ids, strict=True)
        ]
        best = [None if top is None else max(top.values()) for top in found["top_logprobs"][: len(ids)]]
        assert best == [None if d is None else max(d.values()) for d in expected]
        if max_tokens:
            logits = llm.logits(ids)[-1]
            drawn = 511 if stop_early else int(logits.argmax())
            assert found["token_logprobs"][-1] == top_logprobs(logits, drawn, 1)[drawn]
            assert choice["finish_reason"] == ("stop" if stop_early else "length")


def test_offsets_and_names_of_tokens(tiny):
    prompt = "A — 日本語 👍 fox"
    body = {"prompt": prompt, "max_tokens": 24, "echo": True, "logprobs": 2, "seed": 5}
    (choice,) = ok(tiny, COMPLETIONS, **body)["choices"]
    found, text = choice["logprobs"], choice["text"]
    assert text.startswith(prompt) and found["text_offset"] == sorted(found["text_offset"])
    pieces = 0
    for at, token in zip(found["text_offset"], found["tokens"], strict=True):
        if token.startswith("bytes:"):
            pieces += 1
            with pytest.raises(UnicodeDecodeError):
                token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1").decode()
        else:
            assert text[at : at + len(token)] == token
    assert pieces > 3, "characters of several tokens"


@pytest.mark.parametrize("begin", [None, False])
def test_a_prompt_that_begins_with_the_text_of_a_control_token_has_it_in_its_offsets(tiny, smollm2, begin):
    for app in (tiny, smollm2):
        tokenizer = app.service.llm().tokenizer
        bos = tokenizer.token_bytes(tokenizer.bos_id).decode()
        body = {"prompt": f"{bos}user says hi", "add_special_tokens": begin, "parse_special": True}
        (choice,) = ok(app, COMPLETIONS, **body, max_tokens=2, echo=True, logprobs=0)["choices"]
        found, text = choice["logprobs"], choice["text"]
        assert text.startswith(body["prompt"])
        n_begin = int(begin is None and tokenizer.add_bos)
        assert found["tokens"][: n_begin + 1] == [bos] * (n_begin + 1)
        assert found["text_offset"][:n_begin] == [0] * n_begin
        _check_offsets(text, found, n_begin)


@pytest.mark.parametrize(
    "prompt", ["user says hi", "  user says", "<s>user  says", "<s> user<|end|>hi<|end|> hi", "a\u2581b"]
)
def test_spaces_that_the_tokenizer_adds_are_no_part_of_an_echo(phi3, prompt):
    body = {"prompt": prompt, "parse_special": True, "max_tokens": 0, "echo": True, "logprobs": 0}
    for begin in (True, False):
        (choice,) = ok(phi3, COMPLETIONS, **body, add_special_tokens=begin)["choices"]
        assert choice["text"] == prompt
        _check_offsets(prompt, choice["logprobs"], int(begin))


def _check_offsets(text, found, n_begin):
    """Every token stands where it is said to, but for a space that its tokenizer has put before it."""
    offsets, tokens = found["text_offset"][n_begin:], found["tokens"][n_begin:]
    assert offsets == sorted(offsets)
    for at, end, token in zip(offsets, [*offsets[1:], len(text)], tokens, strict=True):
        if not token.startswith("bytes:"):
            assert text[at : at + len(token)] == token or text[at:end].replace("\u2581", " ") in (token, token[1:])


def test_no_entry_is_added_where_a_stop_string_ended_the_text(tiny):
    body = {"prompt": LONG[:9], "max_tokens": 12, "seed": 3, "logprobs": 0, "return_token_ids": True}
    (full,) = ok(tiny, COMPLETIONS, **body)["choices"]
    (cut,) = ok(tiny, COMPLETIONS, **body, stop=full["text"][4:7])["choices"]
    assert cut["finish_reason"] == "stop"
    assert len(cut["logprobs"]["tokens"]) == len(cut["token_ids"]) < len(full["token_ids"])


def test_chat_has_bytes_and_the_likeliest_tokens(smollm2):
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = ok(smollm2, CHAT, **body, return_token_ids=True)
    llm = smollm2.service.llm()
    ids, new = whole["prompt_token_ids"], whole["choices"][0]["token_ids"]
    assert ids == llm.tokenizer.apply_chat(HELLO)
    found = whole["choices"][0]["logprobs"]
    assert found["refusal"] is None and len(found["content"]) == len(new) == 4
    (direct,) = llm.generate([ids], SamplingParams(max_tokens=4, temperature=0.0, logprobs=3))
    for token, entry, likely in zip(new, found["content"], direct.logprobs, strict=True):
        assert bytes(entry["bytes"]).decode() == entry["token"] == llm.tokenizer.decode([token])
        assert entry["logprob"] == likely[token]
        assert [t["logprob"] for t in entry["top_logprobs"]] == list(likely.values())[:3]
    plain = ok(smollm2, CHAT, **{**body, "top_logprobs": None})["choices"][0]["logprobs"]["content"]
    assert [e["top_logprobs"] for e in plain] == [[]] * 4 and [e["logprob"] for e in plain] == [
        e["logprob"] for e in found["content"]
    ]


def test_an_answer_of_too_many_logprobs_is_refused(smollm2):
    error = refused(smollm2, COMPLETIONS, prompt="x", n=32, max_tokens=2048, logprobs=20)
    assert error["param"] == "logprobs"


def test_top_logprobs_that_ask_for_something_need_logprobs(smollm2):
    body = {"messages": HELLO, "max_tokens": 1}
    for off in (None, False):
        assert refused(smollm2, CHAT, **body, logprobs=off, top_logprobs=1)["param"] == "top_logprobs"
        assert ok(smollm2, CHAT, **body, logprobs=off, top_logprobs=0)["choices"][0]["logprobs"] is None


def test_scores_wait_beside_running_jobs(tiny):
    """A score and generations at once: both get what they get alone."""
    body = {"prompt": LONG, "max_tokens": 8, "echo": True, "logprobs": 1, "seed": 1}
    alone = ok(tiny, COMPLETIONS, **body)["choices"]
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ok(tiny, COMPLETIONS, **body)["choices"])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.dumps(a) for a in answers] == [json.dumps(alone)] * 3
