"""token_edits: what asks for it becomes an entry, and nothing else does. What engines make of it: test_cpu_sampling."""

from __future__ import annotations

import ctypes

import gen_params
import numpy as np
import pytest

from worker_orcd import config
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.engine.token_edits import MAX_WORDS, NO_EDITS, token_edits
from worker_orcd.errors import InvalidRequest

HEADERS = gen_params.read()
EDIT = gen_params.mirror(HEADERS)["SlotEdit"]


def entries(edits) -> list[dict[str, float]]:
    raw = edits.words.tobytes()[: edits.n_edits * ctypes.sizeof(EDIT)]
    table = (EDIT * edits.n_edits).from_buffer_copy(raw)
    return [{name: getattr(entry, name) for name, _ in EDIT._fields_} for entry in table]


def test_each_edit_is_an_entry_of_the_struct_that_engines_read():
    params = SamplingParams(logit_bias={7: 1.5, 3: -100}, min_tokens=4)
    edits = token_edits(params, [(5,), (8, 9, 6), (8, 2)], (1, 0))
    always = 2**31 - 1
    n = edits.n_edits * 5
    assert (edits.n_bias, edits.n_edits, edits.counts()) == (2, 7, {"n_bias": 2, "n_edits": 7})
    assert [tuple(entry.values()) for entry in entries(edits)] == [
        (7, 1.5, always, 0, 0),
        (3, -100.0, always, 0, 0),
        (1, 0.0, 4, 0, 0),
        (0, 0.0, 4, 0, 0),
        (5, 0.0, always, 0, n),
        (6, 0.0, always, 2, n),
        (2, 0.0, always, 1, n + 2),
    ]
    assert edits.words[n:].tolist() == [8, 9, 8] and edits.words.dtype == np.int32
    edits.check(10)
    with pytest.raises(InvalidRequest):
        edits.check(7)


def test_who_asks_for_nothing_has_none():
    assert token_edits(SamplingParams(), (), (1, 2)) is NO_EDITS
    assert token_edits(SamplingParams(logit_bias={}, min_tokens=3)) is NO_EDITS
    NO_EDITS.check(1)


def test_as_many_as_may_be_asked_for_have_room():
    bias = dict.fromkeys(range(config.MAX_LOGIT_BIAS), 1.0)
    stops = range(2 * config.MAX_STOP_TOKEN_IDS)
    for words in ([(1,)] * config.MAX_BAD_WORD_TOKENS, [tuple(range(32))] * (config.MAX_BAD_WORD_TOKENS // 32)):
        edits = token_edits(SamplingParams(logit_bias=bias, min_tokens=1 << 40), words, stops)
        edits.check(config.MAX_LOGIT_BIAS)
        assert len(edits.words) <= MAX_WORDS and entries(edits)[1024]["until"] == 2**31 - 1
    with pytest.raises(InvalidRequest, match="min_tokens") as caught:
        token_edits(SamplingParams(min_tokens=1), (), range(2 * config.MAX_STOP_TOKEN_IDS + 1))
    assert caught.value.fields["field"] == "min_tokens"


def test_numbers_that_the_header_says_too():
    constants = {name: value for header in HEADERS for name, value in header.constants.items()}
    assert constants["SAMPLING_EDIT_WORDS"] == MAX_WORDS
    assert constants["SAMPLING_RECENT"] == config.MAX_TOKENS_OF_A_BAD_WORD
    assert constants["SAMPLING_HISTORY_WORDS"] == constants["SAMPLING_RECENT"] + 1
