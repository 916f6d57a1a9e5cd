#!/usr/bin/env bash
# build_wheel.sh DIR: build the wheel into DIR with .venv's pip, showing what is being compiled. The compilers (nvcc and
# Cython) come as build requirements into an environment of their own; only g++ must be on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v g++ >/dev/null || { echo "g++ was not found (on Debian: apt-get install g++)" >&2; exit 1; }
mkdir -p build "$1"
log=build/wheel.log
echo "Building the wheel: fetching the compilers first (nvcc, Cython), then compiling. Whole log: $log" >&2
: > "$log"
.venv/bin/pip wheel -v --disable-pip-version-check --no-deps -w "$1" . >"$log" 2>&1 &
build=$!
trap 'kill $build 2>/dev/null || true' INT TERM
tail -n +1 --pid=$build -f "$log" | sed -un 's/^ *worker-orcd build: /  /p' >&2 || true
wait $build || { tail -n 60 "$log" >&2; echo "The build failed; the whole log is $log" >&2; exit 1; }
ls -1 "$1"/*.whl >&2
