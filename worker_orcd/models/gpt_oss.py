"""gpt-oss: RMSNorm, YaRN without rounding, sinks, even layers slide, a mixture of experts with a clamped SwiGLU."""

from __future__ import annotations

from worker_orcd.models import blocks
from worker_orcd.models.blocks import Builder
from worker_orcd.models.hparams import Arch, HParams


def gpt_oss(b: Builder, hp: HParams) -> None:
    """x += attention(norm(x)); x += moe(norm(x))."""
    blocks.decoder(b, hp, blocks.attention, blocks.moe)


ROWS = (
    Arch("gpt-oss", gpt_oss, qkv_bias="yes", out_bias="yes", ffn_bias="yes", ffn="moe", act="swiglu_oai",
         ffn_norm="post_attention_norm", sinks=True, window="even", yarn_truncate=False),
)  # fmt: skip
