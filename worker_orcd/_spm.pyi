"""Types of pyx/worker_orcd/_spm.pyx: score-ranked merging of neighbouring pieces."""

from typing_extensions import Buffer

class SpmMerger:
    """A vocabulary with scores, ready to tokenize."""

    def __init__(self, blob: bytes, offsets: Buffer, scores: Buffer, byte_ids: Buffer, unk_id: int) -> None: ...
    def encode(self, text: bytes) -> list[int]:
        """Ids of `text`, valid UTF-8."""
