# cython: language_level=3
"""The CUDA driver, the only module that calls it: contexts, memory, kernels, streams, graphs.

Every call is checked and names itself in the error. A context belongs to the process that made it: after a fork it is
refused by name. Objects own what they wrap; `close()` frees it and is idempotent, and so does dropping the object.
Nothing happens on import. This module knows no model, no plan and no kernel by name.
"""

import os
import pathlib
import weakref

from cuda.bindings cimport cydriver as cu
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, strcmp
from posix.unistd cimport getpid

from .errors import CudaError

#: statuses after which the context can never be used again
_STICKY = frozenset({214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719})

cdef int _init_pid = 0
# fault injection: the n-th checked call from now fails (0: never), or the n-th of the call of that name
cdef long _fail_at = 0
cdef bytes _fail_name = b""     # keeps _fail_call alive
cdef const char* _fail_call = NULL
cdef cu.CUresult _fail_status = cu.CUDA_ERROR_UNKNOWN
cdef bint _fail_for_good = False    # with a sticky status every later call fails too


def _fail_nth(long n):
    """Make the n-th driver call from now fail (tests; only where WORKER_ORCD_FAULTS=1 is set). 0: none.

    Returns:
        how many calls the fault set before was still away; 0 when it has come.
    """
    global _fail_at
    if os.environ.get("WORKER_ORCD_FAULTS") != "1":
        raise RuntimeError("fault injection needs WORKER_ORCD_FAULTS=1")
    left, _fail_at = _fail_at, n
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
        raise CudaError("no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded); choose --device cpu, or "
                        "install the driver", call="cuInit", status_name="NO_DRIVER") from None
    if status == cu.CUDA_ERROR_NO_DEVICE:
        raise CudaError("the NVIDIA driver finds no GPU; choose --device cpu", call="cuInit",
                        status_name="CUDA_ERROR_NO_DEVICE")
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
            check(status, b"cuDevicePrimaryCtxRetain")
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
        """`nbytes` of device memory, 256-byte aligned, as a `DeviceMemory`."""
        return DeviceMemory(self, nbytes, label)

    def pinned(self, size_t nbytes):
        """`nbytes` of page-locked host memory that the device can address, as a `PinnedMemory`."""
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


