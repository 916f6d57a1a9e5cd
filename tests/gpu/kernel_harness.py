"""Runs single CUDA kernels from Python: fatbins, parameter structs, guarded buffers, launches, times.

For the kernel tests and tools/bench_kernels.py only; the engine has its own driver layer. Uses the device's primary
context and one stream. Every driver call is checked.

    gpu = Gpu()
    kernel = gpu.kernel("matmul", "matmul_q4_k")
    x = gpu.buffer(np_array)                      # a copy on the device, between guard bands
    out = gpu.empty((rows, n_out), np.float32)    # poisoned with NaN
    p = params("MatmulParams", n_rows=3, x=x, out=out)
    gpu.launch(kernel, grid=(64,), block=(256,), params=p, smem=0, pdl=False)
    out.to_numpy()                                # waits, checks the guard bands
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gen_params
import numpy as np
from cuda.bindings import driver

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = ROOT / "tests" / "gpu" / "kernels"
#: bytes of guard band on each side of a buffer; keeps the payload 256-byte aligned
GUARD_BYTES = 1024
GUARD_BYTE = 0xA5
#: poison of buffers: four of them are a float32 NaN, two a float16 NaN
POISON_BYTE = 0xFF


def check(result: tuple, call: str) -> Any:
    """The values of a driver call's result; raises RuntimeError naming `call` and the status."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{call}: {driver.CUresult(status).name}")
    return values[0] if len(values) == 1 else tuple(values)


# ---- parameter structs, as csrc/params has them ----------------------------------------------------------------------

#: parameter headers: the engine's, and those of kernels that only tests have
HEADERS = gen_params.read([p for folder in (CSRC / "params", KERNELS) for p in sorted(folder.glob("*_params.h"))])
#: the structs as ctypes types, by name; pointers are uint64
STRUCTS = gen_params.mirror(HEADERS)
#: the whole numbers that the headers define, by name
CONSTANTS = {name: value for header in HEADERS for name, value in header.constants.items()}


def _set_fields(struct: ctypes.Structure, values: dict[str, Any]) -> None:
    struct.values = values  # keeps the buffers alive as long as the struct
    for key, value in values.items():
        field = getattr(struct, key)  # AttributeError for a name that is no member
        if isinstance(value, Buffer):
            setattr(struct, key, value.ptr)
        elif isinstance(field, ctypes.Array):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    _set_fields(field[i], item)
                else:
                    field[i] = item.ptr if isinstance(item, Buffer) else item
        elif isinstance(value, dict):
            _set_fields(field, value)
        else:
            setattr(struct, key, 0 if value is None else value)


def params(struct: str, **values: Any) -> ctypes.Structure:
    """A filled parameter struct; members not named are 0.

    A value may be a number, None (null), a `Buffer` (its address), a sequence for an array member, or a dict for a
    member that is a struct.
    """
    p = STRUCTS[struct]()
    _set_fields(p, values)
    return p


# ---- fatbins ---------------------------------------------------------------------------------------------------------


