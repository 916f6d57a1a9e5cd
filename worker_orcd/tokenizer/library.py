"""Calls into the `tokenizers` library: its errors as ours, and the calls for long texts, which are faster and let other
threads run meanwhile.

The library raises bare `Exception`, and where an assertion inside it fails a `PanicException`, which is no `Exception`
at all and would end a thread that only expects errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from tokenizers import Regex, Tokenizer, pre_tokenizers

from worker_orcd.errors import InvalidRequest, WorkerError, excerpt
from worker_orcd.machine import give_back_memory
from worker_orcd.tokenizer.room import Room

#: From that many characters or tokens on, the library's call for several texts is used. It keeps the Python lock from
#: nobody, as the one for a single text does (for 24 ms with 61,000 characters), and leaves out character offsets. But
#: it starts a thread pool, which warns about every later fork, so a shorter text is not worth it
_LONG_TEXT = 1 << 16
#: and where the library was told to start none, from that many on
_LONG_WITHOUT_POOL = 1 << 10
#: the variable that tells it: "false"
POOL_VARIABLE = "TOKENIZERS_PARALLELISM"
#: long texts go one by one, and no shorter one waits for them
_ROOM, _LONG_ROOM = Room(), Room(1)
#: what every message of a file that cannot be loaded begins with
_LOADING = "Cannot instantiate Tokenizer from buffer: "


@contextmanager
def failing_as(make: Callable[[str], WorkerError]) -> Iterator[None]:
    """Turn whatever the library raises in the block into `make(start of its message)`, which may quote a file."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise make(excerpt(str(e).removeprefix(_LOADING))) from None


def _lets_others_run(n: int) -> bool:
    """Whether the call for several texts is used for so many characters or tokens."""
    return n >= _LONG_TEXT or (n >= _LONG_WITHOUT_POOL and os.environ.get(POOL_VARIABLE) == "false")


def encode_with(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, without the special tokens of the tokenizer's template.

    Raises:
        InvalidRequest: the library gives up on the text.
    """
    refused = failing_as(lambda reason: InvalidRequest(f"text cannot be tokenized: {reason}", field="text"))
    is_long = len(text) >= _LONG_TEXT
    with (_LONG_ROOM if is_long else _ROOM).for_text(len(text)), refused:
        if not _lets_others_run(len(text)):
            return tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if is_long:
            give_back_memory()
        return ids


def decode_with(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    """Text of `ids`.

    Raises:
        InvalidRequest: the library gives up on the ids.
    """
    with failing_as(lambda reason: InvalidRequest(f"ids cannot be decoded: {reason}", field="ids")):
        if not _lets_others_run(len(ids)):
            return tokenizer.decode(ids, skip_special_tokens=skip_special)
        text: str = tokenizer.decode_batch([ids], skip_special_tokens=skip_special)[0]
        return text


def keep_from_text(tokenizer: Tokenizer, controls: Collection[str]) -> None:
    """Let a tokenizer make no control token out of text that reads like one.

    Its added tokens are not all that finds them: a model that has the text among its pieces (Unigram, WordLevel, BPE
    with `ignore_merges`) takes it for the piece. So such a text is cut behind its first character, after all that the
    pre-tokenizer does; one of a single character cannot be.

    Args:
        tokenizer: gets another pre-tokenizer where it needs one.
        controls: texts of the control tokens.
    """
    cuts = []
    for text in controls:
        token = tokenizer.model.token_to_id(text)
        if token is None or len(text) < 2 or token not in _pieces(tokenizer, text):
            continue
        first, rest = _literal(text[0]), _literal(text[1:])
        if token in _pieces(tokenizer, text + text):
            cuts.append(rf"{first}(?={rest})")
        elif _is_word(tokenizer, text):
            cuts.append(rf"\A{first}(?={rest}\z)")
    if cuts:
        before = [] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer]
        cut = pre_tokenizers.Split(Regex("|".join(cuts)), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])


def _pieces(tokenizer: Tokenizer, word: str) -> list[int]:
    try:
        return [piece.id for piece in tokenizer.model.tokenize(word)]
    except Exception:  # the model has no piece for a character, so there is no such word
        return []


def _is_word(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the pre-tokenizer leaves `text` whole: at the start, which may get a space in front, or elsewhere."""
    split = tokenizer.pre_tokenizer
    return split is None or any(text in dict(split.pre_tokenize_str(before + text)) for before in ("", "\n"))


def _literal(text: str) -> str:
    """A regular expression that matches `text`."""
    return "".join(rf"\x{{{ord(c):X}}}" for c in text)
