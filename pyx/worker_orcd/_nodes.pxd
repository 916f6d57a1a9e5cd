# C view of the launches of one step: what the engine enqueues, op after op.
from libc.stdint cimport int32_t

from worker_orcd._driver cimport LaunchList


# The shape of one step. Decode rows come first; rows [n_decode, n_rows) are prefill rows, cut into n_tiles tiles.
cdef struct Shape:
    int32_t n_rows
    int32_t n_decode
    int32_t n_tiles
    int32_t n_out


cdef class Node:
    cdef readonly str name
    cdef int enqueue(self, LaunchList launches, const Shape* shape) except -1
