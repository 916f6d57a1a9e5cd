"""What the driver layer promises, on any driver: run on a GPU by tests/gpu/test_device_driver.py, and on the stand-in
driver of tests/fake_driver by tests/compiled/test_driver.py."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from worker_orcd import _driver
from worker_orcd.errors import CudaError, InsufficientVram


def test_memory_goes_there_and_back(context):
    data = os.urandom(100_003)
    memory = context.allocate(len(data) + 512, "test")
    assert memory.pointer % 256 == 0 and memory.nbytes == len(data) + 512
    memory.fill(7)
    memory.copy_from(data, 256)
    back = bytearray(len(data) + 512)
    memory.copy_to(back)
    assert back == b"\7" * 256 + data + b"\7" * 256
    for bad in (lambda: memory.copy_from(data, 513), lambda: memory.copy_to(bytearray(10), memory.nbytes - 9)):
        with pytest.raises(ValueError, match="not inside"):
            bad()
    memory.close()
    memory.close()
    assert memory.pointer == 0


def test_free_memory_comes_back(context):
    context.allocate(64 << 20).close()  # what the driver takes for itself at the first allocation it keeps
    before, total = context.memory()
    assert 0 < before <= total == context.total_bytes
    kept = [context.allocate(64 << 20, f"block {i}") for i in range(3)]
    assert context.memory()[0] <= before - 3 * (64 << 20)
    assert {m.label for m in context.allocations()} == {"block 0", "block 1", "block 2"}
    kept[0].close()
    del kept
    gc.collect()
    assert context.allocations() == []
    assert context.memory()[0] == before


def test_device_memory_is_what_the_residency_check_wants(context):
    memory = context.allocate(4096, "weights")
    assert memory.residency() == {"memory_type": "device", "managed": False, "host_alias": False}


def test_pinned_memory_and_stream_order(context):
    pinned = context.pinned(1 << 20)
    data = os.urandom(1 << 20)
    pinned.write(data)
    assert pinned.read(len(data)) == data and pinned.pointer and pinned.host_address
    with pytest.raises(ValueError, match="not inside"):
        pinned.write(b"xx", (1 << 20) - 1)
    a, b = context.allocate(len(data)), context.allocate(len(data))
    a.copy_from(data)
    first, second = context.stream(), context.stream()
    done = context.event()
    first.copy(b.pointer, a.pointer, len(data))
    done.record(first)
    second.wait(done)
    second.copy(a.pointer, b.pointer, len(data))
    second.synchronize()
    done.synchronize()
    back = bytearray(len(data))
    a.copy_to(back)
    assert back == data


def test_events_time(context):
    start, end, stream = context.event(), context.event(), context.stream()
    start.record(stream)
    end.record(stream)
    end.synchronize()
    assert 0 <= end.elapsed_ms(start) < 1000


def test_graph_replays_what_was_captured(context):
    n = 4096
    a, b = context.allocate(n), context.allocate(n)
    stream = context.stream()
    b.fill(0)
    stream.begin_capture()
    stream.copy(b.pointer, a.pointer, n)
    graph = stream.end_capture()
    assert graph.n_nodes == 1
    back = bytearray(n)
    for value in (3, 9):
        a.fill(value)
        graph.launch(stream)
        stream.synchronize()
        b.copy_to(back)
        assert back == bytes([value]) * n
    graph.close()
    graph.close()


def test_a_thread_of_its_own_uses_the_context(context):
    memory, faults = context.allocate(100), []

    def work():
        try:
            context.activate()
            memory.fill(5)
        except BaseException as e:
            faults.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    back = bytearray(100)
    memory.copy_to(back)
    assert not faults and back == b"\5" * 100


def test_errors_name_the_call(context):
    began, ended = context.event(), context.event()
    with pytest.raises(CudaError) as e:
        ended.elapsed_ms(began)  # neither was recorded
    assert e.value.fields["call"] == "cuEventElapsedTime"
    assert e.value.fields["status_name"] == "CUDA_ERROR_INVALID_HANDLE"
    assert not e.value.sticky and e.value.code == "CUDA_ERROR"


def test_memory_that_is_not_there_is_told_with_both_numbers(context):
    free, total = context.memory()
    with pytest.raises(InsufficientVram, match="cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY") as e:
        context.allocate(1 << 60, "kv")
    told = e.value.fields["bytes_available"]
    assert abs(told - free) <= 64 << 20  # the driver gives back what it kept before it gives up
    device = f"cuda:{context.device}"
    assert e.value.fields == {"bytes_required": 1 << 60, "bytes_available": told, "device": device}
    for part in (f"{1 << 60:,}", f"{told:,} of {total:,}", device, "for kv"):
        assert part in e.value.message
    context.allocate(16).fill(0)  # and the context is as good as before


def test_devices_that_are_not_there():
    n = _driver.device_count()
    for index in (-1, n, 10_000):
        with pytest.raises(CudaError, match=f"GPU {index} does not exist") as e:
            _driver.Context(index)
        assert e.value.fields["status_name"] == "CUDA_ERROR_INVALID_DEVICE"


def test_an_image_that_is_not_installed(context):
    with pytest.raises(CudaError, match="'nonsense' is not installed"):
        context.load("nonsense")


def test_a_closed_context_is_refused_and_closes_what_it_owned():
    context = _driver.Context(0)
    memory, stream, pinned = context.allocate(1000), context.stream(), context.pinned(1000)
    context.close()
    context.close()
    assert memory.pointer == 0
    for use in (lambda: context.allocate(1), stream.synchronize, lambda: memory.fill(0), context.memory):
        with pytest.raises(CudaError, match="closed"):
            use()
    memory.close()
    stream.close()
    pinned.close()


def test_a_forked_process_is_refused_by_name(context):
    memory = context.allocate(1000)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for use in (lambda: _driver.Context(0), lambda: memory.fill(0), _driver.device_count):
            try:
                use()
                said.append("not refused")
            except CudaError as e:
                said.append(e.fields["status_name"])
        memory.close()
        context.close()
        os.write(writer, " ".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 1000) == b"FORKED FORKED FORKED"
    os.close(reader)
    memory.fill(1)  # the parent is untouched
