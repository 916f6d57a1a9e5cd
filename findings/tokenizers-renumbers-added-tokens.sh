#!/usr/bin/env bash
# tokenizers gives added tokens other ids than their tokenizer.json says, and may give two tokens one id.
#
# Versions   tokenizers 0.23.3
# Expected   an added token has the `id` that stands beside its `content` in tokenizer.json, where `Tokenizer.save` puts both,
#            or the file is refused.
# Behaviour  `id` is not used. An added token that is not in the model's vocabulary gets the number of tokens so far, which
#            is the `id` only where ids have no gaps. With a gap it is another one, and it may be one that is taken. Nothing
#            is raised, and nothing is printed.
# Matters    where a vocabulary was padded to a round number, or tokens were taken out of it: ids that a model was trained
#            with are not those that its tokenizer gives. Compare `token_to_id` with the file after loading.
# Output seen on 2026-11-29:
#   no gap:                  file {'<q>': 2, '<r>': 3}, tokenizer {'<q>': 2, '<r>': 3}
#   gap before added tokens: file {'<q>': 10, '<r>': 11}, tokenizer {'<q>': 2, '<r>': 3}
#   gap in the vocabulary:   file {'<q>': 10, '<r>': 11}, tokenizer {'<q>': 3, '<r>': 4}, and 'c' is 3
#   as found: past a gap the ids of the file are not kept
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
cd "$work"
venv/bin/python - <<'PY'
import json
import sys

from tokenizers import Tokenizer


def load(vocab, added):
    """The tokenizer of a tokenizer.json with these tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [{"id": i, "content": text, **plain} for text, i in added.items()],
                "model": {"type": "BPE", "vocab": vocab, "merges": []},
            }
        )
    )


def ids(tokenizer, texts):
    encoded = {text: tokenizer.encode(text).ids for text in texts}
    if any(encoded[text] != [tokenizer.token_to_id(text)] for text in texts):
        sys.exit(f"changed: encode and token_to_id differ: {encoded}")
    return {text: found[0] for text, found in encoded.items()}


near, far = {"<q>": 2, "<r>": 3}, {"<q>": 10, "<r>": 11}
whole, before = ids(load({"a": 0, "b": 1}, near), near), ids(load({"a": 0, "b": 1}, far), far)
holed = load({"a": 0, "b": 9, "c": 3}, far)
inside, c = ids(holed, far), holed.token_to_id("c")
print(f"no gap:                  file {near}, tokenizer {whole}")
print(f"gap before added tokens: file {far}, tokenizer {before}")
print(f"gap in the vocabulary:   file {far}, tokenizer {inside}, and 'c' is {c}")
if whole != near or before != near or inside != {"<q>": 3, "<r>": 4} or c != 3:
    sys.exit("changed: added tokens get other ids")
print("as found: past a gap the ids of the file are not kept")
PY
