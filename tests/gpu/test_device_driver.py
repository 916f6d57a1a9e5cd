"""The driver layer on a real GPU: the shared cases, and what only hardware can show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.driver_cases import *  # noqa: F403

import worker_orcd
from worker_orcd import _driver

FATBINS = Path(worker_orcd.__file__).parent / "fatbins"


@pytest.fixture(autouse=True)
def context(gpu: int):
    with _driver.Context(gpu) as made:
        yield made


def test_every_packaged_image_loads(context):
    names = sorted(json.loads((FATBINS / "manifest.json").read_text()))
    assert names
    for name in names:
        assert context.load(name).name == name


def test_what_the_device_says(context):
    assert context.capability >= (8, 0) and context.sm_count > 0 and context.max_smem >= 99 * 1024
    assert context.name and _driver.driver_version() >= (13, 0)


def test_managed_memory_is_told_from_device_memory(context):
    planted = _driver.DeviceMemory(context, 4096, "planted", True)
    assert planted.residency()["managed"]


def test_copy_bandwidth_is_measured(context):
    rate = _driver.device_copy_gbps(context, 256 << 20, 5)
    print(f"device-to-device copy, bytes read and written: {rate:.0f} GB/s")
    assert rate > 50


def test_a_poisoned_context_is_sticky(gpu: int):
    """In a process of its own: a kernel's bad address cannot be undone."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import struct
from worker_orcd import _driver, errors
c = _driver.Context({gpu})
s = c.stream()
k = c.load("repack").kernel("repack_q8_0")
k.launch(s, (1, 1, 1), 256, 0, struct.pack("<QQq4i", 0x10, 0x10, 34, 32, 1, 0, 1))  # RepackParams: one block
try:
    s.synchronize()
except errors.CudaError as e:
    print(e.sticky, e.fields["status_name"])
try:
    c.allocate(10)
except errors.CudaError as e:
    print(e.sticky)
c.close()
""",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["True", "CUDA_ERROR_ILLEGAL_ADDRESS", "True"], done.stdout + done.stderr
