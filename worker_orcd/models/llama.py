"""Llama: RMSNorm, rotation of neighbours (GGUF stores q and k rows permuted for it), SwiGLU."""

from __future__ import annotations

from worker_orcd.models import blocks
from worker_orcd.models.blocks import Builder
from worker_orcd.models.hparams import Arch, HParams


def llama(b: Builder, hp: HParams) -> None:
    """x += attention(norm(x)); x += ffn(norm(x))."""
    blocks.decoder(b, hp, blocks.attention, blocks.ffn)


ROWS = (Arch("llama", llama, rope_type="interleaved", qkv_bias="maybe", out_bias="maybe", ffn_bias="maybe"),)
