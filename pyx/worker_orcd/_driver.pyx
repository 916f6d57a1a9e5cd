# cython: language_level=3
"""The CUDA driver, the only module that calls it: contexts, memory, kernels, streams, graphs.

Every call is checked and names itself in the error. A context belongs to the process that made it: after a fork it is
refused by name. Objects own what they wrap; `close()` frees it and is idempotent, and so does dropping the object.
Nothing happens on import.

Here: checking and planted faults, the devices, the context. driver_memory.pxi: memory. driver_work.pxi: streams,
events, kernels, graphs.
"""

import os
import pathlib
import weakref

from cuda.bindings cimport cydriver as cu
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, strcmp
from posix.unistd cimport getpid

from worker_orcd.errors import CudaError, InsufficientMemory, InsufficientVram
from worker_orcd.machine import free_memory

#: about what the driver takes for a context of its own
_CONTEXT_BYTES = 512 << 20
#: statuses after which the context can never be used again
_STICKY = frozenset({214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719})

cdef int _init_pid = 0
# fault injection: the n-th checked call from now fails (0: never), or the n-th of the call of that name
cdef long _fail_at = 0
cdef bytes _fail_name = b""     # keeps _fail_call alive
cdef const char* _fail_call = NULL
cdef cu.CUresult _fail_status = cu.CUDA_ERROR_UNKNOWN
cdef bint _fail_for_good = False    # with a sticky status every later call fails too


def _fail_nth(long n, str call="", int status=cu.CUDA_ERROR_UNKNOWN):
    """Make the n-th driver call from now fail (tests; only where WORKER_ORCD_FAULTS=1 is set). 0: none.

    Args:
        call: count calls of this name alone; "": all.
        status: what the call that fails returns.

    Returns:
        how many calls the fault set before was still away; 0 when it has come.
    """
    global _fail_at, _fail_name, _fail_call, _fail_status, _fail_for_good
    if os.environ.get("WORKER_ORCD_FAULTS") != "1":
        raise RuntimeError("fault injection needs WORKER_ORCD_FAULTS=1")
    left, _fail_at = _fail_at, 0
    _fail_name, _fail_status, _fail_for_good = call.encode(), <cu.CUresult>status, False
    _fail_call = <const char*>_fail_name if call else NULL
    _fail_at = n
    return left


cdef int _faults_from_environment() except -1:
    """Take a fault from WORKER_ORCD_FAIL_CALL="cuGraphLaunch:5:700" (call, which one, status); tests of processes."""
    global _fail_at, _fail_name, _fail_call, _fail_status, _fail_for_good
    text = os.environ.get("WORKER_ORCD_FAIL_CALL", "")
    if not text or os.environ.get("WORKER_ORCD_FAULTS") != "1":
        return 0
    try:
        name, n, status = text.split(":")
        _fail_name, _fail_at, _fail_status = name.encode(), int(n), <cu.CUresult><int>int(status)
    except ValueError:
        raise RuntimeError(f"WORKER_ORCD_FAIL_CALL is call:number:status, not {text!r}") from None
    _fail_call = _fail_name
    _fail_for_good = int(status) in _STICKY
    return 0


cdef cu.CUresult _injected(cu.CUresult status, const char* call) noexcept nogil:
    """The status of a call while a fault is set."""
    global _fail_at
    if _fail_at < 0:
        return _fail_status
    if _fail_call == NULL or strcmp(_fail_call, call) == 0:
        _fail_at -= 1
        if _fail_at == 0:
            _fail_at = -1 if _fail_for_good else 0
            return _fail_status
    return status


cdef int check(cu.CUresult status, const char* call) except -1 nogil:
    """Raise CudaError for a status other than success, naming the call."""
    if _fail_at != 0:
        status = _injected(status, call)
    if status == cu.CUDA_SUCCESS:
        return 0
    with gil:
        _raise(status, call.decode())


def _raise(int status, str call):
    cdef const char* text = NULL
    name = f"status {status}"
    if cu.cuGetErrorName(<cu.CUresult>status, &text) == cu.CUDA_SUCCESS and text != NULL:
        name = (<bytes>text).decode()
    raise CudaError(f"{call} failed: {name}", call=call, status_name=name, sticky=status in _STICKY)


