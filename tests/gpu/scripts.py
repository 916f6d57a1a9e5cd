"""Runs tests/gpu/fault_scripts.py and the command line in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "fault_scripts.py"


def run_script(what: str, model: Path, gpu: int, seconds: int = 60, **env: str) -> dict[str, Any]:
    """The JSON object that the script prints. It must end by itself, with 0."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(model), str(gpu), str(seconds)],
        capture_output=True,
        text=True,
        timeout=seconds + 180,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def run_cli(*args: object, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """`worker-orcd ARGS`."""
    return subprocess.run(
        [sys.executable, "-m", "worker_orcd", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **env},
    )
