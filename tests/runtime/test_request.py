"""prepare: each rule once, in one order (those of text_bounds among them), and what a request leaves open."""

from __future__ import annotations

import numpy as np
import pytest

from worker_orcd import SamplingParams
from worker_orcd.config import DEFAULT_MAX_TOKENS, MAX_JOB_ID_CHARS, MAX_STOP_TOKENS
from worker_orcd.errors import InvalidRequest, VramOom
from worker_orcd.runtime.request import Limits, ModelParts, Request, prepare, requests_of

N_VOCAB, CONTEXT = 256, 5000


class Letters:
    """A tokenizer of bytes; a control token is written <c>, and 1 and 2 end a text."""

    stop_ids = (1, 2)

    def encode(self, text: str, *, special: bool = False, add_bos: bool | None = None) -> list[int]:
        return [1] if special and text == "<c>" else list(text.encode())

    def apply_chat(self, messages) -> list[int]:
        return [2, *messages[0]["content"].encode(), 3]


class Capacity:
    def check(self, n_prompt: int, max_tokens: int) -> None:
        if n_prompt + max_tokens > CONTEXT:
            raise VramOom("too long")

    def room_for(self, n_prompt: int) -> int:
        return CONTEXT - n_prompt


MODEL = ModelParts(Letters(), N_VOCAB, Capacity())
HTTP = Limits(max_prompt_chars=20, max_tokens_in=10, max_tokens_out=100, plain_text=True)


def test_text_ids_and_messages_become_token_ids():
    for request, ids in (
        (Request("ab"), [97, 98]),
        (Request("<c>"), [60, 99, 62]),
        (Request("<c>", special=True), [1]),
        (Request([5, np.int64(6)]), [5, 6]),
        (Request(messages=[{"role": "user", "content": "a"}]), [2, 97, 3]),
    ):
        prepared = prepare(MODEL, request)
        assert prepared.token_ids.tolist() == ids and prepared.token_ids.dtype == np.int32


def test_a_request_has_a_prompt_or_messages():
    for request, field in (
        (Request(), "prompt"),
        (Request("a", messages=[{"role": "user", "content": "a"}]), "messages"),
        (Request("a", params={"stop": ["b"]}), "params"),
    ):
        for limits in (Limits(), HTTP):
            with pytest.raises(InvalidRequest) as caught:
                prepare(MODEL, request, limits)
            assert caught.value.fields["field"] == field


def test_what_is_left_open_is_filled_in():
    first, second = prepare(MODEL, Request("a")), prepare(MODEL, Request("a"))
    assert first.seed != second.seed and 0 <= first.seed < 2**53
    assert (first.params.seed, first.params.max_tokens) == (first.seed, first.max_tokens)
    assert first.max_tokens == DEFAULT_MAX_TOKENS
    assert prepare(MODEL, Request("a" * 4990)).max_tokens == 10
    assert prepare(MODEL, Request("a"), HTTP).max_tokens == 100
    assert prepare(MODEL, Request("a"), Limits(max_tokens_out=1 << 20)).max_tokens == DEFAULT_MAX_TOKENS
    given = prepare(MODEL, Request("a", params=SamplingParams(max_tokens=7, seed=5), job_id="j", deadline=9.0))
    assert (given.max_tokens, given.seed, given.job_id, given.deadline) == (7, 5, "j", 9.0)
    of_numpy = prepare(MODEL, Request("a", deadline=np.float32(9.5)))
    assert of_numpy.deadline == 9.5 and type(of_numpy.deadline) is float


