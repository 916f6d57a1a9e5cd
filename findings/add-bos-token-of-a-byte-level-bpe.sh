#!/usr/bin/env bash
# transformers and gguf read `add_bos_token` of one tokenizer directory differently.
#
# Versions   transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0 (gguf.SpecialVocab, which the converters to GGUF use)
# Expected   a directory with a byte-level BPE `tokenizer.json` and `"add_bos_token": true` in `tokenizer_config.json` gives
#            the same ids in transformers and in a GGUF file made of it.
# Behaviour  transformers puts a BOS token in front only where the post-processor of tokenizer.json does; the key changes
#            nothing. gguf obeys the key and writes `tokenizer.ggml.add_bos_token = true`, so that programs that read
#            GGUF put the token in front.
# Matters    logits of such a GGUF file, compared with those of transformers for the same text, differ from the first
#            position on: give both the same token ids.
# Output seen on 2026-11-28:
#   transformers: ['a', 'b']
#   gguf:         add_bos_token True, bos_token_id 0
#   as found: only gguf obeys add_bos_token
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0
cd "$work"
mkdir model
venv/bin/python - 2>stderr.txt <<'PY' || { cat stderr.txt >&2; exit 1; }
import json
import sys

from gguf import SpecialVocab
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({"<s>": 0, **{c: n + 1 for n, c in enumerate(alphabet)}}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<s>"])
tokenizer.save("model/tokenizer.json")
with open("model/tokenizer_config.json", "w") as f:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_bos_token": True}, f)

loaded = AutoTokenizer.from_pretrained("model")
tokens = loaded.convert_ids_to_tokens(loaded("ab")["input_ids"])
special = SpecialVocab("model")
adds, bos = special.add_special_token.get("bos"), special.special_token_ids.get("bos")
print("transformers:", tokens)
print(f"gguf:         add_bos_token {adds}, bos_token_id {bos}")
if tokens != ["a", "b"] or adds is not True or bos != 0:
    sys.exit("changed: they read the key in another way")
print("as found: only gguf obeys add_bos_token")
PY
