#!/usr/bin/env bash
# Installs the clients of requirements.txt in build/clients-venv, where they are not; run.sh does it, and CI beforehand.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=build/clients-venv
wanted="$(sha256sum tests/clients/requirements.txt)"
[ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ] || exit 0
echo "Installing the clients in $venv." >&2
mkdir -p build
"${WORKER_ORCD_PYTHON:-.venv/bin/python}" -m venv "$venv"
# most of their modules nobody imports: those that are get compiled then
"$venv/bin/pip" install -q --no-compile --disable-pip-version-check -r tests/clients/requirements.txt
echo "$wanted" >"$venv/.installed"
