# C-level face of the uploader: how the engine turns staged pieces into their place without the lock of Python.
from cuda.bindings cimport cydriver as cu
from libc.stdint cimport uintptr_t


cdef class Consumer:
    cdef int prepare(self, tag, uintptr_t address, size_t nbytes) except -1
    cdef int queue(self, size_t index, cu.CUstream stream) except -1 nogil