def test_prompts_of_one_call_share_a_seed_where_they_share_params():
    first, second = requests_of(["a", [1]], None)
    assert first.prompt == "a" and second.prompt == [1] and first.params.seed == second.params.seed is not None
    assert [r.params.seed for r in requests_of(["a", "b"], [SamplingParams(seed=1), SamplingParams()])] == [1, None]
    assert [r.prompt for r in requests_of("ab", SamplingParams(seed=4))] == ["ab"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request(""), "prompt"),
        (Request("a" * 21), "prompt"),
        (Request("a" * 11), "prompt"),
        (Request("a\0"), "prompt"),
        (Request(), "prompt"),
        (Request([]), "prompt"),
        (Request([N_VOCAB]), "prompt"),
        (Request("a", job_id=""), "job_id"),
        (Request("a", job_id="x" * (MAX_JOB_ID_CHARS + 1)), "job_id"),
        (Request("a", job_id="a\n"), "job_id"),
        (Request("a", job_id=5), "job_id"),
        (Request("a", params={"max_tokens": 3}), "params"),
        (Request("a", params=SamplingParams(max_tokens=101)), "max_tokens"),
        (Request("a", params=SamplingParams(top_k=N_VOCAB + 1)), "top_k"),
        (Request("a", params=SamplingParams(stop="a\0")), "stop"),
        (Request("a", params=SamplingParams(stop="x" * (MAX_STOP_TOKENS + 1))), "stop"),
    ],
)
def test_a_field_that_breaks_its_rule_is_named(request_, field):
    limits = Limits(**{**vars(HTTP), "plain_text": field != "params"})
    with pytest.raises(InvalidRequest) as caught:
        prepare(MODEL, request_, limits)
    assert caught.value.fields["field"] == field and field in caught.value.message


def test_a_program_that_has_the_model_to_itself_may_more():
    for request in (
        Request("a" * 21),
        Request("a\0", params=SamplingParams(stop="b\0")),
        Request("a", job_id="a\n"),
        Request("a", params=SamplingParams(max_tokens=101)),
    ):
        with pytest.raises(InvalidRequest):
            prepare(MODEL, request, HTTP)
        prepare(MODEL, request)


def test_what_can_never_run_is_the_schedulers_word():
    with pytest.raises(VramOom):
        prepare(MODEL, Request("a", params=SamplingParams(max_tokens=CONTEXT)))


def test_without_a_tokenizer_each_caller_is_told_what_helps_it():
    model = ModelParts(None, N_VOCAB, Capacity())
    assert prepare(model, Request([1])).token_ids.tolist() == [1]
    for request, limits, text in (
        (Request("a"), Limits(), "token ids"),
        (Request("a"), Limits(without_tokenizer="ask --tokenizer"), "ask --tokenizer"),
        (Request(messages=[]), Limits(), "cannot chat"),
        (Request([1], params=SamplingParams(stop="x")), Limits(), "no stop strings"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            prepare(model, request, limits)


@pytest.mark.parametrize("deadline", ["a", "5", float("nan"), True, [], 1j, np.array([1.0]), object()])
def test_a_deadline_that_is_no_time_is_refused(deadline):
    with pytest.raises(InvalidRequest, match="deadline must be a number of seconds") as caught:
        prepare(MODEL, Request("a", deadline=deadline))
    assert caught.value.fields["field"] == "deadline"


@pytest.mark.parametrize(
    ("deadline", "seconds"),
    [
        (5, 5.0),
        (np.float32(2.5), 2.5),
        (np.int64(7), 7.0),
        (-1.0, -1.0),
        (float("inf"), float("inf")),
        (10**400, float("inf")),
        (-(10**400), -float("inf")),
    ],
)
def test_a_deadline_is_a_plain_float(deadline, seconds):
    given = prepare(MODEL, Request("a", deadline=deadline)).deadline
    assert type(given) is float and given == seconds


def test_what_other_threads_get_is_plain_whatever_it_was():
    class Text(str):
        def __eq__(self, other):
            raise RuntimeError("compared")

        __hash__ = None

        def __str__(self):
            return "another"

    class Params(SamplingParams):
        def check(self, *_):
            return None

        def __getattribute__(self, name):
            return super().__getattribute__(name)

    class Number(float):
        def __lt__(self, other):
            return super().__lt__(other)

    params = Params(max_tokens=7, temperature=Number(0.5), stop=[Text("ab")], seed=3)
    given = prepare(MODEL, Request("a", params=params, job_id=Text("j")))
    assert type(given.job_id) is str and given.job_id == "j"
    assert type(given.params) is SamplingParams and given.params is not params
    assert type(given.params.temperature) is float and given.params.temperature == 0.5
    assert [type(s) for s in given.params.stop] == [str] and given.params.stop == ("ab",)
    object.__setattr__(params, "temperature", "hot")
    assert given.params.temperature == 0.5, "a copy"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "a"),
        ("temperature", None),
        ("temperature", float("nan")),
        ("top_p", 3.0),
        ("top_k", 1.5),
        ("min_p", [0.1]),
        ("repetition_penalty", 0.0),
        ("stop", [1]),
        ("stop", 5),
        ("seed", -1),
        ("seed", 2**64),
        ("ignore_eos", "yes"),
        ("logprobs", "x"),
        ("logprobs", 21),
        ("presence_penalty", 3),
        ("logit_bias", {N_VOCAB: 1.0}),
        ("logit_bias", {3: "a"}),
        ("min_tokens", -1),
        ("stop_token_ids", [N_VOCAB]),
        ("stop_token_ids", (True,)),
        ("bad_words", [""]),
    ],
)
def test_a_field_that_was_set_later_is_checked_as_well(name, value):
    class Unchecked(SamplingParams):
        def check(self, *_):
            return None

    for kind in (SamplingParams, Unchecked):
        params = kind()
        object.__setattr__(params, name, value)
        with pytest.raises(InvalidRequest) as caught:
            prepare(MODEL, Request("a", params=params))
        assert caught.value.fields["field"] == name


