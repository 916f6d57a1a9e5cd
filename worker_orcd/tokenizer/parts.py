"""What every kind of tokenizer is made of, so that `Tokenizer` need not know where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from worker_orcd.tokenizer.special_tokens import SpecialTokens
from worker_orcd.tokenizer.vocab import Vocab

#: where a tokenizer is from, and how it encodes
Kind = Literal["gguf-bpe", "gguf-spm", "hf-json"]


@dataclass
class TokenizerParts:
    """A loaded tokenizer.

    Attributes:
        kind: "gguf-bpe", "gguf-spm" or "hf-json".
        path: the file it came from, for messages.
        sha256: digest of what it was made from, see `Tokenizer.sha256`.
        n_vocab: ids are below this.
        encode: (text without special tokens, whether it starts the whole text) -> ids.
        encode_special: a whole text, control tokens included -> ids; None: `special` and `encode` do it together.
        special: finds control tokens, and user-defined ones where `encode` does not.
        table: bytes of every token, or None where only `decode` can tell.
        decode: (ids below n_vocab, skip special tokens) -> text; None where there is a table.
        known_ids: text -> id of control tokens known by their text (`special_tokens.find_known`).
        text_of: id of a control token -> its text.
        bos_id, eos_id, eot_id, eom_id, unk_id, pad_id: as the file names them.
        fill_end_ids: further ids that the file names as ending generation.
        begin: ids that every text begins with: BOS, seldom several tokens, often none.
        chat_template: jinja source, or None.
    """

    kind: Kind
    path: str
    sha256: str
    n_vocab: int
    encode: Callable[[str, bool], list[int]]
    special: SpecialTokens
    table: Vocab | None
    decode: Callable[[list[int], bool], str] | None
    known_ids: Mapping[str, int]
    text_of: Callable[[int], str]
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    eom_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    encode_special: Callable[[str], list[int]] | None = None
    fill_end_ids: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    chat_template: str | None = None
