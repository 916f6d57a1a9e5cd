"""pytest of GPU tests with the kernels on the CPU; see run.sh."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build

if __name__ == "__main__":
    try:
        build.build()
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[1:]]
    environment = {**os.environ, **build.environment(), "WORKER_ORCD_REQUIRE_GPU": "1"}
    if not list((build.ROOT / "worker_orcd").glob("_driver*.so")):
        environment["PYTHONSAFEPATH"] = "1"  # the installed package, as in the Makefile
    os.execve(sys.executable, command, environment)
