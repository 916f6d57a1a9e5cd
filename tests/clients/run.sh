#!/usr/bin/env bash
# The clients that people use, against `worker-orcd serve` with a model on the CPU (or DEVICE=cuda:0).
#   tests/clients/run.sh [MODEL] [pytest arguments]
# They get a virtual environment of their own, build/clients-venv. $WORKER_ORCD_PYTHON has the package: default .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${WORKER_ORCD_PYTHON:-.venv/bin/python}"
models="${WORKER_ORCD_MODELS:-$HOME/.cache/worker-orcd/models}"
model="${1:-$models/smollm2-135m-instruct-q4_1.gguf}"
venv=build/clients-venv
wanted="$(sha256sum tests/clients/requirements.txt)"
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing the clients in $venv." >&2
  "$python" -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check -r tests/clients/requirements.txt
  echo "$wanted" >"$venv/.installed"
fi
exec env PYTHONSAFEPATH=1 "$python" tests/clients/run.py --model "$model" --device "${DEVICE:-cpu}" \
  --clients "$venv/bin/python" "${@:2}"
