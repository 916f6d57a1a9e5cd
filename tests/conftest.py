"""Fixtures and rules of the whole suite: where reference files and models are, and when a skip is a failure.

    goldens_dir         the reference files: $WORKER_ORCD_GOLDENS, else ../shared/goldens beside the repository
    model_path(name)    a real model, "smollm2" or "qwen": in $WORKER_ORCD_MODELS, else ~/.cache/worker-orcd/models
    browser             headless Chromium

A test that uses one of them is marked `goldens`, `model` or `browser` by that. Where they are absent it is skipped and
says why. It fails instead with WORKER_ORCD_REQUIRE_MODELS=1, and in CI (CI=true) where the files are there;
WORKER_ORCD_REQUIRE_GPU=1 does the same for `gpu` tests, and in CI a `browser` test always has to run.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import worker_orcd

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"smollm2": "smollm2-135m-instruct-q4_1.gguf", "qwen": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"}
#: fixture -> the marker of the tests that use it
_MARKERS = {"model_path": "model", "goldens_dir": "goldens", "browser": "browser", "gpu": "gpu"}

# Processes that tests start must find the package that is tested here: the installed one, and not the source tree that
# may be their working directory; or the source tree where it is tested in place.
if Path(worker_orcd.__file__).resolve().is_relative_to(ROOT / "worker_orcd"):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
else:
    os.environ["PYTHONSAFEPATH"] = "1"

# A runner started in the background hands down an ignored Ctrl-C, which processes that tests start would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _goldens() -> Path:
    return Path(os.environ.get("WORKER_ORCD_GOLDENS") or ROOT.parent / "shared" / "goldens").expanduser()


def _models() -> Path:
    return Path(os.environ.get("WORKER_ORCD_MODELS") or "~/.cache/worker-orcd/models").expanduser()


def _required(marker: str) -> bool:
    """Whether a test of this marker that does not run is a failure."""
    if marker == "gpu":
        return os.environ.get("WORKER_ORCD_REQUIRE_GPU") == "1"
    if marker == "browser":
        return os.environ.get("CI") == "true"
    if os.environ.get("WORKER_ORCD_REQUIRE_MODELS") == "1":
        return True
    if os.environ.get("CI") != "true" or os.environ.get("WORKER_ORCD_REQUIRE_MODELS") == "0":
        return False
    if marker == "goldens":
        return _goldens().is_dir()
    return all((_models() / name).is_file() for name in MODELS.values())


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """The directory of the reference files."""
    where = _goldens()
    if not where.is_dir():
        pytest.skip(f"the reference files are not in {where} (WORKER_ORCD_GOLDENS)")
    return where


@pytest.fixture(scope="session")
def model_path():
    """A function: name -> path of a real model file."""

    def find(name: str) -> Path:
        path = _models() / MODELS[name]
        if not path.is_file():
            pytest.skip(f"the model {path} is not there (WORKER_ORCD_MODELS)")
        return path

    return find


@pytest.fixture
def call(capsys):
    """A function: arguments of `worker-orcd` -> (exit code, stdout, stderr)."""
    from worker_orcd.cli import main

    def run(*args):
        code = main.run([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A running `helpers.chromium.Browser`."""
    from helpers import chromium

    if chromium.find() is None:
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium)")
    running = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def gpu() -> int:
    """Index of the GPU to test on."""
    return int(os.environ.get("WORKER_ORCD_TEST_GPU", "0"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use and by their directory; skip GPU tests where there is no GPU."""
    gpu_dir = Path(__file__).parent / "gpu"
    usable: bool | None = None
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for fixture, marker in _MARKERS.items():
            if fixture in fixtures:
                item.add_marker(marker)
        if item.path.is_relative_to(gpu_dir):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu"):
            if usable is None:
                usable = _has_gpu()
            if not usable:
                item.add_marker(pytest.mark.skip(reason="there is no GPU that the compiled kernels fit"))


def _has_gpu() -> bool:
    from worker_orcd.diagnose import doctor

    return doctor.has_gpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Turn the skip of a test that had to run into a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        for marker in _MARKERS.values():
            if item.get_closest_marker(marker) and _required(marker):
                report.outcome = "failed"
                report.longrepr = f"had to run but was skipped: {report.longrepr[-1]}"
                break
    return report