cdef class Stream:
    """An in-order queue of device work."""

    def __init__(self, Context context):
        self.context = context
        context.require_open()
        check(cu.cuStreamCreate(&self.handle, cu.CU_STREAM_NON_BLOCKING), b"cuStreamCreate")
        context.live.add(self)

    cdef int copy_in_nogil(self, cu.CUdeviceptr to, const void* source, size_t n) except -1 nogil:
        """Queue a copy from page-locked host memory, which must stay as it is until the copy is done."""
        return check(cu.cuMemcpyHtoDAsync(to, source, n, self.handle), b"cuMemcpyHtoDAsync")

    cdef int copy_out_nogil(self, void* to, cu.CUdeviceptr source, size_t n) except -1 nogil:
        """Queue a copy into page-locked host memory."""
        return check(cu.cuMemcpyDtoHAsync(to, source, n, self.handle), b"cuMemcpyDtoHAsync")

    cdef int fill_nogil(self, cu.CUdeviceptr to, unsigned char value, size_t n) except -1 nogil:
        """Queue setting n bytes."""
        return check(cu.cuMemsetD8Async(to, value, n, self.handle), b"cuMemsetD8Async")

    cdef int follow_nogil(self, cu.CUevent event) except -1 nogil:
        """Let later work of this stream wait for `event`."""
        return check(cu.cuStreamWaitEvent(self.handle, event, 0), b"cuStreamWaitEvent")

    cdef int mark_nogil(self, cu.CUevent event) except -1 nogil:
        """Let `event` stand for the present end of this stream."""
        return check(cu.cuEventRecord(event, self.handle), b"cuEventRecord")

    cdef int wait_nogil(self) except -1 nogil:
        """Wait until everything queued so far is done."""
        return check(cu.cuStreamSynchronize(self.handle), b"cuStreamSynchronize")

    cdef int idle_nogil(self) except -1 nogil:
        """1 when everything queued so far is done, 0 when not; raises the error of work that failed."""
        cdef cu.CUresult status = cu.cuStreamQuery(self.handle)
        if status == cu.CUDA_ERROR_NOT_READY:
            return 0
        check(status, b"cuStreamQuery")
        return 1

    def synchronize(self):
        """Wait until everything queued so far is done; the GIL is released."""
        self.context.require_open()
        with nogil:
            self.wait_nogil()

    def copy(self, uintptr_t to, uintptr_t source, size_t nbytes):
        """Queue a copy between two device addresses."""
        self.context.require_open()
        check(cu.cuMemcpyDtoDAsync(to, source, nbytes, self.handle), b"cuMemcpyDtoDAsync")

    def wait(self, Event event):
        """Let later work of this stream wait for `event`."""
        self.context.require_open()
        self.follow_nogil(event.handle)

    def begin_capture(self):
        """Record the following work into a graph instead of running it."""
        self.context.require_open()
        check(cu.cuStreamBeginCapture(self.handle, cu.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), b"cuStreamBeginCapture")

    def end_capture(self):
        """Stop recording.

        Returns:
            The recorded work as an instantiated `Graph`.
        """
        cdef cu.CUgraph graph = NULL
        self.context.require_open()
        try:
            check(cu.cuStreamEndCapture(self.handle, &graph), b"cuStreamEndCapture")
            return _instantiate(self.context, <uintptr_t>graph)
        finally:
            if graph != NULL:
                cu.cuGraphDestroy(graph)

    def abandon_capture(self):
        """Stop recording and forget what was recorded, after a fault between begin and end. Never raises."""
        cdef cu.CUgraph graph = NULL
        if self.handle != NULL and self.context.usable():
            cu.cuStreamEndCapture(self.handle, &graph)
            if graph != NULL:
                cu.cuGraphDestroy(graph)

    def close(self):
        """Let go of the stream; what is queued still runs. Idempotent; never raises."""
        if self.handle != NULL and self.context.usable():
            cu.cuStreamDestroy(self.handle)
        self.handle = NULL

    def __dealloc__(self):
        if self.handle != NULL and self.context is not None and self.context.usable():
            cu.cuStreamDestroy(self.handle)


cdef int await_event(cu.CUevent event) except -1 nogil:
    """Wait until everything before `event` is done."""
    return check(cu.cuEventSynchronize(event), b"cuEventSynchronize")


cdef class Event:
    """A point in a stream.

    Args:
        context: where.
        timing: keep the time, for `elapsed_ms`.
        blocking: `synchronize` sleeps instead of spinning.
    """

    def __init__(self, Context context, bint timing=True, bint blocking=False):
        cdef unsigned int flags = cu.CU_EVENT_DEFAULT
        if not timing:
            flags |= cu.CU_EVENT_DISABLE_TIMING
        if blocking:
            flags |= cu.CU_EVENT_BLOCKING_SYNC
        self.context = context
        context.require_open()
        check(cu.cuEventCreate(&self.handle, flags), b"cuEventCreate")
        context.live.add(self)

    cdef int record_nogil(self, cu.CUstream stream) except -1 nogil:
        return check(cu.cuEventRecord(self.handle, stream), b"cuEventRecord")

    cdef int wait_nogil(self) except -1 nogil:
        return await_event(self.handle)

    cdef int done_nogil(self) except -1 nogil:
        """1 when everything before the event is done, else 0."""
        cdef cu.CUresult status = cu.cuEventQuery(self.handle)
        if status == cu.CUDA_ERROR_NOT_READY:
            return 0
        check(status, b"cuEventQuery")
        return 1

    def record(self, Stream stream):
        """Mark the present end of `stream`."""
        self.context.require_open()
        self.record_nogil(stream.handle)

    def synchronize(self):
        """Wait for the event; the GIL is released."""
        self.context.require_open()
        with nogil:
            self.wait_nogil()

    def elapsed_ms(self, Event since):
        """Milliseconds between `since` and this event, both recorded and done."""
        cdef float ms = 0
        self.context.require_open()
        check(cu.cuEventElapsedTime(&ms, since.handle, self.handle), b"cuEventElapsedTime")
        return ms

    def close(self):
        """Let go of the event. Idempotent; never raises."""
        if self.handle != NULL and self.context.usable():
            cu.cuEventDestroy(self.handle)
        self.handle = NULL

    def __dealloc__(self):
        if self.handle != NULL and self.context is not None and self.context.usable():
            cu.cuEventDestroy(self.handle)


