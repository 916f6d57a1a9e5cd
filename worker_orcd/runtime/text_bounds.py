"""What of a request is bounded in tokens of the vocabulary: stop strings, bad words, and what they leave to draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from worker_orcd.config import MAX_BAD_WORD_TOKENS, MAX_STOP_TOKENS, MAX_TOKENS_OF_A_BAD_WORD
from worker_orcd.errors import InvalidRequest

if TYPE_CHECKING:
    from worker_orcd.tokenizer.tokenizer import Tokenizer


def check_stops(stops: Sequence[str], tokenizer: Tokenizer | None, max_chars: int | None) -> None:
    """Refuse stop strings of more than `max_chars` characters, or where it is None, of `MAX_STOP_TOKENS` tokens.

    Raises:
        InvalidRequest: naming `stop`.
    """
    if stops and tokenizer is None:
        raise InvalidRequest("the model file has no tokenizer, so it can have no stop strings", field="stop")
    for stop in stops:
        if max_chars is not None:
            if len(stop) > max_chars:
                reason = f"a stop string has {len(stop)} characters; at most {max_chars} are taken"
                raise InvalidRequest(reason, field="stop")
            continue
        n = len(tokenizer.encode(stop, add_bos=False)) if tokenizer is not None else 0
        if n > MAX_STOP_TOKENS:
            raise InvalidRequest(f"a stop string has {n} tokens; at most {MAX_STOP_TOKENS} are taken", field="stop")


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer | None, n_vocab: int) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word as it is at the beginning of a text and after a space, without repetitions.

    Raises:
        InvalidRequest: naming `bad_words`.
    """
    if not words:
        return ()
    if tokenizer is None:
        raise InvalidRequest("the model file has no tokenizer, so it can have no bad_words", field="bad_words")
    found: dict[tuple[int, ...], None] = {}
    total = 0
    for word in words:
        bare = word.lstrip() or word
        for text in (bare, f" {bare}"):
            ids = tuple(tokenizer.encode(text, add_bos=False))
            if not 1 <= len(ids) <= MAX_TOKENS_OF_A_BAD_WORD or max(ids) >= n_vocab:
                raise InvalidRequest(
                    f"bad_words holds a text of {len(ids)} tokens; 1 to {MAX_TOKENS_OF_A_BAD_WORD} are taken",
                    field="bad_words",
                )
            total += len(ids) if ids not in found else 0
            found[ids] = None
            if total > MAX_BAD_WORD_TOKENS:
                raise InvalidRequest(
                    f"bad_words has more than {MAX_BAD_WORD_TOKENS} tokens, with and without a leading space",
                    field="bad_words",
                )
    return tuple(found)


def check_bans(
    plain: Mapping[str, Any], bad_words: Iterable[tuple[int, ...]], stop_ids: Iterable[int], n_vocab: int
) -> None:
    """Refuse what leaves no token to draw.

    Args:
        plain: checked fields of `SamplingParams` by name.
        bad_words: the tokens of each.
        stop_ids: those of the model that end the text.
        n_vocab: size of the vocabulary.

    Raises:
        InvalidRequest: naming the field.
    """
    banned = {word[0] for word in bad_words if len(word) == 1}
    if len(banned) >= n_vocab:
        raise InvalidRequest("bad_words bans every token of the vocabulary", field="bad_words")
    if plain["min_tokens"] and len(banned.union(stop_ids, plain["stop_token_ids"])) >= n_vocab:
        raise InvalidRequest("min_tokens leaves no token: all end the text or are banned", field="min_tokens")
