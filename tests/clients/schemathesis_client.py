"""schemathesis: the OpenAPI document is true. Answers are as it says, and nothing that it allows is a server error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from target import KEY, URL, ask


def test_the_document_names_every_route():
    paths = ask("/openapi.json")["paths"]
    assert {"/execute", "/cancel", "/health", "/v1/models", "/v1/completions", "/v1/chat/completions"} <= set(paths)


def test_schemathesis_finds_nothing(tmp_path):
    done = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            "run",
            f"{URL}/openapi.json",
            *("--header", f"Authorization: Bearer {KEY}"),
            *("--exclude-path", "/shutdown"),
            *("--max-examples", "12"),
            *("--seed", "1"),
            *("--workers", "2"),
            *("--request-timeout", "60"),
            *("--suppress-health-check", "all"),
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
