# The C side of _gguf for other extensions: a mapped file and its bytes.
from libc.stdint cimport uint8_t, uint64_t


cdef class FileMapping:
    cdef const uint8_t* base      # uint8 [size], read-only
    cdef readonly uint64_t size
    cdef int slot                 # of mapping.h's table; -1: nothing mapped
    cdef bint was_cut(self) noexcept nogil
