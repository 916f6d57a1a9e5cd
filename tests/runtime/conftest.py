"""A model with an engine that only computes digests."""

from __future__ import annotations

import pytest
from helpers.fake_engine import FakeEngine

from worker_orcd.runtime import devices


@pytest.fixture
def engines(monkeypatch):
    """Every LLM of the test gets a fake engine; they are listed here."""
    made: list[FakeEngine] = []

    def open_engine(device, model_file, plan, config, **_):
        made.append(FakeEngine(config, plan.kv_groups, plan.n_vocab))
        return made[-1]

    monkeypatch.setattr(devices, "open_engine", open_engine)
    return made
