#!/usr/bin/env bash
# gguf reads the MXFP4 scale that means NaN as the number 2^128.
#
# Versions   gguf 0.19.0 (gguf.quants.dequantize), numpy 2.4.6
# Expected   the OCP Microscaling specification (MX 1.0): a scale byte of 255 (E8M0) is NaN, and then every element of
#            the block is NaN.
# Behaviour  the byte is taken as an exponent like any other. Small elements become finite numbers near 2^127, elements
#            of 1 and more infinity, zero stays zero. Bytes 0 to 254 are exact, as far as float32 reaches.
# Matters    to whoever takes this function as the reference of a decoder: its answers hold for scale bytes 0 to 254.
# Output seen on 2026-11-28:
#   scale 127: 0.0 0.5 1.0 6.0
#   scale 254: 0.0 8.507059e+37 1.7014118e+38 inf
#   scale 255: 0.0 1.7014118e+38 inf inf
#   as found: no NaN in a block whose scale is NaN
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PY'
import sys
import warnings

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

warnings.simplefilter("ignore", RuntimeWarning)  # numpy tells of the overflow to infinity
values = {}
for scale in (127, 254, 255):
    # a block is the scale byte and 16 bytes of two codes each, low halves first: 0 -> 0, 1 -> 0.5, 2 -> 1, 7 -> 6
    block = np.array([[scale, 0, 1, 2, 7, *[0] * 12]], np.uint8)
    values[scale] = dequantize(block, GGMLQuantizationType.MXFP4)[0, :4]
    print(f"scale {scale}:", *values[scale])
if list(values[127]) != [0, 0.5, 1, 6]:
    sys.exit("changed: the layout of the block is another")
if np.isnan(values[255]).any():
    sys.exit("changed: a scale byte of 255 gives NaN")
print("as found: no NaN in a block whose scale is NaN")
PY
