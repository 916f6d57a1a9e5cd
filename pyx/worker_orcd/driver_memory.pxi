# Part of _driver.pyx: memory with an owner, on the device and page-locked on the host.

cdef class DeviceMemory:
    """Device memory with one owner. `pointer` is 0 once closed.

    `managed` memory is never used by the engine; it exists to prove that the residency check finds it.
    """

    def __init__(self, Context context, size_t nbytes, str label="", bint managed=False):
        self.context, self.nbytes, self.label, self.managed = context, nbytes, label, managed
        context.require_open()
        if nbytes == 0:
            return
        try:
            with nogil:
                if managed:
                    check(cu.cuMemAllocManaged(&self.handle, nbytes, cu.CU_MEM_ATTACH_GLOBAL), b"cuMemAllocManaged")
                else:
                    check(cu.cuMemAlloc(&self.handle, nbytes), b"cuMemAlloc")
        except CudaError as error:
            if not out_of_memory(error):
                raise
            free, total = context.memory()
            raise InsufficientVram(
                f"cuda:{context.device} gives no {nbytes:,} bytes of device memory for {label or 'a buffer'}; it has "
                f"{free:,} of {total:,} free ({error.message})",
                nbytes, free, device=f"cuda:{context.device}") from None
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
        try:
            with nogil:
                check(cu.cuMemHostAlloc(&self.host, size, flags), b"cuMemHostAlloc")
        except CudaError as error:
            if not out_of_memory(error):
                raise
            free = free_memory()
            raise InsufficientMemory(
                f"the system gives no {size:,} bytes of page-locked memory"
                f"{'' if free is None else f'; {free:,} bytes are free'} ({error.message})", size, free) from None
        with nogil:
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
