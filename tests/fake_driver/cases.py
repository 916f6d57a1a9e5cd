"""Runs on the stand-in driver only, in a process of tests/compiled/test_driver.py: shared cases, faults, leaks."""

from __future__ import annotations

import ctypes
import gc
import os

import pytest
from helpers.driver_cases import *  # noqa: F403
from helpers.upload_cases import *  # noqa: F403
from helpers.upload_cases import PlainFile

from worker_orcd import _driver
from worker_orcd._upload import FileRange, upload
from worker_orcd.errors import CudaError, InsufficientMemory, InsufficientVram, WorkerError

FAKE = ctypes.CDLL("libcuda.so.1")
FAKE.fake_device_bytes.restype = FAKE.fake_host_blocks.restype = ctypes.c_size_t


def leftovers() -> dict[str, int]:
    gc.collect()
    return {
        "device bytes": FAKE.fake_device_bytes(),
        "host blocks": FAKE.fake_host_blocks(),
        "objects": FAKE.fake_live(),
        "contexts": FAKE.fake_contexts(),
    }


NOTHING = {"device bytes": 0, "host blocks": 0, "objects": 0, "contexts": 0}


@pytest.fixture
def context():
    with _driver.Context(0) as made:
        yield made
    assert leftovers() == NOTHING


@pytest.fixture(autouse=True)
def faults_off():
    yield
    _driver._fail_nth(0)


def test_objects_that_are_dropped_are_freed(context):
    for _ in range(3):
        context.allocate(1000), context.pinned(1000), context.stream(), context.event()
    assert leftovers() == {**NOTHING, "contexts": 1}


def test_two_contexts_of_one_gpu_do_not_free_each_other_s_things():
    a, b = _driver.Context(0), _driver.Context(0)
    memory = b.allocate(1000)
    a.close()
    memory.fill(1)
    b.close()
    assert leftovers() == NOTHING


def test_library_kernel_and_launch(context, tmp_path, monkeypatch):
    library = _driver.Library(context, "test", b"an image")
    kernel = library.kernel("copy", 1000)
    a, b, stream = context.allocate(64), context.allocate(64), context.stream()
    a.fill(6)
    kernel.launch(
        stream,
        (1, 1, 1),
        32,
        0,
        a.pointer.to_bytes(8, "little") + b.pointer.to_bytes(8, "little") + (64).to_bytes(8, "little"),
        True,
    )
    stream.synchronize()
    back = bytearray(64)
    b.copy_to(back)
    assert back == b"\6" * 64
    with pytest.raises(ValueError, match="copy takes 24 bytes of parameters, not 8"):
        kernel.launch(stream, (1, 1, 1), 32, 0, bytes(8))
    with pytest.raises(CudaError, match="cuLibraryGetKernel failed: CUDA_ERROR_NOT_FOUND"):
        library.kernel("nonsense")
    with pytest.raises(CudaError, match="cuFuncSetAttribute"):
        library.kernel("copy", 1 << 20)


def test_a_library_without_code_for_the_gpu_names_the_capability(context, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_NO_IMAGE", "1")
    with pytest.raises(CudaError, match=r"compute capability 9\.0") as e:
        _driver.Library(context, "ops", b"an image")
    assert e.value.fields["compute_capability"] == "9.0"


def test_a_poisoned_context_says_so_everywhere():
    context = _driver.Context(0)
    stream = context.stream()
    kernel = _driver.Library(context, "test", b"an image").kernel("fault")
    kernel.launch(stream, (1, 1, 1), 32, 0, b"")
    with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as e:
        stream.synchronize()
    assert e.value.sticky
    with pytest.raises(CudaError) as e:
        context.allocate(10)
    assert e.value.sticky
    context.close()
    assert _driver.Context(0).memory()[0] > 0


def test_fault_injection_needs_its_switch(monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_FAULTS", "0")
    with pytest.raises(RuntimeError, match="WORKER_ORCD_FAULTS"):
        _driver._fail_nth(1)


OOM = 2


def test_page_locked_memory_that_is_not_there(context):
    _driver._fail_nth(1, "cuMemHostAlloc", OOM)
    with pytest.raises(InsufficientMemory, match="no 4,096 bytes of page-locked memory") as e:
        context.pinned(4096)
    assert e.value.fields["bytes_required"] == 4096 and e.value.fields["bytes_available"] > 0
    assert e.value.code == "INSUFFICIENT_MEMORY"
    assert leftovers() == {**NOTHING, "contexts": 1}


def test_a_gpu_without_room_for_a_context():
    _driver._fail_nth(1, "cuDevicePrimaryCtxRetain", OOM)
    with pytest.raises(InsufficientVram, match="no memory for a context") as e:
        _driver.Context(0)
    assert e.value.fields["bytes_required"] > e.value.fields["bytes_available"] == 0
    assert leftovers() == NOTHING


def test_a_planted_fault_counts_the_calls_of_one_name():
    with _driver.Context(0) as context:
        _driver._fail_nth(2, "cuMemAlloc", OOM)
        context.allocate(1), context.stream(), context.pinned(1)
        with pytest.raises(InsufficientVram):
            context.allocate(1)
        context.allocate(1)


def test_a_load_goes_on_with_fewer_readers(context, tmp_path):
    """Where the second reader gets no page-locked memory, the first does all; the first must get it."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(150_000))
    file, target = PlainFile(path), context.allocate(150_000)
    _driver._fail_nth(2, "cuMemHostAlloc", OOM)
    stats = upload(context, [FileRange(file, 0, 150_000, target.pointer)], chunk_bytes=4096, n_readers=4)
    back = bytearray(150_000)
    target.copy_to(back)
    assert stats.n_readers == 1 and bytes(back) == path.read_bytes()
    _driver._fail_nth(1, "cuMemHostAlloc", OOM)
    with pytest.raises(InsufficientMemory):
        upload(context, [FileRange(file, 0, 150_000, target.pointer)], chunk_bytes=4096, n_readers=4)
    os.close(file.fd)


def test_a_bandwidth_is_measured_in_what_is_free(context, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(64 << 20))
    hog = context.allocate(context.memory()[0] - (8 << 20))
    assert _driver.device_copy_gbps(context, repeat=1) > 0
    hog.close()


def test_every_call_of_a_load_fails_once_and_nothing_is_left(tmp_path):
    """The n-th driver call fails, for every n: one clear error, everything freed, no thread left, no hang."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(150_000))
    file = PlainFile(path)

    def load() -> None:
        context = _driver.Context(0)
        try:
            target, staging, stream = context.allocate(150_000), context.allocate(4 * 16_384), context.stream()
            ranges = [FileRange(file, i * 15_000, 15_000, None, i) for i in range(10)]
            upload(
                context,
                ranges,
                consume=lambda i, a, n: stream.copy(target.pointer + i * 15_000, a, n),
                stream=stream,
                staging=staging,
                chunk_bytes=4096,
                n_readers=2,
            )
        finally:
            context.close()

    n = refused = 0
    while True:
        n += 1
        _driver._fail_nth(n)
        try:
            load()
        except WorkerError as e:
            refused += 1
            assert isinstance(e, CudaError) and e.fields["call"], e
        else:
            if _driver._fail_nth(0) != 0:
                break  # fewer calls than n were made: the fault never came
        assert leftovers() == NOTHING, f"call {n}"
    print(f"{refused} faults in {n - 1} driver calls")
    assert refused > 60
    os.close(file.fd)
