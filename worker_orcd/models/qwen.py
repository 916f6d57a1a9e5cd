"""Qwen 2 (biases on q, k and v) and Qwen 3 (norms of q and k heads instead): RMSNorm, rotation of halves, SwiGLU.

Files of architecture qwen2 also hold Llama-like models that rotate halves (KORMo); those have no biases.
"""

from __future__ import annotations

from worker_orcd.models import blocks
from worker_orcd.models.blocks import Builder
from worker_orcd.models.hparams import Arch, HParams


def qwen(b: Builder, hp: HParams) -> None:
    """x += attention(norm(x)); x += ffn(norm(x)), or the experts of a row that has them."""
    blocks.decoder(b, hp, blocks.attention, blocks.moe if hp.arch.ffn == "moe" else blocks.ffn)


ROWS = (
    Arch("qwen2", qwen, qkv_bias="maybe"),
    Arch("qwen3", qwen, qk_norm=True),
)
