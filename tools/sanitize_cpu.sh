#!/usr/bin/env bash
# sanitize_cpu.sh [pytest options]: hostile files, the token ring, the way of tokens to clients and the driver layer (on
# its stand-in) against extensions built with AddressSanitizer and UBSan (the CPU's kernels without). Any report ends the
# process that made it, and so the run. Leaks are not looked for (the interpreter's own drown ours), and memory is not
# measured (the sanitizer takes its own).
set -euo pipefail
cd "$(dirname "$0")/.."
site=build/sanitize/site
echo "Building instrumented extensions into $site." >&2
rm -rf "$site"
mkdir -p build
WORKER_ORCD_SANITIZE=address,undefined .venv/bin/pip install -v --disable-pip-version-check --no-deps --target "$site" . \
  >build/sanitize.log 2>&1 || { tail -n 60 build/sanitize.log >&2; exit 1; }
# the libraries of the package, without the package
.venv/bin/python -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >build/requirements.txt
.venv/bin/pip install -q --disable-pip-version-check -r build/requirements.txt
# libstdc++ too: ASan's interceptor of C++ exceptions needs it to be there from the start
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=0:allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$PWD/$site" PYTHONSAFEPATH=1 WORKER_ORCD_SANITIZED=1
export WORKER_ORCD_REQUIRE_MODELS=0
tests=(tests/gguf tests/tokenizer tests/compiled/test_{ring,text,output,driver}.py)
LD_PRELOAD="$preload" .venv/bin/python -m pytest -p no:cacheprovider -q -k "not little_memory" "${tests[@]}" "$@"
