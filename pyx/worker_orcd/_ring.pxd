# C view of the token queue and the control flag, for the decode loops of the engines.
from libc.stdint cimport int32_t, int64_t, uint64_t
from libcpp cimport bool as cbool


cdef extern from "host/token_queue.h" namespace "worker_orcd" nogil:
    cdef struct TokenEntry:
        int64_t seq_id
        int32_t token

    cdef cppclass TokenQueue:
        TokenQueue(size_t capacity) except +
        size_t push_many(const int64_t* seq_ids, const int32_t* tokens, size_t n) noexcept
        int try_push_many(const int64_t* seq_ids, const int32_t* tokens, size_t n) noexcept
        size_t pop_some(TokenEntry* out, size_t max_n, double timeout_s) noexcept
        void close() noexcept
        cbool closed() noexcept
        size_t size() noexcept
        size_t capacity() noexcept

    cdef cppclass ControlFlag:
        ControlFlag() except +
        void interrupt() noexcept
        void abort() noexcept
        void clear() noexcept
        cbool interrupted() noexcept
        cbool aborted() noexcept
        void step_done() noexcept
        uint64_t n_steps() noexcept


cdef class TokenRing:
    cdef TokenQueue* queue
    # Appends n pairs, waiting while the ring is full; returns fewer than n only when it was closed.
    cdef size_t push_many(self, const int64_t* seq_ids, const int32_t* tokens, size_t n) noexcept nogil


cdef class Control:
    cdef ControlFlag* flag
    cdef cbool is_set(self) noexcept nogil
