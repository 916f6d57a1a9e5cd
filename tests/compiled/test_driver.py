"""The driver layer and the uploader on a machine with no GPU: on a stand-in libcuda.so.1 that is compiled here, and
with no driver at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory) -> Path:
    """The folder of the compiled stand-in."""
    if shutil.which("gcc") is None:
        pytest.skip("the stand-in driver needs gcc")
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(
        [
            "gcc",
            "-shared",
            "-fPIC",
            "-O1",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            folder / "libcuda.so.1",
            TESTS / "fake_driver" / "libcuda.c",
            "-lpthread",
        ],
        check=True,
    )
    return folder


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": path, "WORKER_ORCD_FAULTS": "1", **env},
    )


def test_driver_layer_and_uploader_on_the_stand_in(fake_driver: Path):
    done = run(fake_driver, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "fake_driver" / "cases.py"))
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("cases", ["engine_cases.py", "launch_cases.py", "bench_cases.py"])
def test_engine_starts_and_ends_on_the_stand_in(fake_driver: Path, cases: str):
    done = run(
        fake_driver,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        str(TESTS / "fake_driver" / cases),
        FAKE_CUDA_ANY_KERNEL="1",
    )
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-2])


TRY = """
import sys
from worker_orcd import _driver, errors
try:
    _driver.Context(int(sys.argv[1]))
except errors.CudaError as e:
    print(e.fields["status_name"], "|", e)
"""


@pytest.mark.parametrize(
    ("env", "index", "said"),
    [
        ({"FAKE_CUDA_DEVICES": "0"}, "0", "CUDA_ERROR_NO_DEVICE | the NVIDIA driver finds no GPU"),
        (
            {"FAKE_CUDA_DEVICES": "2"},
            "2",
            "CUDA_ERROR_INVALID_DEVICE | GPU 2 does not exist: this machine has 2 (0..1)",
        ),
        ({}, "-1", "CUDA_ERROR_INVALID_DEVICE | GPU -1 does not exist: this machine has 1"),
    ],
)
def test_no_gpu_and_wrong_index(fake_driver: Path, env: dict[str, str], index: str, said: str):
    done = run(fake_driver, "-c", TRY, index, **env)
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert len(done.stdout.strip().splitlines()) == 1


def test_no_driver(tmp_path: Path):
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library")  # found first, where a real driver is installed too
    done = run(tmp_path, "-c", TRY, "0")
    assert done.stdout.startswith("NO_DRIVER | no NVIDIA driver"), done.stdout + done.stderr
    assert "libcuda.so.1" in done.stdout and len(done.stdout.strip().splitlines()) == 1


FAIL_CALL = """
from worker_orcd import _driver, errors
c = _driver.Context(0)
s = c.stream()
for call in (lambda: c.allocate(10), lambda: c.allocate(10), s.synchronize):
    try:
        call()
        print("fine")
    except errors.CudaError as e:
        print(e.fields["call"], e.fields["status_name"], e.sticky)
    except errors.InsufficientVram as e:
        print(e.code, e.fields["bytes_required"])
c.close()
"""


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            "700",
            ["fine", "cuMemAlloc CUDA_ERROR_ILLEGAL_ADDRESS True", "cuCtxSetCurrent CUDA_ERROR_ILLEGAL_ADDRESS True"],
        ),
        ("1", ["fine", "cuMemAlloc CUDA_ERROR_INVALID_VALUE False", "fine"]),
        ("2", ["fine", "INSUFFICIENT_VRAM 10", "fine"]),
    ],
)
def test_a_fault_set_by_the_environment(fake_driver: Path, status: str, said: list[str]):
    """A call fails when its turn has come; where the status poisons a context, so does everything after it."""
    done = run(fake_driver, "-c", FAIL_CALL, WORKER_ORCD_FAIL_CALL=f"cuMemAlloc:2:{status}")
    assert done.stdout.splitlines() == said, done.stderr
    done = run(fake_driver, "-c", FAIL_CALL, WORKER_ORCD_FAIL_CALL=f"cuMemAlloc:2:{status}", WORKER_ORCD_FAULTS="0")
    assert done.stdout.splitlines() == ["fine"] * 3, done.stderr
