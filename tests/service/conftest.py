"""Servers for one test each."""

from __future__ import annotations

import pytest

from service.client import fake_worker


@pytest.fixture
def start():
    """Start fake workers, with `fake_worker`'s arguments, that are gone after the test, whatever it does."""
    workers = []

    def make(*args, **kwargs):
        workers.append(fake_worker(*args, **kwargs))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()