def test_bad_words_become_tokens_with_and_without_a_space():
    def words(*given, **more):
        return prepare(MODEL, Request("a", params=SamplingParams(bad_words=given, **more))).bad_words

    assert words() == ()
    assert words("ab", "c") == ((97, 98), (32, 97, 98), (99,), (32, 99))
    assert words("  ab", "ab") == ((97, 98), (32, 97, 98)), "spaces before it are those of the second form"
    assert words(" ") == ((32,), (32, 32)), "a word of spaces stays one"
    assert len(words(*(f"{i:03}" for i in range(146)))) == 292, "1,022 tokens"
    for given, text in (("x" * 32, "33 tokens"), ([f"{i:03}" for i in range(147)], "more than 1024 tokens")):
        with pytest.raises(InvalidRequest, match=text) as caught:
            words(*([given] if isinstance(given, str) else given))
        assert caught.value.fields["field"] == "bad_words"
    with pytest.raises(InvalidRequest, match="no tokenizer") as caught:
        prepare(ModelParts(None, N_VOCAB, Capacity()), Request([1], params=SamplingParams(bad_words="a")))
    assert caught.value.fields["field"] == "bad_words"


def test_stop_token_ids_are_those_that_do_not_end_the_text_anyway():
    for ignore_eos, left in ((False, (7,)), (True, (2, 7, 1))):
        params = SamplingParams(stop_token_ids=[2, 7, 1, 7], ignore_eos=ignore_eos)
        assert prepare(MODEL, Request("a", params=params)).params.stop_token_ids == left
    model = ModelParts(None, N_VOCAB, Capacity())
    assert prepare(model, Request([1], params=SamplingParams(stop_token_ids=[2]))).params.stop_token_ids == (2,)


def test_more_tokens_than_there_is_room_for_are_not_demanded():
    prompt = "a" * (CONTEXT - 10)
    assert prepare(MODEL, Request(prompt, params=SamplingParams(min_tokens=10))).max_tokens == 10
    for params, limits in ((SamplingParams(min_tokens=11), Limits()), (SamplingParams(min_tokens=101), HTTP)):
        with pytest.raises(InvalidRequest, match="leaves room") as caught:
            prepare(MODEL, Request(prompt if limits == Limits() else "a", params=params), limits)
        assert caught.value.fields["field"] == "min_tokens"


def test_what_leaves_no_token_is_refused():
    class Two(Letters):
        def encode(self, text, *, special=False, add_bos=None):
            return [ord(c) % 4 for c in text.strip()]

    model = ModelParts(Two(), 4, Capacity())
    for params, field in (
        ({"bad_words": ["d", "h", "a", "b", "c"]}, "bad_words"),
        ({"bad_words": ["d", "h"], "min_tokens": 1, "stop_token_ids": [3]}, "min_tokens"),
        ({"bad_words": ["d", "c"], "min_tokens": 1}, "min_tokens"),
    ):
        with pytest.raises(InvalidRequest, match=field) as caught:
            prepare(model, Request([1], params=SamplingParams(**params)))
        assert caught.value.fields["field"] == field
    for params in (
        {"bad_words": ["d", "a", "b"]},
        {"bad_words": ["d", "c"], "min_tokens": 1, "ignore_eos": True},
        {"bad_words": ["d", "ab", "bc", "cd", "da"]},
        {"bad_words": ["d"], "min_tokens": 1, "stop_token_ids": [2]},
    ):
        prepare(model, Request([1], params=SamplingParams(**params)))
