"""What test_on_cpu.py runs begins when the first test of all does, and its tests come last: its processes have the time
that the others leave the processor, and hold none of them up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels_on_cpu.background import Background

import worker_orcd

FILE = Path(__file__).resolve().parent / "test_on_cpu.py"
_BACKGROUND = pytest.StashKey[Background]()


def is_mine(item: pytest.Item) -> bool:
    return item.path == FILE


def hindrance() -> str | None:
    """Why nothing can be run."""
    if shutil.which("g++") is None or shutil.which("objcopy") is None:
        return "the kernels are compiled by g++ and objcopy"
    if not (Path(worker_orcd.__file__).parent / "fatbins" / "manifest.json").exists():
        return "no kernels are installed: the engine would not look for a GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=is_mine)


def pytest_collection_finish(session: pytest.Session) -> None:
    mine = [item for item in session.items if is_mine(item)]
    if mine and hindrance() is None and not session.config.option.collectonly:
        cases = [item.callspec.params["case"] for item in mine]
        session.config.stash[_BACKGROUND] = Background({case: mine[0].module.command(*case) for case in cases})


def pytest_unconfigure(config: pytest.Config) -> None:
    if (background := config.stash.get(_BACKGROUND, None)) is not None:
        background.close()


@pytest.fixture(scope="session")
def background(request: pytest.FixtureRequest) -> Iterator[Background]:
    """The runs of the tests that were chosen, under way."""
    if (why := hindrance()) is not None:
        pytest.skip(why)
    return request.config.stash[_BACKGROUND]
