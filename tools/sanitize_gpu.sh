#!/usr/bin/env bash
# sanitize_gpu.sh [pytest options]: compute-sanitizer's four tools over the GPU tests. One report fails the run.
# Tests marked "slow_gpu" are left out: the tools slow a kernel down up to a hundredfold.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
[ -n "$tool" ] || { echo "compute-sanitizer was not found; it comes with the CUDA toolkit" >&2; exit 1; }
for check in memcheck racecheck initcheck synccheck; do
  echo "== $check" >&2
  extra=()
  [ $check = memcheck ] && extra=(--leak-check full)
  WORKER_ORCD_REQUIRE_GPU=1 "$tool" --tool "$check" "${extra[@]}" --error-exitcode 86 --target-processes all \
    --print-limit 20 "$python" -m pytest -p no:cacheprovider -q -m "gpu and not slow_gpu" "$@" ||
    { echo "$check: failed" >&2; exit 1; }
done
echo "all four tools: no report" >&2
