#!/bin/bash
# Runs GPU tests on this machine's CPU: builds what changed, then pytest with the stand-in driver in place.
#
#   tests/kernels_on_cpu/run.sh tests/gpu/test_matmul.py -k q4_k -x -q
#
# KERNELS_ON_CPU_ORDER=7 runs blocks, warps and threads in another order, which a missing barrier cannot stand.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" tests/kernels_on_cpu/run.py "$@"
