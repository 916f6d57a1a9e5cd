"""A reference file made into a model that clients can talk to: with a chat template, and a context of any length."""

from __future__ import annotations

from pathlib import Path

from helpers.gguf_forge import STR, U32
from helpers.golden_forge import take_apart

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def write(goldens_dir: Path, to: Path, n_context: int, template: str = TEMPLATE) -> Path:
    """Write the file to the folder `to`, and return its path."""
    forge = take_apart(goldens_dir / "llama-Q4_0.gguf")
    forge.put("llama.context_length", U32, n_context).put("tokenizer.chat_template", STR, template)
    path = to / "tiny-chat.gguf"
    path.write_bytes(forge.build())
    return path
