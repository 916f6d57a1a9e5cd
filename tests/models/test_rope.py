"""LongRoPE: a sequence turns by the frequencies of its length, also when it becomes long while it is generated."""

from __future__ import annotations

from helpers import long_rope


def test_short_and_long_sequences_on_the_cpu(goldens_dir, tmp_path):
    long_rope.check(long_rope.write(goldens_dir / "phi3-Q8_0.gguf", tmp_path / "long.gguf"), "cpu")
