#!/usr/bin/env bash
# transformers and gguf read `add_bos_token` of one tokenizer directory differently.
#
# Versions   transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0 (gguf.SpecialVocab, which the converters to GGUF use)
# Expected   a directory with a byte-level BPE `tokenizer.json` and `add_bos_token` in `tokenizer_config.json` gives the same
#            ids in transformers and in a GGUF file made of it.
# Behaviour  transformers puts a BOS token in front where the post-processor of tokenizer.json does, and only there; the
#            key changes nothing, true or false. gguf obeys the key and writes it as `tokenizer.ggml.add_bos_token`, so
#            that programs that read GGUF put the token in front, or leave it out, as the key says.
# Matters    logits of such a GGUF file, compared with those of transformers for the same text, differ from the first
#            position on: give both the same token ids.
# Output seen on 2026-11-29:
#   key true, post-processor without BOS
#     transformers: ['a', 'b']
#     gguf:         add_bos_token True, bos_token_id 0
#   key false, post-processor with BOS
#     transformers: ['<s>', 'a', 'b']
#     gguf:         add_bos_token False, bos_token_id 0
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
found = []
for key, writes_bos in ((True, False), (False, True)):
    tokenizer = Tokenizer(models.BPE({"<s>": 0, **{c: n + 1 for n, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    if writes_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save("model/tokenizer.json")
    with open("model/tokenizer_config.json", "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "add_bos_token": key}, f)

    loaded = AutoTokenizer.from_pretrained("model")
    tokens = loaded.convert_ids_to_tokens(loaded("ab")["input_ids"])
    special = SpecialVocab("model")
    adds, bos = special.add_special_token.get("bos"), special.special_token_ids.get("bos")
    print(f"key {str(key).lower()}, post-processor {'with' if writes_bos else 'without'} BOS")
    print("  transformers:", tokens)
    print(f"  gguf:         add_bos_token {adds}, bos_token_id {bos}")
    found.append((tokens, adds, bos))
if found != [(["a", "b"], True, 0), (["<s>", "a", "b"], False, 0)]:
    sys.exit("changed: they read the key in another way")
print("as found: only gguf obeys add_bos_token")
PY
