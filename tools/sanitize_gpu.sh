#!/usr/bin/env bash
# sanitize_gpu.sh [pytest options]: compute-sanitizer's four tools over a short engine run and a part of the kernel tests.
# One report of any tool fails the run; all four run whatever happens. The tools slow kernels down up to a hundredfold,
# so only every ninth kernel test is taken, and each process has a time limit.
#
#   PYTHON                 interpreter that has the package (.venv/bin/python)
#   WORKER_ORCD_GOLDENS    the tiny reference models (../shared/goldens)
#   SANITIZE_TOOLS         "memcheck racecheck initcheck synccheck"
#   SANITIZE_EVERY         9: every n-th kernel test; 1: all
#   SANITIZE_LIMIT         240: seconds for one tool on one process
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
goldens=${WORKER_ORCD_GOLDENS:-../shared/goldens}
limit=${SANITIZE_LIMIT:-240}
tool=$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
[ -n "$tool" ] || { echo "compute-sanitizer was not found; it comes with the CUDA toolkit" >&2; exit 1; }
models=()
for name in llama-Q4_K_M llama-F16 qwen2-Q8_0 qwen2-Q4_0 gpt-oss-MXFP4; do
  [ -f "$goldens/$name.gguf" ] && models+=("$goldens/$name.gguf")
done
[ ${#models[@]} -gt 0 ] || { echo "the reference models are not in $goldens (WORKER_ORCD_GOLDENS)" >&2; exit 1; }
export WORKER_ORCD_REQUIRE_GPU=1 WORKER_ORCD_TEST_EVERY=${SANITIZE_EVERY:-9}
export PYTHONPATH="$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"

failed=0
summary=()
under() { # under TOOL LABEL OPTIONS... -- COMMAND...
  local check=$1 label=$2 options=() code began=$SECONDS result
  shift 2
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  echo "== $check: $label" >&2
  timeout -k 10 "$limit" "$tool" --tool "$check" "${options[@]}" --error-exitcode 86 --target-processes all \
    --print-limit 20 "$@"
  code=$?
  case $code in
    0) result="no report" ;;
    86) result="REPORTS" ;;
    124 | 137) result="not done in $limit s" ;;
    *) result="failed with $code" ;;
  esac
  [ $code -eq 0 ] || failed=1
  summary+=("$(printf '%-10s %-8s %5d s  %s' "$check" "$label" $((SECONDS - began)) "$result")")
}

for check in ${SANITIZE_TOOLS:-memcheck racecheck initcheck synccheck}; do
  engine=() kernels=()
  # calls that are refused on purpose are no reports; what the engine run leaves behind is one
  [ "$check" = memcheck ] && engine=(--report-api-errors no --leak-check full) kernels=(--report-api-errors no)
  under "$check" engine "${engine[@]}" -- "$python" tests/gpu/sanitize_run.py "${models[@]}"
  under "$check" kernels "${kernels[@]}" -- "$python" -m pytest -p no:cacheprovider -q -m "gpu and not slow_gpu" \
    tests/gpu/test_matmul.py tests/gpu/test_norm_rope.py tests/gpu/test_attention.py tests/gpu/test_sample.py "$@"
done
printf '%s\n' "" "${summary[@]}" >&2
exit $failed
