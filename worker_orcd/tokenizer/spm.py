"""`gguf-spm`: SentencePiece-like tokenization (Llama-2, Phi-3) of a GGUF vocabulary with scores.

A text is one word: spaces become U+2581, and the neighbouring pair whose union is the token with the best score is
joined until none is left; characters that end up in no token are spelled in byte tokens. Equal scores are decided by
position, which ranked merges of a BPE library cannot express, so the merging is ours (`_spm`).
Special tokens are cut out before text gets here.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from itertools import accumulate

from worker_orcd._spm import SpmMerger
from worker_orcd.errors import InvalidRequest, ModelLoadError
from worker_orcd.tokenizer.metadata import TokenizerMetadata
from worker_orcd.tokenizer.vocab import SPM_SPACE


class SpmEncoder:
    """Text without special tokens -> ids. Safe to use from several threads.

    Args:
        meta: a checked vocabulary with `model` "llama".
        control: ids of control tokens, which no text is merged into.

    Raises:
        ModelLoadError: the vocabulary has neither byte tokens nor an unknown token.
    """

    def __init__(self, meta: TokenizerMetadata, control: Collection[int]) -> None:
        if not meta.byte_ids and meta.unk_id is None:
            raise ModelLoadError(
                "tokenizer.ggml.tokens holds no byte tokens and no unknown token, so not every text has ids", meta.path
            )
        self._prefix = " " if meta.add_space_prefix else ""
        # "<0x41>" in a text is text too; an empty piece matches nothing
        hidden = {*control, *meta.byte_ids}
        pieces = [b"" if i in hidden else t.encode() for i, t in enumerate(meta.tokens)]
        self._merger = SpmMerger(
            b"".join(pieces),
            array("I", [0, *accumulate(map(len, pieces))]),
            array("f", meta.scores),
            array("i", meta.byte_ids),
            -1 if meta.unk_id is None else meta.unk_id,
        )

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of a fragment of text; every fragment gets the space prefix, as it is first or follows a special token.

        Raises:
            InvalidRequest: the text is longer than 2^30 bytes.
        """
        try:
            return self._merger.encode((self._prefix + text).replace(" ", SPM_SPACE).encode())
        except OverflowError as e:
            raise InvalidRequest(str(e), field="text") from None
