"""TokenEdits: what a slot does to the logits of single tokens before all else, in the form that engines take.

A bias is added to its token's logit, a ban makes it -infinity: a token that ends the text before there are enough, or
the last token of a bad word after the others. csrc/params/sampling.h says the rule and what the words mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker_orcd.config import (
    MAX_BAD_WORD_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS_OF_A_BAD_WORD,
)
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InvalidRequest

#: int32 words of one `SlotEdit`
_EDIT_WORDS = 5
#: tokens that end the text, of a request and of its model together
_MAX_STOPS = 2 * MAX_STOP_TOKEN_IDS
#: int32 words of the edits of one slot at most
MAX_WORDS = _EDIT_WORDS * (MAX_LOGIT_BIAS + _MAX_STOPS + MAX_BAD_WORD_TOKENS)
_ALWAYS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class TokenEdits:
    """Attributes:
    n_edits: entries.
    n_bias: of which the first are biases; the others are bans.
    words: int32, the entries as `SlotEdit`, then the tokens that they point to; at most `MAX_WORDS`.
    """

    n_edits: int
    n_bias: int
    words: npt.NDArray[np.int32]

    def counts(self) -> dict[str, int]:
        """The fields of `SlotSampling` beside those of `SamplingParams.numbers()`."""
        return {"n_bias": self.n_bias, "n_edits": self.n_edits}

    def check(self, n_vocab: int) -> None:
        """Raise `InvalidRequest` where an engine would read or write beyond its arrays."""
        n = self.n_edits * _EDIT_WORDS
        words = self.words
        if words.dtype != np.int32 or not n <= len(words) <= MAX_WORDS or not 0 <= self.n_bias <= self.n_edits:
            raise InvalidRequest(
                f"{self.n_edits} edits in {len(words)} words; at most {MAX_WORDS} are taken", field="edits"
            )
        if not n:
            return
        tokens, _, _, n_before, before = words[:n].reshape(-1, _EDIT_WORDS).astype(np.int64).T
        if ((tokens < 0) | (tokens >= n_vocab)).any():
            raise InvalidRequest(f"edits name a token outside 0..{n_vocab - 1}", field="edits")
        too_long = (n_before < 0) | (n_before >= MAX_TOKENS_OF_A_BAD_WORD)
        if (too_long | (before < 0) | (before + n_before > len(words))).any():
            raise InvalidRequest("edits name tokens that are not there", field="edits")


#: of a slot that changes no logit
NO_EDITS = TokenEdits(0, 0, np.empty(0, np.int32))


def token_edits(
    params: SamplingParams, bad_words: Sequence[Sequence[int]] = (), stop_ids: Collection[int] = ()
) -> TokenEdits:
    """The edits of a sequence.

    Args:
        params: checked against the vocabulary.
        bad_words: the tokens of each, 1 to 32, together at most 1,024.
        stop_ids: every token that ends the sequence; none is drawn before `params.min_tokens` are.

    Raises:
        InvalidRequest: more of them than there is room for; names the field.
    """
    bias = params.logit_bias or {}
    stops = stop_ids if params.min_tokens else ()
    if not (bias or stops or bad_words):
        return NO_EDITS
    if len(stops) > _MAX_STOPS:
        raise InvalidRequest(
            f"min_tokens needs at most {_MAX_STOPS} tokens that end the text, not {len(stops)}", field="min_tokens"
        )
    n_edits = len(bias) + len(stops) + len(bad_words)
    before = [token for word in bad_words for token in word[:-1]]
    words = np.zeros(n_edits * _EDIT_WORDS + len(before), np.int32)
    entries = words[: n_edits * _EDIT_WORDS].reshape(-1, _EDIT_WORDS)
    entries[:, 0] = [*bias, *stops, *(word[-1] for word in bad_words)]
    entries[: len(bias), 1] = np.array([*bias.values()], np.float32).view(np.int32)
    entries[:, 2] = _ALWAYS
    entries[len(bias) : len(bias) + len(stops), 2] = min(params.min_tokens, _ALWAYS)
    at = n_edits * _EDIT_WORDS
    words[at:] = before
    for entry, word in zip(entries[n_edits - len(bad_words) :], bad_words, strict=True):
        entry[3:] = len(word) - 1, at
        at += len(word) - 1
    return TokenEdits(n_edits, len(bias), words)
