#!/usr/bin/env bash
# gguf drops an empty array without a word.
#
# Versions   gguf 0.19.0 (its GGUFWriter and GGUFReader)
# Expected   add_array("test.empty", []) writes a key whose value is an array of no elements, which the format allows,
#            or it refuses. A reader can then tell "none" from "not said".
# Behaviour  the key is not in the file; nothing is raised, warned or logged.
# Matters    where the absence of a key has a meaning of its own: a converter that writes an empty list of merges or of
#            added tokens makes a file in which that list is missing.
# Output seen on 2026-11-28:
#   keys written: test.before test.empty test.after
#   keys read:    test.before test.after
#   as found: test.empty is not in the file
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0
cd "$work"
venv/bin/python - <<'PY'
import sys

import gguf

arrays = {"test.before": [1], "test.empty": [], "test.after": [2]}
writer = gguf.GGUFWriter("x.gguf", "llama")
for key, value in arrays.items():
    writer.add_array(key, value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

found = [key for key in gguf.GGUFReader("x.gguf").fields if key.startswith("test.")]
print("keys written:", *arrays)
print("keys read:   ", *found)
if found != ["test.before", "test.after"]:
    sys.exit("changed: the empty array is no longer dropped")
print("as found: test.empty is not in the file")
PY
