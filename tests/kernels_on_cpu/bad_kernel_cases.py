"""The mistakes of bad_kernels.cu are reported; run by test_on_cpu.py in a process with the stand-in driver."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest
from cuda.bindings import driver
from gpu.kernel_harness import Gpu

SMEM_BYTES = 64 * 4 + 16
IN = np.arange(1, 65, dtype=np.float32)


class BadParams(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint64), ("out", ctypes.c_uint64), ("is_right", ctypes.c_int32)]


@pytest.fixture
def gpu():
    """A context of the test's own: a kernel that failed poisons it."""
    gpu = Gpu()
    yield gpu
    driver.cuDevicePrimaryCtxRelease(gpu.device)


def launch(gpu: Gpu, name: str, is_right: bool, **how) -> np.ndarray:
    x, out = gpu.buffer(IN), gpu.empty(64)
    p = BadParams(x.ptr, out.ptr, int(is_right))
    gpu.launch(gpu.kernel("bad_kernels", f"bad_{name}"), 1, 64, p, **{"smem": SMEM_BYTES, "pdl": True, **how})
    return out.to_numpy()


#: kernel -> what its error says
REPORTED = {
    "copies_left_at_end": "asynchronous copies that it has not waited for",
    "lane_ends_before_shuffle": "lanes 00000020",
    "lane_stays_away": "lanes 00000020 have not reached",
    "two_collectives": "while other lanes of its warp are at",
    "warp_stays_away": "of warp 0 (the first is 0) wait at the barrier at byte 256 of shared memory, to which not all",
    "write_past_the_end": "was written at byte 384 of dynamic shared memory, of which the launch asked for 272",
    "copy_past_the_end": "16 bytes at byte 384 of shared memory",
    "no_pdl_wait": "1 of 64 threads end without pdl_wait()",
    "no_block_waits": "this and all other blocks end without pdl_wait()",
    "copy_before_the_phase_ends": "whose phase before has not ended",
    "part_of_a_warp_copies": "wait at the barrier at byte 256",
    "copy_missing_in_a_phase": "wait at the barrier at byte 256 of shared memory, to which not all have come",
    "warp_stays_away_from_a_group": "wait at barrier 1, where 32 of 64 threads have come",
    "group_of_two_sizes": "barrier 1 for 32 threads, where others came for 64",
    "more_come_than_it_counts": "more come to the barrier at byte 256 of shared memory than it counts",
    "bytes_nobody_expects": "256 bytes that the barrier at byte 256 of shared memory does not expect",
    "bytes_that_never_come": "wait at the barrier at byte 256 of shared memory, to which not all have come",
    "arrival_missing_in_a_group": "wait at barrier 1, where 32 of 64 threads have come",
    "matrix_that_is_not_aligned": "a matrix of a product at byte 128 of shared memory, no multiple of 1,024",
    "products_left_at_end": "products of warpgroups that it has not waited for",
    "null_pointer": "thread (9, 0, 0): it reads or writes at address",
    "misaligned_copy": "not 16-byte aligned",
}
#: kernels whose result is wrong, where they end
GARBAGE = [
    "no_barrier",
    "no_wait_for_copies",
    "no_wait_for_lanes_copies",
    "never_written",
    "wrong_parity",
    "operand_changed_too_early",
]
#: kernels whose result is wrong in another order
ORDER_SHOWS = ["no_barrier_in_order"]


@pytest.mark.parametrize("name", [*REPORTED, *GARBAGE, *ORDER_SHOWS])
def test_without_the_mistake(gpu, name):
    assert np.array_equal(launch(gpu, name, True), IN[::-1])


@pytest.mark.parametrize("name", REPORTED)
def test_a_mistake_is_an_error(gpu, name, capfd):
    status = "ILLEGAL_ADDRESS" if name == "null_pointer" else "LAUNCH_FAILED"
    with pytest.raises(RuntimeError, match=status):
        launch(gpu, name, False)
    said = capfd.readouterr().err
    print(said)
    assert f"kernel bad_{name}, block (0, 0, 0)" in said and REPORTED[name] in said
    with pytest.raises(RuntimeError, match=status):
        gpu.sync()  # the context is lost


@pytest.mark.parametrize("name", GARBAGE)
def test_a_mistake_shows_in_the_result(gpu, name):
    try:
        assert not np.array_equal(launch(gpu, name, False), IN[::-1])
    except RuntimeError as error:
        assert "LAUNCH_FAILED" in str(error)


@pytest.mark.parametrize("name", ORDER_SHOWS)
def test_a_mistake_shows_in_another_order(gpu, name):
    is_right = [np.array_equal(launch(gpu, name, False), IN[::-1]) for _ in range(5)]
    assert not any(is_right) if os.environ.get("KERNELS_ON_CPU_ORDER", "0") != "0" else all(is_right)


@pytest.mark.parametrize(
    "how", [{"smem": 232449}, {"block": 96}, {"grid": (0, 1, 1)}, {"grid": (1, 1 << 16, 1)}], ids=str
)
def test_an_impossible_launch_is_refused(gpu, how):
    kernel, p = gpu.kernel("bad_kernels", "bad_no_barrier"), BadParams(0, 0, 1)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE"):
        gpu.launch(kernel, **{"grid": 1, "block": 64, "smem": SMEM_BYTES, **how}, params=p)


def test_a_kernel_that_does_not_exist(gpu):
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NOT_FOUND"):
        gpu.kernel("bad_kernels", "bad_nothing")
