"""Calls into the `tokenizers` library: its errors as ours, and the faster call for long texts.

The library raises bare `Exception`, and where an assertion inside it fails a `PanicException`, which is no `Exception`
at all and would end a thread that only expects errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer

from worker_orcd.errors import InvalidRequest, WorkerError, excerpt

#: From this length on the library's batch call is used, which leaves out character offsets (0.3 s instead of 0.5 s for
#: 10^6 characters). Not for shorter text: it starts a thread pool, which warns about every later fork.
_LONG_TEXT = 1 << 16
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


def encode_with(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, without the special tokens of the tokenizer's template.

    Raises:
        InvalidRequest: the library gives up on the text.
    """
    with failing_as(lambda reason: InvalidRequest(f"text cannot be tokenized: {reason}", field="text")):
        if len(text) < _LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=False).ids
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def decode_with(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    """Text of `ids`.

    Raises:
        InvalidRequest: the library gives up on the ids.
    """
    with failing_as(lambda reason: InvalidRequest(f"ids cannot be decoded: {reason}", field="ids")):
        return tokenizer.decode(ids, skip_special_tokens=skip_special)
