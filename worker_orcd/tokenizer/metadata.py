"""The tokenizer part of a GGUF file's metadata, checked once and handed on as plain data.

`validate` is the gate between an untrusted file and the tokenizer code: what passes has a vocabulary without
duplicates, ids inside it, merges made of known pieces and byte tokens that name a byte, so nothing behind it needs to
look again.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from worker_orcd._gguf import Metadata
from worker_orcd.errors import ModelLoadError, quoted

#: values of `tokenizer.ggml.token_type` (ggml's enum llama_token_type)
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)

#: tokens of one vocabulary; the largest published ones hold about 300,000
MAX_TOKENS: Final = 1 << 19
#: merges of one vocabulary
MAX_MERGES: Final = 1 << 20
#: characters of one token; the longest in published vocabularies is 256 bytes long
MAX_TOKEN_CHARS: Final = 4096
#: characters of a chat template; published ones stay under 32 KiB
MAX_TEMPLATE_CHARS: Final = 1 << 20

#: pre-tokenizers whose models begin every text with BOS although their files may not say so (llama.cpp's defaults)
_PRE_ADDS_BOS: Final = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})

#: names of keys, as `special` takes them, of tokens that a code model ends a filled-in file with
_FILL_ENDS: Final = ("fim_pad", "fim_rep", "fim_sep")

#: -1 as an unsigned number: how llama.cpp and its oldest converters write that a model has no token of a kind
NO_ID: Final = 2**32 - 1

_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_P: Final = "tokenizer.ggml."

T = TypeVar("T", str, bool, int)
D = TypeVar("D")


@dataclass(frozen=True)
class TokenizerMetadata:
    """A checked GGUF vocabulary.

    Attributes:
        path: the file it came from, for messages.
        model: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (SentencePiece-like, byte fallback).
        pre: `tokenizer.ggml.pre`, the name of the pre-tokenizer; ``"default"`` where the file names none. Whether it
            is a known one is the tokenizer's to say.
        tokens: token texts by id, all different and none empty (an empty one is named ``[EMPTY_<id>]``). For "gpt2"
            in the byte-to-character alphabet of GPT-2, for "llama" plain UTF-8 with U+2581 for a space.
        vocab: token text -> id.
        types: token type by id: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE (or UNDEFINED).
        scores: finite score by id ("llama": always there; "gpt2": empty where the file has none).
        merges: pairs of pieces, best first; both and their concatenation are in `vocab` ("llama": empty).
        bos_id, eos_id, eot_id, eom_id, unk_id, pad_id: ids below `n_vocab`, or None.
        fill_end_ids: ids below `n_vocab` that the file names as the end of a filled-in file, 0 to 3.
        add_bos: whether text starts with `bos_id` (then not None).
        add_space_prefix: whether text gets a leading space ("llama").
        byte_ids: for "llama" with byte tokens the id of each of the 256 bytes, else empty.
        chat_template: jinja source, or None.
        chat_template_offset: its byte offset in the file, or None.
    """

    path: str
    model: str
    pre: str
    tokens: list[str]
    vocab: dict[str, int]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    eom_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    add_space_prefix: bool
    fill_end_ids: tuple[int, ...] = ()
    byte_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    chat_template_offset: int | None = None

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


def validate(metadata: Metadata) -> TokenizerMetadata | None:
    """Check the tokenizer keys of a file.

    Args:
        metadata: `GgufFile.metadata` of a model or vocabulary-only file.

    Returns:
        The vocabulary, or None where the file has no tokenizer (`tokenizer.ggml.model` absent or ``"none"``).

    Raises:
        ModelLoadError: a key is missing, of another type, of another length than the vocabulary, or holds a value
            that no tokenizer can use; names the key and its byte offset.
    """
    return _Reader(metadata).read()


class _Reader:
    """Typed access to the tokenizer keys of one file, with errors that name key and offset."""

    def __init__(self, metadata: Metadata) -> None:
        self.meta = metadata
        self.path = metadata.path

    def fail(self, key: str, reason: str) -> ModelLoadError:
        offset = self.meta.offset(key) if key in self.meta else None
        gap = "" if reason.startswith("[") else " "
        return ModelLoadError(f"{key}{gap}{reason}", self.path, offset, field=key)

    def scalar(self, key: str, kind: type[T], default: D) -> T | D:
        """The value of `key` (`kind` str, bool or int), or `default` where the file lacks it."""
        if key not in self.meta:
            return default
        value = None if self.meta.value_type(key).startswith("array") else self.meta[key]
        if type(value) is not kind:
            raise self.fail(key, f"is {self.meta.value_type(key)}, must be {kind.__name__}")
        return value

    def array(self, key: str, value_type: str, limit: int) -> list[Any]:
        """The array `key` of elements `value_type`, at most `limit` long; the length is looked at before decoding."""
        found = self.meta.value_type(key)
        if found != f"array[{value_type}]":
            raise self.fail(key, f"is {found}, must be array[{value_type}]")
        n = self.meta.array_len(key)
        if n > limit:
            raise self.fail(key, f"has {n} elements, more than the {limit} supported")
        elements: list[Any] = self.meta[key]
        return elements

    def per_token(self, key: str, value_type: str, n_vocab: int) -> list[Any]:
        """An array with one element for each token."""
        n = self.meta.array_len(key) if self.meta.value_type(key).startswith("array[") else n_vocab
        if n != n_vocab:
            raise self.fail(key, f"has {n} elements for {n_vocab} tokens")
        return self.array(key, value_type, n_vocab)

    def read(self) -> TokenizerMetadata | None:
        model = self.scalar(_P + "model", str, "none")
        if model == "none":
            return None
        if model not in ("gpt2", "llama"):
            raise self.fail(_P + "model", f"is {quoted(model)}; supported are 'gpt2' and 'llama'")
        spm = model == "llama"
        tokens, vocab = self.read_tokens()
        n_vocab = len(tokens)
        types = self.read_types(n_vocab, required=spm)
        scores = self.read_scores(n_vocab, required=spm)
        byte_ids = self.read_bytes(tokens, types)
        pre = self.scalar(_P + "pre", str, "default")

        def special(name: str, default: int | None = None) -> int | None:
            return self.read_id(f"{_P}{name}_token_id", n_vocab, default if spm else None)

        bos_id, eos_id, unk_id = special("bos", 1), special("eos", 2), special("unknown", 0)
        add_bos = self.scalar(_P + "add_bos_token", bool, bos_id is not None and (spm or pre in _PRE_ADDS_BOS))
        if add_bos and bos_id is None:
            raise self.fail(_P + "add_bos_token", f"is true, but the file names no {_P}bos_token_id")
        template = self.scalar("tokenizer.chat_template", str, None)
        if template is not None and len(template) > MAX_TEMPLATE_CHARS:
            raise self.fail("tokenizer.chat_template", f"has {len(template)} characters, limit {MAX_TEMPLATE_CHARS}")
        return TokenizerMetadata(
            path=self.path, model=model, pre=pre, tokens=tokens, vocab=vocab, types=types, scores=scores,
            merges=[] if spm else self.read_merges(vocab),
            bos_id=bos_id, eos_id=eos_id, eot_id=special("eot"), eom_id=special("eom"), unk_id=unk_id,
            pad_id=special("padding"), add_bos=add_bos,
            fill_end_ids=tuple(i for i in map(special, _FILL_ENDS) if i is not None),
            add_space_prefix=self.scalar(_P + "add_space_prefix", bool, spm),
            byte_ids=byte_ids if spm else (), chat_template=template,
            chat_template_offset=None if template is None else self.meta.offset("tokenizer.chat_template"),
        )  # fmt: skip

    def read_tokens(self) -> tuple[list[str], dict[str, int]]:
        key = _P + "tokens"
        if key not in self.meta:
            raise self.fail(key, "is missing")
        tokens = self.array(key, "string", MAX_TOKENS)
        if not tokens:
            raise self.fail(key, "is empty")
        if max(map(len, tokens)) > MAX_TOKEN_CHARS:
            i = next(i for i, t in enumerate(tokens) if len(t) > MAX_TOKEN_CHARS)
            raise self.fail(key, f"[{i}] has {len(tokens[i])} characters, limit {MAX_TOKEN_CHARS}")
        if "" in tokens:
            tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]
        vocab = {t: i for i, t in enumerate(tokens)}
        if len(vocab) != len(tokens):
            i = next(i for i, t in enumerate(tokens) if vocab[t] != i)
            raise self.fail(key, f"holds {quoted(tokens[i])} twice, as ids {i} and {vocab[tokens[i]]}")
        return tokens, vocab

    def read_types(self, n_vocab: int, required: bool) -> list[int]:
        key = _P + "token_type"
        if key not in self.meta:
            if required:
                raise self.fail(key, "is missing")
            return [NORMAL] * n_vocab
        types = self.per_token(key, "int32", n_vocab)
        if not set(types) <= set(range(7)):
            i = next(i for i, t in enumerate(types) if not 0 <= t <= BYTE)
            raise self.fail(key, f"[{i}] is {types[i]}, must be 0..{BYTE}")
        return types

    def read_scores(self, n_vocab: int, required: bool) -> list[float]:
        key = _P + "scores"
        if key not in self.meta:
            if required:
                raise self.fail(key, "is missing")
            return []
        scores = self.per_token(key, "float32", n_vocab)
        if not all(map(math.isfinite, scores)):
            i = next(i for i, s in enumerate(scores) if not math.isfinite(s))
            raise self.fail(key, f"[{i}] is {scores[i]}")
        return scores

    def read_bytes(self, tokens: list[str], types: list[int]) -> tuple[int, ...]:
        """Ids of the 256 byte tokens, or () where there is none."""
        if BYTE not in types:
            return ()
        key = _P + "tokens"
        by_value: dict[int, int] = {}
        for i, kind in enumerate(types):
            if kind != BYTE:
                continue
            if not _BYTE_TOKEN.fullmatch(tokens[i]):
                raise self.fail(key, f"[{i}] is the byte token {quoted(tokens[i])}, must be of the form <0x0A>")
            value = int(tokens[i][3:5], 16)
            if value in by_value:
                raise self.fail(key, f"[{i}] is a second token for byte 0x{value:02X}, after id {by_value[value]}")
            by_value[value] = i
        if len(by_value) != 256:
            missing = min(set(range(256)) - by_value.keys())
            raise self.fail(key, f"has byte tokens for {len(by_value)} of 256 bytes; 0x{missing:02X} is missing")
        return tuple(by_value[b] for b in range(256))

    def read_id(self, key: str, n_vocab: int, default: int | None) -> int | None:
        value = self.scalar(key, int, default)
        if value == NO_ID:
            return None
        if value is not None and not 0 <= value < n_vocab:
            origin = "is" if key in self.meta else "is missing and would be"
            raise self.fail(key, f"{origin} {value}, but the vocabulary has {n_vocab} tokens")
        return value

    def read_merges(self, vocab: dict[str, int]) -> list[tuple[str, str]]:
        key = _P + "merges"
        if key not in self.meta:
            raise self.fail(key, "is missing")
        lines = self.array(key, "string", MAX_MERGES)
        pairs: list[tuple[str, str]] = []
        for line in lines:
            left, _, right = line.partition(" ")
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise self.bad_merge(key, len(pairs), line, vocab)
            pairs.append((left, right))
        return pairs

    def bad_merge(self, key: str, i: int, line: str, vocab: dict[str, int]) -> ModelLoadError:
        pieces = line.split(" ")
        if len(pieces) != 2 or "" in pieces:
            return self.fail(key, f"[{i}] is {quoted(line)}, must be two pieces and one space between them")
        unknown = next(p for p in (*pieces, "".join(pieces)) if p not in vocab)
        return self.fail(key, f"[{i}] is {quoted(line)}, but {quoted(unknown)} is not in the vocabulary")