cdef bint out_of_memory(error) except -1:
    """Whether a driver call failed because there is no memory."""
    return error.fields.get("status_name") == "CUDA_ERROR_OUT_OF_MEMORY"


cdef int _init() except -1:
    """cuInit once per process; resolves the driver's symbols, so that later calls need no GIL."""
    global _init_pid
    if _init_pid == os.getpid():
        return 0
    if _init_pid != 0:
        raise CudaError("this process was forked after CUDA was initialized; start CUDA in the worker process only",
                        call="cuInit", status_name="FORKED")
    cdef cu.CUresult status
    try:
        with nogil:
            status = cu.cuInit(0)
    except (RuntimeError, ImportError, OSError):
        raise CudaError("no NVIDIA driver is installed on this machine (libcuda.so.1 cannot be loaded)",
                        call="cuInit", status_name="NO_DRIVER") from None
    if status == cu.CUDA_ERROR_NO_DEVICE:
        raise CudaError("the NVIDIA driver finds no GPU", call="cuInit", status_name="CUDA_ERROR_NO_DEVICE")
    _faults_from_environment()
    check(status, b"cuInit")
    _init_pid = os.getpid()
    return 0


def device_count():
    """Number of GPUs the driver shows.

    Raises:
        CudaError: no driver or no GPU.
    """
    cdef int n = 0
    _init()
    check(cu.cuDeviceGetCount(&n), b"cuDeviceGetCount")
    return n


def driver_version():
    """The driver's CUDA version as (major, minor)."""
    cdef int v = 0
    _init()
    check(cu.cuDriverGetVersion(&v), b"cuDriverGetVersion")
    return v // 1000, v % 1000 // 10


cdef int _attribute(cu.CUdevice dev, cu.CUdevice_attribute which) except? -1:
    cdef int value = 0
    check(cu.cuDeviceGetAttribute(&value, which, dev), b"cuDeviceGetAttribute")
    return value


