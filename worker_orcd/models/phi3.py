"""Phi-3: RMSNorm, rotation of halves (LongRoPE in the 128k models), SwiGLU.

Every layer slides where the file gives a window.
"""

from __future__ import annotations

from worker_orcd.models import blocks
from worker_orcd.models.blocks import Builder
from worker_orcd.models.hparams import Arch, HParams


def phi3(b: Builder, hp: HParams) -> None:
    """x += attention(norm(x)); x += ffn(norm(x))."""
    blocks.decoder(b, hp, blocks.attention, blocks.ffn)


ROWS = (Arch("phi3", phi3, window="all"),)