def fatbin_path(name: str, arch: str) -> Path:
    """The fatbin of the kernel file `name`, of csrc/cuda or of the tests.

    The packaged one if it is newer than all sources, else built now for `arch`; the tests' kernels are in no package.
    Where kernels run on the CPU (tests/kernels_on_cpu), their library stands for it.
    """
    if folder := os.environ.get("FAKE_CUDA_KERNELS"):
        return Path(folder) / f"{name}.so"
    sources = [p for folder in (CSRC, KERNELS) for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    newest = max(p.stat().st_mtime for p in sources)
    packaged = ROOT / "worker_orcd" / "fatbins" / f"{name}.fatbin"
    source = CSRC / "cuda" / f"{name}.cu"
    if not source.exists():
        source = KERNELS / f"{name}.cu"
    elif packaged.exists() and packaged.stat().st_mtime >= newest:
        return packaged
    built = ROOT / "build" / "test-fatbins" / f"{name}.{arch}.fatbin"
    if built.exists() and built.stat().st_mtime >= newest:
        return built
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    built.parent.mkdir(parents=True, exist_ok=True)
    target = f"arch=compute_{arch},code=sm_{arch}"
    command = [
        nvcc,
        "-fatbin",
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "-I",
        str(CSRC),
        "-I",
        str(CSRC / "cuda"),
        "-gencode",
        target,
    ]
    subprocess.run([*command, "-o", str(built), str(source)], check=True)
    return built


# ---- buffers ---------------------------------------------------------------------------------------------------------


class Buffer:
    """Device memory of one array between two guard bands. `ptr` is its address."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: Any, guard: bool = True) -> None:
        self.gpu, self.shape, self.dtype = gpu, shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self._guard = GUARD_BYTES if guard else 0
        # The band after the payload starts at its last byte, so that an overrun of one element is seen.
        self._total = self._guard + self.nbytes + self._guard
        self._base = int(check(driver.cuMemAlloc(max(self._total, 1)), "cuMemAlloc"))
        self.ptr = self._base + self._guard
        if guard:
            check(driver.cuMemsetD8(self._base, GUARD_BYTE, self._guard), "cuMemsetD8")
            check(driver.cuMemsetD8(self.ptr + self.nbytes, GUARD_BYTE, self._guard), "cuMemsetD8")
        self.poison()

    def poison(self) -> None:
        """Fill with NaN bytes, so that an element that no kernel wrote is seen."""
        if self.nbytes:
            check(driver.cuMemsetD8(self.ptr, POISON_BYTE, self.nbytes), "cuMemsetD8")

    def set(self, array: np.ndarray) -> None:
        """Copy `array` (same number of bytes) to the device."""
        array = np.ascontiguousarray(array)
        assert array.nbytes == self.nbytes
        if self.nbytes:
            check(driver.cuMemcpyHtoD(self.ptr, array.ctypes.data, self.nbytes), "cuMemcpyHtoD")

    def to_numpy(self) -> np.ndarray:
        """Wait for the stream, check the guard bands, copy the array back."""
        self.gpu.sync()
        self.check_guards()
        out = np.empty(self.shape, self.dtype)
        if self.nbytes:
            check(driver.cuMemcpyDtoH(out.ctypes.data, self.ptr, self.nbytes), "cuMemcpyDtoH")
        return out

    def check_guards(self) -> None:
        """Raises AssertionError when something was written outside the array."""
        band = np.empty(self._guard, np.uint8)
        for where, address in (("before", self._base), ("after", self.ptr + self.nbytes)):
            if self._guard:
                check(driver.cuMemcpyDtoH(band.ctypes.data, address, self._guard), "cuMemcpyDtoH")
                hit = np.flatnonzero(band != GUARD_BYTE)
                what = f"{where} a {self.shape} {self.dtype} buffer"
                assert hit.size == 0, f"{hit.size} guard bytes {what} were overwritten, the first at {hit[0]}"

    def free(self) -> None:
        """Release the memory. Idempotent."""
        if self._base:
            check(driver.cuMemFree(self._base), "cuMemFree")
            self._base = 0

    def __del__(self) -> None:
        if getattr(self, "_base", 0):
            driver.cuMemFree(self._base)


# ---- the device ------------------------------------------------------------------------------------------------------


def available() -> bool:
    """Whether a CUDA device can be used here."""
    try:
        return driver.cuInit(0)[0] == driver.CUresult.CUDA_SUCCESS and driver.cuDeviceGetCount()[1] > 0
    except Exception:  # no driver library: the bindings raise their own kinds
        return False


def _dims(v: Sequence[int] | int) -> tuple[int, int, int]:
    v = (v,) if isinstance(v, (int, np.integer)) else tuple(v)
    return tuple(int(x) for x in (*v, 1, 1, 1)[:3])


class Gpu:
    """The device `ordinal`, its primary context and one stream."""

    def __init__(self, ordinal: int = 0) -> None:
        check(driver.cuInit(0), "cuInit")
        self.device = check(driver.cuDeviceGet(ordinal), "cuDeviceGet")
        self._context = check(driver.cuDevicePrimaryCtxRetain(self.device), "cuDevicePrimaryCtxRetain")
        check(driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
        # A blocking stream: it waits for the copies and memsets of buffers, which go through the default stream.
        self.stream = check(driver.cuStreamCreate(0), "cuStreamCreate")
        attribute = driver.CUdevice_attribute
        self.n_sm = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        #: dynamic shared memory bytes that a block may ask for
        self.max_smem = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        major = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.capability = major * 10 + minor
        self.arch = f"{self.capability}a" if self.capability == 90 else str(self.capability)
        self.name = check(driver.cuDeviceGetName(256, self.device), "cuDeviceGetName").rstrip(b"\0").decode()
        self._modules: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Any] = {}

    def _attribute(self, which: Any) -> int:
        return int(check(driver.cuDeviceGetAttribute(which, self.device), "cuDeviceGetAttribute"))

    def kernel(self, fatbin: str, name: str) -> Any:
        """The function `name` of csrc/`fatbin`.cu, allowed all the shared memory a block can have."""
        if fatbin not in self._modules:
            image = fatbin_path(fatbin, self.arch).read_bytes()
            self._modules[fatbin] = check(driver.cuModuleLoadData(image), f"cuModuleLoadData({fatbin})")
        if (fatbin, name) not in self._kernels:
            f = check(driver.cuModuleGetFunction(self._modules[fatbin], name.encode()), f"cuModuleGetFunction({name})")
            static = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
            dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            static = check(driver.cuFuncGetAttribute(static, f), "cuFuncGetAttribute")
            check(driver.cuFuncSetAttribute(f, dynamic, self.max_smem - static), "cuFuncSetAttribute")
            self._kernels[fatbin, name] = f
        return self._kernels[fatbin, name]

    def buffer(self, array: np.ndarray, guard: bool = True) -> Buffer:
        """A device copy of `array`."""
        array = np.ascontiguousarray(array)
        buf = Buffer(self, array.shape, array.dtype, guard)
        buf.set(array)
        return buf

    def empty(self, shape: tuple[int, ...] | int, dtype: Any = np.float32, guard: bool = True) -> Buffer:
        """A poisoned device array."""
        return Buffer(self, (shape,) if isinstance(shape, int) else tuple(shape), dtype, guard)

    def launch(
        self, kernel: Any, grid: Any, block: Any, params: ctypes.Structure, smem: int = 0, pdl: bool = False
    ) -> None:
        """Launch with one struct by value; does not wait. `pdl`: may start before the kernel before it has ended."""
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = _dims(grid)
        config.blockDimX, config.blockDimY, config.blockDimZ = _dims(block)
        config.sharedMemBytes = int(smem)
        config.hStream = self.stream
        if pdl:
            attr = driver.CUlaunchAttribute()
            attr.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attr.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attr]
            config.numAttrs = 1
        else:
            config.numAttrs = 0
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        check(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(arguments), 0), "cuLaunchKernelEx")

    def sync(self) -> None:
        """Wait for the stream; a kernel's fault is raised here."""
        check(driver.cuStreamSynchronize(self.stream), "cuStreamSynchronize")

    def copy(self, dst: Buffer, src: Buffer, nbytes: int) -> None:
        """Device-to-device copy on the stream."""
        check(driver.cuMemcpyDtoDAsync(dst.ptr, src.ptr, nbytes, self.stream), "cuMemcpyDtoDAsync")

    def _capture(self, fn: Callable[[], None], n_inner: int) -> tuple[Any, Any]:
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        check(driver.cuStreamBeginCapture(self.stream, mode), "cuStreamBeginCapture")
        for _ in range(n_inner):
            fn()
        graph = check(driver.cuStreamEndCapture(self.stream), "cuStreamEndCapture")
        return graph, check(driver.cuGraphInstantiate(graph, 0), "cuGraphInstantiate")

    def replay(self, fn: Callable[[], None], n_inner: int, times: int) -> None:
        """Capture `n_inner` calls of `fn()` (launches only) into one graph and queue that `times` times; waits."""
        graph, executable = self._capture(fn, n_inner)
        for _ in range(times):
            check(driver.cuGraphLaunch(executable, self.stream), "cuGraphLaunch")
        self.sync()
        check(driver.cuGraphExecDestroy(executable), "cuGraphExecDestroy")
        check(driver.cuGraphDestroy(graph), "cuGraphDestroy")

    def time(self, fn: Callable[[], None], n_inner: int = 20, n_repeat: int = 15, n_warm: int = 3) -> float:
        """Median seconds of one `fn()` (launches only).

        `fn` is captured `n_inner` times into one graph, whose replays are timed with events: launch gaps of the host
        do not count, and what `fn` varies from call to call (rotating buffers) is kept.
        """
        graph, executable = self._capture(fn, n_inner)
        start, stop = (check(driver.cuEventCreate(0), "cuEventCreate") for _ in range(2))
        times = []
        for i in range(n_warm + n_repeat):
            check(driver.cuEventRecord(start, self.stream), "cuEventRecord")
            check(driver.cuGraphLaunch(executable, self.stream), "cuGraphLaunch")
            check(driver.cuEventRecord(stop, self.stream), "cuEventRecord")
            check(driver.cuEventSynchronize(stop), "cuEventSynchronize")
            if i >= n_warm:
                times.append(check(driver.cuEventElapsedTime(start, stop), "cuEventElapsedTime") * 1e-3 / n_inner)
        for event in (start, stop):
            check(driver.cuEventDestroy(event), "cuEventDestroy")
        check(driver.cuGraphExecDestroy(executable), "cuGraphExecDestroy")
        check(driver.cuGraphDestroy(graph), "cuGraphDestroy")
        return float(np.median(times))
