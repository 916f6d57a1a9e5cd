"""What the engine's cases share."""

from __future__ import annotations

import pytest

from worker_orcd import _driver
from worker_orcd.engine.protocol import EngineConfig
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan


@pytest.fixture
def tiny(goldens_dir):
    """(open file, plan, config) of a tiny model."""
    with ModelFile(goldens_dir / "llama-Q4_K_M.gguf") as file:
        built = plan.build(file)
        yield file, built, EngineConfig(4, 64, 256, tuple(16 for _ in built.kv_groups))


@pytest.fixture(autouse=True)
def faults_off():
    yield
    _driver._fail_nth(0)
