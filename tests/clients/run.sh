#!/usr/bin/env bash
# The clients that people use, against `worker-orcd serve` with a model on the CPU (or DEVICE=cuda:0).
#   tests/clients/run.sh [MODEL] [pytest arguments]
# They get a virtual environment of their own, build/clients-venv. $WORKER_ORCD_PYTHON has the package: default .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${WORKER_ORCD_PYTHON:-.venv/bin/python}"
models="${WORKER_ORCD_MODELS:-$HOME/.cache/worker-orcd/models}"
model="${1:-$models/smollm2-135m-instruct-q4_1.gguf}"
tests/clients/install.sh
exec env PYTHONSAFEPATH=1 "$python" tests/clients/run.py --model "$model" --device "${DEVICE:-cpu}" \
  --clients build/clients-venv/bin/python "${@:2}"
