#!/usr/bin/env bash
# mypy over the package under the names it is installed by: wsgi/ is worker_orcd.wsgi, which no setting of mypy can say.
# Links in build/types say it; the paths that are printed are those of the source tree. The rest is in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/mypy ] || { echo "mypy is not in .venv: make lint installs it" >&2; exit 1; }
names=build/types/worker_orcd
rm -rf "$names"
mkdir -p "$names"
ln -s "$PWD"/worker_orcd/* "$PWD/wsgi" "$names"
.venv/bin/mypy "$@" | sed -E 's#^build/types/##; s#^worker_orcd/wsgi/#wsgi/#'
