"""`gguf-bpe` and `gguf-spm`: a tokenizer out of the checked metadata of a GGUF file.

Types tokens (control, user-defined, text), picks the encoder and lays the vocabulary out as bytes. What is read from
the file at all, and that it is sound, is metadata.py's matter.
"""

from __future__ import annotations

import hashlib

from worker_orcd._gguf import Metadata
from worker_orcd.tokenizer.bpe import BpeEncoder
from worker_orcd.tokenizer.metadata import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, TokenizerMetadata, validate
from worker_orcd.tokenizer.parts import TokenizerParts
from worker_orcd.tokenizer.special_tokens import SpecialToken, SpecialTokens, find_known
from worker_orcd.tokenizer.spm import SpmEncoder
from worker_orcd.tokenizer.vocab import Vocab, byte_level_bytes, spm_bytes

#: tokens of Phi-3 that white space may follow; it is taken with all others (its tokenizer.json says so, GGUF cannot)
_PHI3_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def load(metadata: Metadata) -> TokenizerParts | None:
    """Build the tokenizer of a GGUF file; None where it has none.

    Args:
        metadata: `GgufFile.metadata`.

    Raises:
        ModelLoadError: the tokenizer's keys are unsound, or name a pre-tokenizer that is not known.
    """
    meta = validate(metadata)
    if meta is None:
        return None
    return _build(meta, metadata.get("general.architecture") == "phi3", metadata_sha256(metadata))


def metadata_sha256(metadata: Metadata) -> str:
    """Which vocabulary, merges and rules a file holds: SHA-256 over its keys ``tokenizer.ggml.*`` in order of name.

    Each key adds the line ``key type length`` (length of an array, else 1; spaces between, a newline behind) and its
    value as GGUF stores it, array headers left out.
    """
    digest = hashlib.sha256()
    for key in sorted(k for k in metadata if k.startswith("tokenizer.ggml.")):
        kind = metadata.value_type(key)
        length = metadata.array_len(key) if kind.startswith("array") else 1
        digest.update(f"{key} {kind} {length}\n".encode())
        digest.update(metadata.raw(key))
    return digest.hexdigest()


def _build(meta: TokenizerMetadata, phi3: bool, sha256: str) -> TokenizerParts:
    spm = meta.model == "llama"
    known = find_known(meta.vocab.get, lambda i: meta.types[i] in (CONTROL, USER_DEFINED))
    control = {i for i, kind in enumerate(meta.types) if kind in (CONTROL, UNKNOWN)} | set(known.values())
    literal = control | {i for i, kind in enumerate(meta.types) if kind == USER_DEFINED}

    def strips(text: str) -> bool:
        return spm and phi3 and text not in _PHI3_KEEPS_SPACE

    special = SpecialTokens(
        [SpecialToken(i, t := meta.tokens[i], i in control, strip_right=strips(t)) for i in sorted(literal)]
    )
    # an unused id is a place in the embeddings that no text was given to; its name is the converter's
    shown = ["" if meta.types[i] == UNUSED and i not in control else t for i, t in enumerate(meta.tokens)]
    if spm:
        encode = SpmEncoder(meta, control).encode
        data = spm_bytes(shown, literal, meta.byte_ids)
    else:
        encode = BpeEncoder(meta, control).encode
        data = byte_level_bytes(shown, literal)
    table = Vocab(*data, control, strip_space=spm and meta.add_space_prefix)
    return TokenizerParts(
        kind="gguf-spm" if spm else "gguf-bpe",
        path=meta.path,
        sha256=sha256,
        n_vocab=meta.n_vocab,
        encode=encode,
        special=special,
        table=table,
        decode=None,
        known_ids=known,
        text_of=lambda token: table.token_bytes(token).decode("utf-8", "replace"),
        bos_id=meta.bos_id,
        eos_id=meta.eos_id,
        eot_id=meta.eot_id,
        eom_id=meta.eom_id,
        fill_end_ids=meta.fill_end_ids,
        unk_id=meta.unk_id,
        pad_id=meta.pad_id,
        begin=(meta.bos_id,) if meta.add_bos and meta.bos_id is not None else (),
        chat_template=meta.chat_template,
    )
