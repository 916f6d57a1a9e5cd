# C-level face of the driver layer, for the uploader and the engine. Everything marked nogil may run without the GIL;
# a failing call takes it only to raise.
from cuda.bindings cimport cydriver as cu
from libc.stdint cimport uint64_t
from libcpp.vector cimport vector


cdef int check(cu.CUresult status, const char* call) except -1 nogil
cdef int await_event(cu.CUevent event) except -1 nogil
cdef int mark_nogil(cu.CUstream stream, cu.CUevent event) except -1 nogil
cdef int launch_nogil(cu.CUfunction kernel, cu.CUstream stream, unsigned int gx, unsigned int gy, unsigned int gz,
                      unsigned int block, unsigned int smem, const void* params, bint pdl) except -1 nogil


cdef class Context:
    cdef readonly int device
    cdef readonly int pid
    cdef readonly str name
    cdef readonly tuple capability
    cdef readonly int sm_count
    cdef readonly int max_smem
    cdef readonly size_t total_bytes
    cdef cu.CUdevice handle
    cdef cu.CUcontext ctx
    cdef bint open
    cdef object live          # weak set of what was made in the context
    cdef int enter(self) except -1 nogil
    cdef bint usable(self) noexcept nogil
    cdef int require_open(self) except -1


cdef class Stream:
    cdef readonly Context context
    cdef cu.CUstream handle
    cdef object __weakref__
    cdef int follow_nogil(self, cu.CUevent event) except -1 nogil
    cdef int mark_nogil(self, cu.CUevent event) except -1 nogil
    cdef int copy_in_nogil(self, cu.CUdeviceptr to, const void* source, size_t n) except -1 nogil
    cdef int copy_out_nogil(self, void* to, cu.CUdeviceptr source, size_t n) except -1 nogil
    cdef int fill_nogil(self, cu.CUdeviceptr to, unsigned char value, size_t n) except -1 nogil
    cdef int wait_nogil(self) except -1 nogil
    cdef int idle_nogil(self) except -1 nogil


cdef class Event:
    cdef readonly Context context
    cdef cu.CUevent handle
    cdef object __weakref__
    cdef int record_nogil(self, cu.CUstream stream) except -1 nogil
    cdef int wait_nogil(self) except -1 nogil
    cdef int done_nogil(self) except -1 nogil


cdef class Library:
    cdef readonly Context context
    cdef readonly str name
    cdef cu.CUlibrary handle
    cdef object __weakref__


cdef class Kernel:
    cdef readonly Library library
    cdef readonly str name
    cdef readonly size_t param_bytes    # of its one parameter
    cdef cu.CUfunction handle


cdef struct LaunchRecord:
    cu.CUfunction kernel
    unsigned int gx, gy, gz, block, smem
    bint pdl
    size_t first_word   # of its parameters


cdef class LaunchList:
    cdef vector[LaunchRecord] records
    cdef vector[uint64_t] params
    cdef list kernels       # the `Kernel` of each
    cdef int add(self, Kernel kernel, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int block,
                 unsigned int smem, const void* params, size_t nbytes, bint pdl) except -1
    cdef void clear(self) noexcept
    cdef int queue(self, cu.CUstream stream) except -1 nogil
    cdef int queue_one(self, size_t i, cu.CUstream stream) except -1 nogil
    cdef tuple describe(self, size_t i)


cdef class DeviceMemory:
    cdef readonly Context context
    cdef readonly str label
    cdef readonly size_t nbytes
    cdef readonly bint managed
    cdef cu.CUdeviceptr handle
    cdef object __weakref__


cdef class PinnedMemory:
    cdef readonly Context context
    cdef readonly size_t nbytes
    cdef void* host
    cdef cu.CUdeviceptr mapped
    cdef object __weakref__


cdef class Graph:
    cdef readonly Context context
    cdef readonly size_t n_nodes
    cdef cu.CUgraphExec handle
    cdef object __weakref__
    cdef int launch_nogil(self, cu.CUstream stream) except -1 nogil
