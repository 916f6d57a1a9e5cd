# Part of _driver.pyx: what runs on a device, and in which order - streams, events, kernels, graphs.

cdef int mark_nogil(cu.CUstream stream, cu.CUevent event) except -1 nogil:
    """Let `event` stand for the present end of `stream`."""
    return check(cu.cuEventRecord(event, stream), b"cuEventRecord")


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
        return mark_nogil(self.handle, event)

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
        """PackedTile the following work into a graph instead of running it."""
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

    @property
    def pointer(self):
        """The driver's handle, for another library; 0 once closed."""
        return <uintptr_t>self.handle

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
        return mark_nogil(stream, self.handle)

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


cdef int _check_image(Context context, str name, cu.CUresult status) except -1:
    """Raise the error that names the compute capability where `status` says that no image fits the GPU."""
    if status in (cu.CUDA_ERROR_NO_BINARY_FOR_GPU, cu.CUDA_ERROR_UNSUPPORTED_PTX_VERSION):
        major, minor = context.capability
        raise CudaError(f"kernel image {name!r} has no code for compute capability {major}.{minor} "
                        f"({context.name}); rebuild with WORKER_ORCD_CUDA_ARCHS={major}{minor}",
                        call="cuLibraryLoadData", status_name="CUDA_ERROR_NO_BINARY_FOR_GPU",
                        compute_capability=f"{major}.{minor}")
    return 0


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
        _check_image(context, name, status)
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


cdef int launch_nogil(cu.CUfunction kernel, cu.CUstream stream, unsigned int gx, unsigned int gy, unsigned int gz,
                      unsigned int block, unsigned int smem, const void* params, bint pdl) except -1 nogil:
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
    return check(cu.cuLaunchKernelEx(&config, kernel, args, NULL), b"cuLaunchKernelEx")


cdef class Kernel:
    """One kernel; takes exactly one parameter, a struct by value."""

    def __init__(self, Library library, str name, unsigned int max_dynamic_smem=0):
        cdef cu.CUkernel kernel = NULL
        self.library, self.name = library, name
        library.context.require_open()
        encoded = name.encode()
        cdef const char* text = encoded
        cdef cu.CUresult status
        with nogil:     # images are loaded when a kernel is first asked for
            status = cu.cuLibraryGetKernel(&kernel, library.handle, text)
        _check_image(library.context, library.name, status)
        check(status, b"cuLibraryGetKernel")
        with nogil:
            status = cu.cuKernelGetFunction(&self.handle, kernel)
        _check_image(library.context, library.name, status)
        check(status, b"cuKernelGetFunction")
        cdef size_t offset = 0
        status = cu.cuFuncGetParamInfo(self.handle, 0, &offset, &self.param_bytes)
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
        launch_nogil(self.handle, stream.handle, gx, gy, gz, block, smem, <const char*>params, pdl)


cdef class LaunchList:
    """Launches in order: put together with the Python lock, queued without it, for the driver takes microseconds for
    each and a step has hundreds."""

    def __cinit__(self):
        self.kernels = []

    cdef int add(self, Kernel kernel, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int block,
                 unsigned int smem, const void* params, size_t nbytes, bint pdl) except -1:
        """As `launch_nogil`; it takes a copy of the `nbytes` bytes of `params`."""
        cdef LaunchRecord record
        record.kernel, record.block, record.smem, record.pdl = kernel.handle, block, smem, pdl
        record.gx, record.gy, record.gz = gx, gy, gz
        record.first_word = self.params.size()
        self.params.resize(record.first_word + (nbytes + 7) // 8)
        memcpy(self.params.data() + record.first_word, params, nbytes)
        self.records.push_back(record)
        self.kernels.append(kernel)
        return 0

    cdef void clear(self) noexcept:
        """Forget them."""
        self.records.clear()
        self.params.clear()
        self.kernels.clear()

    cdef int queue(self, cu.CUstream stream) except -1 nogil:
        """Queue all of them."""
        cdef size_t i
        for i in range(self.records.size()):
            self.queue_one(i, stream)
        return 0

    cdef int queue_one(self, size_t i, cu.CUstream stream) except -1 nogil:
        """Queue launch `i`."""
        cdef LaunchRecord* r = &self.records[i]
        return launch_nogil(r.kernel, stream, r.gx, r.gy, r.gz, r.block, r.smem, self.params.data() + r.first_word,
                            r.pdl)

    cdef tuple describe(self, size_t i):
        """Launch `i` as (name of the kernel, grid, threads of a block, dynamic shared memory, words of parameters)."""
        cdef LaunchRecord* r = &self.records[i]
        cdef size_t j, end = self.params.size() if i + 1 == self.records.size() else self.records[i + 1].first_word
        words = tuple([self.params[j] for j in range(r.first_word, end)])
        return self.kernels[i].name, (r.gx, r.gy, r.gz), r.block, r.smem, words


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
