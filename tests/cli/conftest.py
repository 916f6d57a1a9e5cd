"""What the tests of several commands run."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def golden(goldens_dir):
    return goldens_dir / "llama-Q4_0.gguf"