cdef class Library:
    """The kernels of one fatbin.

    Raises:
        CudaError: no image in it fits the GPU; names the compute capability.
    """

    def __init__(self, Context context, str name, bytes code):
        cdef const char* image = code
        cdef cu.CUresult status
        self.context, self.name = context, name
        context.require_open()
        with nogil:  # where only PTX fits, this compiles it, which takes seconds
            status = cu.cuLibraryLoadData(&self.handle, image, NULL, NULL, 0, NULL, NULL, 0)
        if status in (cu.CUDA_ERROR_NO_BINARY_FOR_GPU, cu.CUDA_ERROR_UNSUPPORTED_PTX_VERSION):
            major, minor = context.capability
            raise CudaError(f"kernel image {name!r} has no code for compute capability {major}.{minor} "
                            f"({context.name}); rebuild with WORKER_ORCD_CUDA_ARCHS={major}{minor}",
                            call="cuLibraryLoadData", status_name="CUDA_ERROR_NO_BINARY_FOR_GPU",
                            compute_capability=f"{major}.{minor}")
        check(status, b"cuLibraryLoadData")
        context.live.add(self)

    def kernel(self, str name, unsigned int max_dynamic_smem=0):
        """The kernel `name`, allowed to use `max_dynamic_smem` bytes of dynamic shared memory."""
        return Kernel(self, name, max_dynamic_smem)

    def close(self):
        """Unload the kernels; none of them may be running. Idempotent; never raises."""
        if self.handle != NULL and self.context.usable():
            cu.cuLibraryUnload(self.handle)
        self.handle = NULL

    def __dealloc__(self):
        if self.handle != NULL and self.context is not None and self.context.usable():
            cu.cuLibraryUnload(self.handle)


cdef class Kernel:
    """One kernel; takes exactly one parameter, a struct by value."""

    def __init__(self, Library library, str name, unsigned int max_dynamic_smem=0):
        cdef cu.CUkernel kernel = NULL
        self.library, self.name = library, name
        library.context.require_open()
        encoded = name.encode()
        check(cu.cuLibraryGetKernel(&kernel, library.handle, encoded), b"cuLibraryGetKernel")
        check(cu.cuKernelGetFunction(&self.handle, kernel), b"cuKernelGetFunction")
        cdef size_t offset = 0
        cdef cu.CUresult status = cu.cuFuncGetParamInfo(self.handle, 0, &offset, &self.param_bytes)
        if status != cu.CUDA_ERROR_INVALID_VALUE:   # that is what a kernel without parameters says
            check(status, b"cuFuncGetParamInfo")
        if max_dynamic_smem > 0:
            check(cu.cuFuncSetAttribute(self.handle, cu.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                        max_dynamic_smem), b"cuFuncSetAttribute")

    @property
    def registers(self):
        """Registers a thread of it uses."""
        cdef int n = 0
        self.library.context.require_open()
        check(cu.cuFuncGetAttribute(&n, cu.CU_FUNC_ATTRIBUTE_NUM_REGS, self.handle), b"cuFuncGetAttribute")
        return n

    cdef int enqueue(self, cu.CUstream stream, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int block,
                     unsigned int smem, const void* params, bint pdl) except -1 nogil:
        """Queue a launch; with `pdl` it may start before the kernel in front of it in the stream has ended."""
        cdef cu.CUlaunchConfig config
        cdef cu.CUlaunchAttribute attribute
        cdef void* args[1]
        args[0] = <void*>params
        config.gridDimX, config.gridDimY, config.gridDimZ = gx, gy, gz
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = smem
        config.hStream = stream
        config.attrs = &attribute
        config.numAttrs = 0
        if pdl:
            attribute.id = cu.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.numAttrs = 1
        return check(cu.cuLaunchKernelEx(&config, self.handle, args, NULL), b"cuLaunchKernelEx")

    def launch(self, Stream stream, tuple grid, unsigned int block, unsigned int smem, bytes params, bint pdl=False):
        """Queue a launch.

        Args:
            stream: where.
            grid: (x, y, z) blocks.
            block: threads of a block.
            smem: bytes of dynamic shared memory.
            params: the parameter struct.
            pdl: allow programmatic dependent launch.

        Raises:
            ValueError: `params` has another size than the kernel's struct.
        """
        cdef unsigned int gx, gy, gz
        gx, gy, gz = grid
        if <size_t>len(params) != self.param_bytes:
            raise ValueError(f"{self.name} takes {self.param_bytes} bytes of parameters, not {len(params)}")
        self.library.context.require_open()
        self.enqueue(stream.handle, gx, gy, gz, block, smem, <const char*>params, pdl)


