"""`general.architecture` -> its row. A family is a module with `ROWS`, listed in `FAMILIES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker_orcd.errors import ModelLoadError, quoted
from worker_orcd.models import gpt2, gpt_oss, hparams, keys, llama, phi3, qwen
from worker_orcd.models.hparams import Arch, HParams

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

FAMILIES = (llama, qwen, phi3, gpt2, gpt_oss)

ROWS: dict[str, Arch] = {row.name: row for family in FAMILIES for row in family.ROWS}


def row_of(mf: ModelFile) -> Arch:
    """The architecture row of a file.

    Raises:
        ModelLoadError: an architecture without a row, named with those supported.
    """
    row = ROWS.get(mf.arch)
    if row is None:
        if not mf.arch:
            raise mf.error("general.architecture", "is missing or no text")
        raise ModelLoadError(f"unsupported architecture {quoted(mf.arch)} (supported: {', '.join(ROWS)})", mf.path)
    return row


def hparams_of(mf: ModelFile, context_length: int | None = None) -> HParams:
    """The hyperparameters of a file, read by its row.

    Raises:
        ModelLoadError: as `row_of`, `hparams.read` and `keys.check`.
    """
    row = row_of(mf)
    hp = hparams.read(mf, row, context_length)
    keys.check(mf, row, hp)
    return hp
