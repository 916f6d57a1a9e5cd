"""LLM on the CPU engine: what a prompt gets alone, it gets in any crowd and in any run; results agree with logits."""

from __future__ import annotations

import dataclasses
import os

import limits
import numpy as np
import pytest

from worker_orcd import LLM, SamplingParams
from worker_orcd.errors import InvalidRequest
from worker_orcd.serving.job import Finished

TEXTS = [
    "Hello",
    "def fib(n):\n",
    "The quick brown fox",
    "1, 2, 3,",
    "Once upon a time",
    "Dear Sir or Madam,",
    "import numpy as np\n",
    "日本語",
    "A haiku:",
    "SELECT * FROM",
    "The capital of France is",
    "x",
    "To be, or not",
    "Water boils at",
    "In the beginning God created",
    "def quicksort(values: list[int]) -> list[int]:\n    ",
]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, seed=42)
SEEDED = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, top_k=40, repetition_penalty=1.1, seed=42)


def tiny_prompts() -> list[list[int]]:
    """16 prompts of 1 to 136 tokens of a vocabulary of 512."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 500, 1 + 9 * i).tolist() for i in range(16)]


@pytest.fixture(scope="module", params=["llama-Q4_0", "qwen2-Q4_K_M"])
def tiny(request, goldens_dir):
    with LLM(goldens_dir / f"{request.param}.gguf", device="cpu", progress=False) as model:
        yield model


@pytest.fixture(scope="module")
def smollm2(model_path):
    with LLM(model_path("smollm2"), device="cpu", progress=False) as model:
        yield model


def check_crowd(model: LLM, prompts: list, params: SamplingParams, n_runs: int) -> None:
    """All prompts at once, several times, and each alone: the same ids and the same text."""
    alone = [model.generate([p], params)[0] for p in prompts]
    assert len({c.tokens_in for c in alone}) > 5 and len({c.token_ids for c in alone}) > 10
    for run in range(n_runs):
        crowd = model.generate(prompts, params)
        different = [
            i
            for i, (a, c) in enumerate(zip(alone, crowd, strict=True))
            if (a.token_ids, a.text, a.finish_reason) != (c.token_ids, c.text, c.finish_reason)
        ]
        assert not different, f"run {run}: prompts {different} differ from themselves alone"


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_sixteen_at_once_and_each_alone_tiny(tiny, params):
    check_crowd(tiny, tiny_prompts(), params, n_runs=10)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_sixteen_at_once_and_each_alone_smollm2(smollm2, params):
    check_crowd(smollm2, TEXTS, params, n_runs=1)


#: one for each field that changes what is drawn, greedy and drawn, and all of them at once
ASKED = [
    {"presence_penalty": 1.5}, {"frequency_penalty": 0.8}, {"frequency_penalty": -0.5, "presence_penalty": -0.2},
    {"logit_bias": {i: (i % 9) - 4.0 for i in range(500)}}, {"bad_words": [chr(c) for c in range(97, 123)]},
    {"min_tokens": 24, "stop_token_ids": list(range(100, 200))}, {"stop_token_ids": list(range(100, 120))},
]  # fmt: skip


@pytest.mark.parametrize("asked", [*ASKED, {k: v for asked in ASKED[2:6] for k, v in asked.items()}], ids="-".join)
def test_a_crowd_whatever_is_asked_for(tiny, asked):
    prompts = tiny_prompts()
    if tiny.tokenizer is None:
        asked = {name: value for name, value in asked.items() if name != "bad_words"}
    each = [dataclasses.replace((GREEDY, SEEDED)[i % 2], **asked) for i in range(len(prompts))]
    each[5] = SEEDED  # neighbours that ask for nothing
    alone = [tiny.generate([p], params)[0] for p, params in zip(prompts, each, strict=True)]
    crowd = tiny.generate(prompts, each)
    assert [(c.token_ids, c.finish_reason, c.stop_reason) for c in crowd] == [
        (a.token_ids, a.finish_reason, a.stop_reason) for a in alone
    ]
    with_logprobs = tiny.generate(prompts, [dataclasses.replace(p, logprobs=0) for p in each])
    assert [c.token_ids for c in with_logprobs] == [a.token_ids for a in alone], "step by step"
    if "min_tokens" in asked:
        assert all(len(c.token_ids) == 24 for i, c in enumerate(crowd) if i != 5)
    elif "stop_token_ids" in asked:
        reasons = {c.stop_reason for c in crowd}
        assert reasons - {None} and reasons <= {None, *asked["stop_token_ids"]}
    else:
        plain = tiny.generate(prompts, [(GREEDY, SEEDED)[i % 2] for i in range(len(prompts))])
        assert [c.token_ids for c in crowd] != [p.token_ids for p in plain] or "bad_words" in asked


def test_bad_words_are_not_in_the_text(smollm2):
    prompt, params = "The capital of France is", SamplingParams(max_tokens=24, temperature=0.0)
    (whole,) = smollm2.generate([prompt], params)
    words = whole.text.split()
    for banned in ([words[0]], words[:6], [" ".join(words[1:3])], ["the", "Paris", "city"]):
        (other,) = smollm2.generate([prompt], dataclasses.replace(params, bad_words=banned, ignore_eos=True))
        assert len(other.token_ids) == 24
        for word in banned:
            ids = [smollm2.tokenizer.encode(text, add_bos=False) for text in (word, f" {word}")]
            assert all(list(other.token_ids[i : i + len(w)]) != w for w in ids for i in range(24)), word


def test_min_tokens_outlast_the_end_of_the_turn(smollm2):
    messages, params = [{"role": "user", "content": "Say hello."}], SamplingParams(max_tokens=80, temperature=0.0)
    first = smollm2.chat(messages, params)
    n = len(first.token_ids)
    assert first.finish_reason == "stop" and first.stop_reason is None and n < 60
    longer = smollm2.chat(messages, dataclasses.replace(params, min_tokens=n + 10))
    assert len(longer.token_ids) >= n + 10 and longer.token_ids[:n] == first.token_ids
    assert not set(longer.token_ids) & set(smollm2.tokenizer.stop_ids)
    same = smollm2.chat(messages, dataclasses.replace(params, min_tokens=n))
    assert same.token_ids == first.token_ids


def test_ten_runs_are_identical(smollm2):
    runs = {smollm2.generate(["Write a haiku about the sea"], SEEDED)[0].text for _ in range(10)}
    assert len(runs) == 1


def test_another_load_gives_the_same(goldens_dir, tiny):
    prompts = tiny_prompts()
    before = [c.token_ids for c in tiny.generate(prompts, SEEDED)]
    for arguments in ({"n_threads": 1}, {"max_seqs": 3, "max_batch_tokens": 16}):
        with LLM(tiny.info.path, device="cpu", progress=False, **arguments) as other:
            assert [c.token_ids for c in other.generate(prompts, SEEDED)] == before


def test_a_crowd_with_cancels_and_stop_strings(tiny):
    """Neighbours that come, go and end early change nothing."""
    prompts = tiny_prompts()
    expected = [c.token_ids for c in tiny.generate(prompts, SEEDED)]
    stop = next(iter(tiny.generate([prompts[3]], SEEDED)[0].text))
    others = [tiny.submit(p, SamplingParams(seed=1, max_tokens=100, stop=stop)) for p in prompts[:4]]
    jobs = []
    for i, prompt in enumerate(prompts):
        jobs.append(tiny.submit(prompt, SEEDED))
        if i < 3:
            others[i].cancel()
    assert [j.completion().token_ids for j in jobs] == expected


def test_logits_agree_with_the_reference(tiny, goldens_dir):
    name = os.path.basename(tiny.info.path).removesuffix(".gguf")
    with np.load(goldens_dir / f"{name}.npz") as reference:
        tokens, wanted = reference["tokens"][0], reference["logits"][0].astype(np.float64)
    got = tiny.logits(tokens)
    limit = limits.by_prefix(limits.LOGITS_NMSE["cpu"], name)
    nmse = float(np.mean((got - wanted) ** 2) / np.mean(wanted**2))
    print(f"{name}: NMSE {nmse:.2e}, limit {limit:.0e}")
    assert nmse <= limit


def test_greedy_and_logprobs_follow_the_logits(tiny):
    prompt = tiny_prompts()[5]
    (result,) = tiny.generate([prompt], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=3))
    logits = tiny.logits([*prompt, *result.token_ids])[len(prompt) - 1 : -1].astype(np.float64)
    assert result.token_ids == tuple(logits.argmax(axis=1).tolist())
    logprobs = logits - logits.max(axis=1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
    for row, token, given in zip(logprobs, result.token_ids, result.logprobs, strict=True):
        assert next(iter(given)) == token and len(given) == 3
        for i, value in given.items():
            assert value == pytest.approx(row[i], abs=1e-6)
    (plain,) = tiny.generate([prompt], SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True))
    assert plain.token_ids == result.token_ids


def test_stream_and_stop_string(smollm2):
    params = SamplingParams(max_tokens=40, temperature=0.0)
    (whole,) = smollm2.generate(["The capital of France is"], params)
    stream = smollm2.stream("The capital of France is", params)
    assert "".join(p.text for p in stream) == whole.text == stream.job.completion().text
    stop = whole.text[8:14]
    (cut,) = smollm2.generate(["The capital of France is"], SamplingParams(max_tokens=40, temperature=0.0, stop=stop))
    assert cut.text == whole.text[: whole.text.find(stop)] and cut.finish_reason == "stop"


def test_a_stop_string_is_told_and_does_not_count_before_min_tokens(smollm2):
    prompt, params = "1, 2, 3,", SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    (whole,) = smollm2.generate([prompt], params)
    pieces = [piece.text for piece in smollm2.stream(prompt, params)]
    assert len(pieces) == 30 and "".join(pieces) == whole.text and whole.stop_reason is None
    for least in (0, 7, 29):
        shown = len("".join(pieces[:least]))
        at = whole.text.find(",", shown)
        asked = dataclasses.replace(params, stop=("no such text", ","), min_tokens=least)
        (got,) = smollm2.generate([prompt], asked)
        want = (whole.text, "length", None) if at < 0 else (whole.text[:at], "stop", ",")
        assert (got.text, got.finish_reason, got.stop_reason) == want, least


def test_chat_takes_content_in_parts(smollm2):
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    parts = [{"type": "text", "text": "Say hello."}, {"type": "text", "text": "Now."}]
    answer = smollm2.chat([{"role": "user", "content": parts}], greedy)
    assert answer.token_ids == smollm2.chat([{"role": "user", "content": "Say hello.\nNow."}], greedy).token_ids
    with pytest.raises(InvalidRequest, match="'image_url'") as caught:
        smollm2.chat([{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": "x"}}]}])
    assert caught.value.fields["field"] == "messages[0].content[2].type"


def test_chat_ends_at_the_end_of_the_turn(smollm2):
    answer = smollm2.chat([{"role": "user", "content": "Say hello."}], SamplingParams(max_tokens=60, temperature=0.0))
    assert answer.finish_reason == "stop" and answer.text and "<|im_end|>" not in answer.text
    assert not set(answer.token_ids) & set(smollm2.tokenizer.stop_ids)


def test_a_cancelled_prompt_stops_soon(smollm2):
    job = smollm2.submit([1] * 1500, SamplingParams(max_tokens=10))
    while job.state == "queued":
        assert job.next_event(0.001) is None
    job.cancel()
    # what the engine does for the next job begins within a step of the cancelled one
    after = smollm2.submit([1], SamplingParams(max_tokens=1))
    while not isinstance(event := after.next_event(10), Finished):
        assert event is not None
    print(f"the next job waited {event.timings.queue_ms:.0f} ms")
    assert event.timings.queue_ms < 2000
