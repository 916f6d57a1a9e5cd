"""SamplingParams: every field's rule, named in the error."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import gen_params
import numpy as np
import pytest

from worker_orcd.engine.sampling import RULES, SamplingParams, make_seed, plain_number
from worker_orcd.engine.token_edits import NO_EDITS
from worker_orcd.errors import InvalidRequest
from worker_orcd.serving.logprobs import top_logprobs


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_tokens": 1},
        {"max_tokens": 2048},
        {"temperature": 0},
        {"temperature": 2.0},
        {"top_p": 0.0},
        {"top_k": 100},
        {"min_p": 1},
        {"repetition_penalty": 2.0},
        {"repetition_penalty": 1e-9},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"stop": "x"},
        {"stop": ["a", "b", "c", "d"]},
        {"stop": None},
        {"logprobs": 0},
        {"logprobs": 20},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"logit_bias": {"0": -100, 99: 100.0}},
        {"logit_bias": {}},
        {"logit_bias": dict.fromkeys(range(100), 1)},
        {"min_tokens": 5, "max_tokens": 5},
        {"min_tokens": 2000},
        {"stop_token_ids": [0, 99]},
        {"stop_token_ids": None, "bad_words": None},
        {"stop_token_ids": [1] * 128},
        {"bad_words": "x"},
        {"bad_words": ["a"] * 2000},
    ],
)
def test_accepted(given):
    params = SamplingParams(**given)
    params.check(n_vocab=100, max_tokens_out=2048)
    assert all(isinstance(value, tuple) for value in (params.stop, params.stop_token_ids, params.bad_words))
    hash(params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2049),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", 10**5000),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", -1e-9),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 101),
        ("top_k", 2.0),
        ("min_p", 1.1),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 2.1),
        ("stop", [""]),
        ("stop", list("abcde")),
        ("stop", [1]),
        ("stop", 5),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("ignore_eos", 1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("presence_penalty", 2.01),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -3),
        ("frequency_penalty", "1"),
        ("logit_bias", [1, 2]),
        ("logit_bias", 5),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: "2"}),
        ("logit_bias", {1: None}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {100: 1}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"\u0661": 1}),
        ("logit_bias", {1.0: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {1: 1, "1": 2}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", dict.fromkeys(range(1025), 1)),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("min_tokens", True),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [100]),
        ("stop_token_ids", ["1"]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [10**5000]),
        ("stop_token_ids", 5),
        ("stop_token_ids", "12"),
        ("stop_token_ids", b"12"),
        ("stop_token_ids", {1: 2}),
        ("stop_token_ids", [1] * 129),
        ("bad_words", [""]),
        ("bad_words", [1]),
        ("bad_words", 5),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).check(n_vocab=100, max_tokens_out=2048)
    assert caught.value.fields["field"] == field
    assert field in caught.value.message and len(caught.value.message) < 120 and "\n" not in caught.value.message


NUMPY = {
    "max_tokens": (np.int64(5), 5),
    "temperature": (np.float32(0.5), 0.5),
    "top_p": (np.float64(0.25), 0.25),
    "top_k": (np.array(3, np.uint16), 3),
    "min_p": (np.longdouble(0.125), 0.125),
    "repetition_penalty": (np.int8(1), 1),
    "stop": (np.array(["a", "b"]), ("a", "b")),
    "seed": (np.uint64(2**64 - 1), 2**64 - 1),
    "ignore_eos": (np.bool_(True), True),
    "logprobs": (np.array(2), 2),
    "presence_penalty": (np.float32(0.5), 0.5),
    "frequency_penalty": (np.int8(-1), -1),
    "logit_bias": ({np.int64(5): np.float32(0.5)}, {5: 0.5}),
    "min_tokens": (np.uint8(3), 3),
    "stop_token_ids": (np.array([4, 5]), (4, 5)),
    "bad_words": (np.array(["a"]), ("a",)),
}


def test_numbers_of_numpy_are_taken_as_plain_ones():
    params = SamplingParams(**{name: given for name, (given, _) in NUMPY.items()})
    params.check(n_vocab=100, max_tokens_out=2048)
    assert params == SamplingParams(**{name: plain for name, (_, plain) in NUMPY.items()})
    assert json.loads(json.dumps(dataclasses.asdict(params)))["seed"] == 2**64 - 1
    assert all(type(getattr(params, name)) is type(plain) for name, (_, plain) in NUMPY.items())
    for name, rule in RULES.items():
        if rule.kind in (int, float):
            number = np.dtype(rule.kind).type(rule.least)
            assert type(getattr(SamplingParams(**{name: number}), name)) is rule.kind, name
    changed = dataclasses.replace(params, max_tokens=np.int32(7))
    assert changed.max_tokens == 7 and type(changed.max_tokens) is int


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", np.float64(5.0)),
        ("max_tokens", np.bool_(True)),
        ("max_tokens", np.array([5])),
        ("temperature", np.float32("nan")),
        ("temperature", np.complex64(1)),
        ("temperature", np.array([0.5])),
        ("temperature", np.float16(2.5)),
        ("temperature", np.datetime64("2026-01-01")),
        ("seed", np.int64(-1)),
        ("ignore_eos", np.int64(1)),
        ("stop", np.array(5)),
    ],
)
def test_a_number_of_numpy_has_the_rule_of_its_field(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).check()
    assert caught.value.fields["field"] == field and len(caught.value.message) < 120


def test_there_is_no_less_than_min_tokens_and_no_more_than_max_tokens():
    with pytest.raises(InvalidRequest, match="min_tokens is 6, above max_tokens 5") as caught:
        SamplingParams(min_tokens=6, max_tokens=5).check()
    assert caught.value.fields["field"] == "min_tokens"


def test_plain_number_leaves_all_else_alone():
    for value in (None, "a", 5, 2.5, [1], object(), np.array([1]), np.array([[1]])):
        assert plain_number(value) is value


def test_a_seed_that_is_made_up_is_the_same_number_as_a_double():
    seeds = [make_seed() for _ in range(500)]
    assert all(seed == float(seed) for seed in seeds) and len(set(seeds)) == 500
    assert max(seeds) >= 2**52, "53 bits are used"
    assert float(2**53 - 1) == 2**53 - 1 and float(2**53 + 1) != 2**53 + 1


def test_top_logprobs():
    logits = np.array([1.0, 3.0, 3.0, -2.0, 0.5], np.float32)
    lse = math.log(sum(math.exp(x) for x in logits.tolist()))
    assert top_logprobs(logits, 3, 2) == pytest.approx({1: 3 - lse, 2: 3 - lse, 3: -2 - lse})
    assert list(top_logprobs(logits, 3, 2)) == [1, 2, 3]
    assert list(top_logprobs(logits, 4, 1)) == [1, 4]
    assert list(top_logprobs(logits, 0, 0)) == [0]
    assert list(top_logprobs(logits, 0, 20)) == [1, 2, 0, 4, 3]
    assert sum(math.exp(v) for v in top_logprobs(logits, 0, 5).values()) == pytest.approx(1)


def test_every_field_has_its_rule_and_its_row_in_the_docs():
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    assert list(RULES) == names
    text = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text()
    section = text.split("\n## SamplingParams\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(names)


def test_an_engine_gets_the_numbers_that_its_struct_has():
    params = SamplingParams(temperature=0, top_k=3, top_p=1, min_p=0.5, repetition_penalty=2, seed=8)
    numbers = {"temperature": 0, "top_k": 3, "top_p": 1, "min_p": 0.5, "repetition_penalty": 2, "seed": 8,
               "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
    header = next(h for h in gen_params.read() if "SlotSampling" in h.structs)
    names = {f.name for f in header.structs["SlotSampling"]} - {"reserved", *NO_EDITS.counts()}
    assert names >= set(numbers) and params.numbers() == {name: getattr(params, name) for name in names}
    assert numbers.items() <= params.numbers().items()
    for field, value in {"seed": None, "top_k": 2**31, "temperature": math.nan}.items():
        with pytest.raises(InvalidRequest, match=field):
            dataclasses.replace(params, **{field: value}).numbers()