cdef class Context:
    """The primary context of one GPU.

    Args:
        device: index of the GPU, 0-based.

    Raises:
        CudaError: no driver, no GPU, index out of range, or the process was forked after CUDA was initialized.
        InsufficientVram: the GPU has no memory left for a context.
    """

    def __init__(self, int device=0):
        cdef char text[256]
        n = device_count()
        if not 0 <= device < n:
            raise CudaError(f"GPU {device} does not exist: this machine has {n} (0..{n - 1})", call="cuDeviceGet",
                            status_name="CUDA_ERROR_INVALID_DEVICE", device=f"cuda:{device}")
        self.device, self.pid = device, os.getpid()
        self.live = weakref.WeakSet()
        check(cu.cuDeviceGet(&self.handle, device), b"cuDeviceGet")
        check(cu.cuDeviceGetName(text, sizeof(text), self.handle), b"cuDeviceGetName")
        self.name = (<bytes>text).decode("utf-8", "replace")
        self.capability = (_attribute(self.handle, cu.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                           _attribute(self.handle, cu.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))
        self.sm_count = _attribute(self.handle, cu.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.max_smem = _attribute(self.handle, cu.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        check(cu.cuDeviceTotalMem(&self.total_bytes, self.handle), b"cuDeviceTotalMem")
        cdef cu.CUresult status
        with nogil:
            status = cu.cuDevicePrimaryCtxRetain(&self.ctx, self.handle)
            self.open = self.ctx != NULL
        try:
            check(status, b"cuDevicePrimaryCtxRetain")
        except CudaError as error:
            if not out_of_memory(error):
                raise
            raise InsufficientVram(
                f"cuda:{device} has no memory for a context, which takes about {_CONTEXT_BYTES:,} bytes: other "
                f"processes hold the {self.total_bytes:,} bytes of the GPU ({error.message})",
                _CONTEXT_BYTES, 0, device=f"cuda:{device}") from None
        self.enter()

    cdef int enter(self) except -1 nogil:
        """Make the context current on the calling thread."""
        return check(cu.cuCtxSetCurrent(self.ctx), b"cuCtxSetCurrent")

    cdef bint usable(self) noexcept nogil:
        """Whether handles of this context may be given to the driver: it is open, and this is the process it is of."""
        return self.open and self.pid == getpid()

    cdef int require_open(self) except -1:
        if not self.open:
            raise CudaError("the CUDA context is closed", call="cuCtxSetCurrent", status_name="CLOSED")
        if self.pid != getpid():
            raise CudaError("this process was forked after CUDA was initialized; start CUDA in the worker process "
                            "only", call="cuCtxSetCurrent", status_name="FORKED")
        return self.enter()

    def activate(self):
        """Make the context current on the calling thread (each thread that uses the GPU does so once)."""
        self.require_open()

    def memory(self):
        """(free, total) bytes of the device, as the driver says."""
        cdef size_t free_bytes = 0, total = 0
        self.require_open()
        check(cu.cuMemGetInfo(&free_bytes, &total), b"cuMemGetInfo")
        return free_bytes, total

    def synchronize(self):
        """Wait until the device is idle; the GIL is released. Raises the error of any kernel that failed."""
        self.require_open()
        cdef cu.CUresult status
        with nogil:
            status = cu.cuCtxSynchronize()
        check(status, b"cuCtxSynchronize")

    def load(self, str name):
        """The kernels of the packaged `fatbins/<name>.fatbin`, as a `Library`."""
        path = pathlib.Path(__file__).resolve().parent / "fatbins" / f"{name}.fatbin"
        try:
            code = path.read_bytes()
        except OSError as e:
            raise CudaError(f"kernel image {name!r} is not installed ({e.strerror}); build with nvcc or install a "
                            "wheel that has it", call="cuLibraryLoadData", status_name="NO_IMAGE") from None
        return Library(self, name, code)

    def allocate(self, size_t nbytes, str label=""):
        """`nbytes` of device memory, 256-byte aligned, as a `DeviceMemory`; InsufficientVram where there are none."""
        return DeviceMemory(self, nbytes, label)

    def pinned(self, size_t nbytes):
        """`nbytes` of page-locked host memory that the device can address, as a `PinnedMemory`; InsufficientMemory
        where there are none."""
        return PinnedMemory(self, nbytes)

    def stream(self):
        """A new stream that does not wait for the default one."""
        return Stream(self)

    def event(self, *, timing=True, blocking=False):
        """A new event; `blocking`: `synchronize` sleeps instead of spinning."""
        return Event(self, timing, blocking)

    def allocations(self):
        """The live `DeviceMemory` objects of this context."""
        return [m for m in self.live if isinstance(m, DeviceMemory) and m.pointer]

    def close(self):
        """Close everything that was made in the context, and release it. Idempotent; never raises."""
        if self.usable():
            for resource in list(self.live):
                resource.close()
            cu.cuDevicePrimaryCtxRelease(self.handle)
        self.open = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.usable():
            cu.cuDevicePrimaryCtxRelease(self.handle)


include "driver_memory.pxi"
include "driver_work.pxi"


def device_copy_gbps(Context context, size_t nbytes=1 << 30, int repeat=10):
    """Bandwidth of a device-to-device copy in GB/s, bytes read and written both counted; the yardstick of benches."""
    nbytes = min(nbytes, max(context.memory()[0] // 4, 1 << 20))   # beside a model there may be little left
    cdef DeviceMemory a = DeviceMemory(context, nbytes, "bench"), b = DeviceMemory(context, nbytes, "bench")
    cdef Stream stream = Stream(context)
    cdef int i
    try:
        start, end = Event(context), Event(context)
        best = 0.0
        check(cu.cuMemsetD8Async(a.handle, 1, nbytes, stream.handle), b"cuMemsetD8Async")
        for i in range(repeat + 1):
            start.record(stream)
            check(cu.cuMemcpyDtoDAsync(b.handle, a.handle, nbytes, stream.handle), b"cuMemcpyDtoDAsync")
            end.record(stream)
            end.synchronize()
            if i:
                best = max(best, 2 * nbytes / end.elapsed_ms(start) / 1e6)
        return best
    finally:
        a.close()
        b.close()
        stream.close()
