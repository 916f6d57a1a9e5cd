"""Applications without a server: with a model that speaks on command, a tiny real one, and SmolLM2."""

from __future__ import annotations

import pytest

from service.in_process import App
from worker_orcd import LLM


@pytest.fixture
def app():
    app = App().ready()
    yield app
    app.service.stop(0)


def _real(path):
    def load(*_):
        return LLM(path, device="cpu", progress=False, max_seqs=8)

    return App(load, model=str(path), max_seqs=8).ready()


@pytest.fixture(scope="module")
def tiny(goldens_dir):
    app = _real(goldens_dir / "llama-Q4_0.gguf")
    yield app
    app.service.stop(0)


@pytest.fixture(scope="module")
def phi3(goldens_dir):
    app = _real(goldens_dir / "phi3-Q8_0.gguf")
    yield app
    app.service.stop(0)


@pytest.fixture(scope="module")
def smollm2(model_path):
    app = _real(model_path("smollm2"))
    yield app
    app.service.stop(0)
