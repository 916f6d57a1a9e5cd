"""The uploader on a real GPU: the shared cases, and the speed of the link as a printed figure (no limit on it here)."""

from __future__ import annotations

import os

import pytest
from helpers.upload_cases import *  # noqa: F403
from helpers.upload_cases import PlainFile

from worker_orcd import _driver
from worker_orcd._upload import FileRange, upload


@pytest.fixture
def context(gpu: int):
    with _driver.Context(gpu) as made:
        yield made


@pytest.mark.slow_gpu
def test_speed_from_the_page_cache(context, tmp_path):
    size = 2 << 30
    path = tmp_path / "big"
    block = os.urandom(64 << 20)
    with path.open("wb") as f:
        for _ in range(size // len(block)):
            f.write(block)
    file = PlainFile(path)
    memory = context.allocate(size)
    for chunk in (1 << 20, 4 << 20, 16 << 20):
        for readers in (4, 8, 16):
            stats = upload(context, [FileRange(file, 0, size, memory.pointer)], chunk_bytes=chunk, n_readers=readers)
            print(f"{readers:2} readers, chunks of {chunk >> 20:2} MiB: {stats.gb_per_s:.1f} GB/s")
    tail = bytearray(1 << 20)
    memory.copy_to(tail, size - len(tail))
    assert tail == block[-len(tail) :]
    os.close(file.fd)