cdef class DeviceMemory:
    """Device memory with one owner. `pointer` is 0 once closed.

    `managed` memory is never used by the engine; it exists to prove that the residency check finds it.
    """

    def __init__(self, Context context, size_t nbytes, str label="", bint managed=False):
        self.context, self.nbytes, self.label, self.managed = context, nbytes, label, managed
        context.require_open()
        if nbytes == 0:
            return
        with nogil:
            if managed:
                check(cu.cuMemAllocManaged(&self.handle, nbytes, cu.CU_MEM_ATTACH_GLOBAL), b"cuMemAllocManaged")
            else:
                check(cu.cuMemAlloc(&self.handle, nbytes), b"cuMemAlloc")
        context.live.add(self)

    @property
    def pointer(self):
        """The device address."""
        return <uintptr_t>self.handle

    def _range(self, size_t offset, size_t n):
        if offset > self.nbytes or n > self.nbytes - offset:
            raise ValueError(f"{n} bytes at {offset} are not inside the {self.nbytes} of {self.label!r}")
        self.context.require_open()

    def copy_from(self, const unsigned char[::1] source, size_t offset=0):
        """Copy host bytes to the device at `offset`, and wait."""
        cdef size_t n = source.shape[0]
        self._range(offset, n)
        if n:
            with nogil:
                check(cu.cuMemcpyHtoD(self.handle + offset, &source[0], n), b"cuMemcpyHtoD")

    def copy_to(self, unsigned char[::1] target, size_t offset=0):
        """Copy bytes at `offset` of the device to the host, and wait."""
        cdef size_t n = target.shape[0]
        self._range(offset, n)
        if n:
            with nogil:
                check(cu.cuMemcpyDtoH(&target[0], self.handle + offset, n), b"cuMemcpyDtoH")

    def fill(self, unsigned char value):
        """Set every byte, and wait."""
        self._range(0, self.nbytes)
        if self.nbytes:
            check(cu.cuMemsetD8(self.handle, value, self.nbytes), b"cuMemsetD8")
            self.context.synchronize()

    def residency(self):
        """Facts about the allocation from the driver: memory_type ("device", "host", ...), managed, host_alias."""
        cdef cu.CUpointer_attribute which[2]
        cdef unsigned int kind = 0
        cdef int managed = 0
        cdef void* host = NULL
        cdef void* into[2]
        which[0], which[1] = cu.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, cu.CU_POINTER_ATTRIBUTE_IS_MANAGED
        into[0], into[1] = &kind, &managed
        self.context.require_open()
        check(cu.cuPointerGetAttributes(2, which, into, self.handle), b"cuPointerGetAttributes")
        cdef bint alias = (cu.cuPointerGetAttribute(&host, cu.CU_POINTER_ATTRIBUTE_HOST_POINTER, self.handle)
                           == cu.CUDA_SUCCESS and host != NULL)
        names = {1: "host", 2: "device", 3: "array", 4: "unified"}
        return {"memory_type": names.get(kind, str(kind)), "managed": bool(managed), "host_alias": bool(alias)}

    def close(self):
        """Free the memory. Idempotent; never raises."""
        if self.handle and self.context.usable():
            cu.cuCtxSetCurrent(self.context.ctx)
            cu.cuMemFree(self.handle)
        self.handle = 0

    def __dealloc__(self):
        if self.handle and self.context is not None and self.context.usable():
            cu.cuCtxSetCurrent(self.context.ctx)
            cu.cuMemFree(self.handle)


