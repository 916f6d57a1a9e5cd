"""Stand-ins of a worker, and tabs in which nothing may go wrong."""

from __future__ import annotations

import pytest
from service.page.steps import READY
from service.page_stand_in import PageWorker


@pytest.fixture
def serve():
    """Start stand-ins, with `PageWorker`'s arguments, that are gone after the test."""
    workers = []

    def make(**kwargs):
        workers.append(PageWorker(**kwargs))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def open_page(browser):
    """Open a page in a tab of its own; after the test nothing may have gone wrong in it, and no other host been asked.

    An answer that is an error is shown in red by the browser itself; `network=False` says that the test has such.
    """
    tabs = []

    def make(worker, network=True, ready=True, **kwargs):
        tab = browser.tab(**kwargs)
        tabs.append((tab, worker, network))
        tab.open(worker.url)
        if ready:
            tab.wait(READY)
        return tab

    yield make
    for tab, worker, network in tabs:
        faults, hosts = tab.faults(network), tab.hosts()
        tab.close()
        assert faults == [] and hosts <= {worker.url.split("/")[2]}
