"""SamplingParams: every field's rule, named in the error."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import gen_params
import numpy as np
import pytest

from worker_orcd.engine.sampling import RULES, SamplingParams, make_seed
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
    ],
)
def test_accepted(given):
    params = SamplingParams(**given)
    params.check(n_vocab=100, max_tokens_out=2048)
    assert isinstance(params.stop, tuple)


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
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).check(n_vocab=100, max_tokens_out=2048)
    assert caught.value.fields["field"] == field
    assert field in caught.value.message and len(caught.value.message) < 120 and "\n" not in caught.value.message


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
    numbers = {"temperature": 0, "top_k": 3, "top_p": 1, "min_p": 0.5, "repetition_penalty": 2, "seed": 8}
    header = next(h for h in gen_params.read() if "SlotSampling" in h.structs)
    names = {f.name for f in header.structs["SlotSampling"]} - {"reserved"}
    assert names >= set(numbers) and params.numbers() == {name: getattr(params, name) for name in names}
    assert numbers.items() <= params.numbers().items()
    for field, value in {"seed": None, "top_k": 2**31, "temperature": math.nan}.items():
        with pytest.raises(InvalidRequest, match=field):
            dataclasses.replace(params, **{field: value}).numbers()