cdef class PinnedMemory:
    """Page-locked host memory, mapped into the device's address space."""

    def __init__(self, Context context, size_t nbytes):
        cdef unsigned int flags = cu.CU_MEMHOSTALLOC_PORTABLE | cu.CU_MEMHOSTALLOC_DEVICEMAP
        cdef size_t size = nbytes if nbytes else 1
        self.context, self.nbytes = context, nbytes
        context.require_open()
        with nogil:
            check(cu.cuMemHostAlloc(&self.host, size, flags), b"cuMemHostAlloc")
            check(cu.cuMemHostGetDevicePointer(&self.mapped, self.host, 0), b"cuMemHostGetDevicePointer")
        context.live.add(self)

    @property
    def pointer(self):
        """The address the device uses."""
        return <uintptr_t>self.mapped

    @property
    def host_address(self):
        """The address the host uses; valid while this object lives."""
        return <uintptr_t>self.host

    def write(self, const unsigned char[::1] source, size_t offset=0):
        """Copy bytes in at `offset`."""
        cdef size_t n = source.shape[0]
        if offset > self.nbytes or n > self.nbytes - offset:
            raise ValueError(f"{n} bytes at {offset} are not inside {self.nbytes}")
        if n:
            memcpy(<char*>self.host + offset, &source[0], n)

    def read(self, size_t n, size_t offset=0):
        """`n` bytes from `offset`, as bytes."""
        if offset > self.nbytes or n > self.nbytes - offset:
            raise ValueError(f"{n} bytes at {offset} are not inside {self.nbytes}")
        return (<char*>self.host + offset)[:n]

    def close(self):
        """Free the memory. Idempotent; never raises."""
        if self.host != NULL and self.context.usable():
            cu.cuCtxSetCurrent(self.context.ctx)
            cu.cuMemFreeHost(self.host)
        self.host = NULL

    def __dealloc__(self):
        if self.host != NULL and self.context is not None and self.context.usable():
            cu.cuCtxSetCurrent(self.context.ctx)
            cu.cuMemFreeHost(self.host)


cdef class Graph:
    """Recorded work, ready to be replayed. Made by `Stream.end_capture`."""

    cdef int launch_nogil(self, cu.CUstream stream) except -1 nogil:
        return check(cu.cuGraphLaunch(self.handle, stream), b"cuGraphLaunch")

    def launch(self, Stream stream):
        """Queue one replay."""
        self.context.require_open()
        self.launch_nogil(stream.handle)

    def close(self):
        """Let go of the graph; none of its replays may be running. Idempotent; never raises."""
        if self.handle != NULL and self.context.usable():
            cu.cuGraphExecDestroy(self.handle)
        self.handle = NULL

    def __dealloc__(self):
        if self.handle != NULL and self.context is not None and self.context.usable():
            cu.cuGraphExecDestroy(self.handle)


cdef Graph _instantiate(Context context, uintptr_t graph):
    cdef Graph g = Graph.__new__(Graph)
    g.context = context
    with nogil:
        check(cu.cuGraphGetNodes(<cu.CUgraph>graph, NULL, &g.n_nodes), b"cuGraphGetNodes")
        check(cu.cuGraphInstantiate(&g.handle, <cu.CUgraph>graph, 0), b"cuGraphInstantiate")
    context.live.add(g)
    return g


def device_copy_gbps(Context context, size_t nbytes=1 << 30, int repeat=10):
    """Bandwidth of a device-to-device copy in GB/s, bytes read and written both counted; the yardstick of benches."""
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
