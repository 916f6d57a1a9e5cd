"""GPT-2: LayerNorm with bias, learned positions, biases, a plain tanh-GELU MLP."""

from __future__ import annotations

from worker_orcd.models import blocks
from worker_orcd.models.blocks import Builder
from worker_orcd.models.hparams import Arch, HParams


def gpt2(b: Builder, hp: HParams) -> None:
    """x += attention(norm(x)); x += ffn(norm(x))."""
    blocks.decoder(b, hp, blocks.attention, blocks.ffn)


ROWS = (
    Arch("gpt2", gpt2, norm="layer", rope_type="", qkv_bias="yes", out_bias="yes", ffn_bias="yes", ffn="mlp",
         act="gelu_tanh"),
)  # fmt: skip
