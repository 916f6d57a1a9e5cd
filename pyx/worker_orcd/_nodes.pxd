# C view of the launches of one step: what the engine enqueues, op after op.
from cuda.bindings cimport cydriver as cu
from libc.stdint cimport int32_t


# The shape of one step. Decode rows come first; rows [n_decode, n_rows) are prefill rows, cut into n_tiles tiles.
cdef struct Shape:
    int32_t n_rows
    int32_t n_decode
    int32_t n_tiles
    int32_t n_out


cdef class Node:
    cdef readonly str name
    cdef int enqueue(self, cu.CUstream stream, const Shape* shape) except -1
