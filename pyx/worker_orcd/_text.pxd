# C view of a stream decoder, for the sinks of jobs (see _output.pyx).
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "host/text_decoder.h" namespace "worker_orcd" nogil:
    cdef cppclass CTokenTable "worker_orcd::TokenTable":
        string blob
        vector[uint32_t] offsets
        vector[uint8_t] control
        cbool strip_space
        size_t n_vocab() noexcept
        const char* data(size_t token) noexcept
        size_t size(size_t token) noexcept

    cdef cppclass CTextDecoder "worker_orcd::TextDecoder":
        CTextDecoder() except +
        CTextDecoder(const CTextDecoder& other) except +
        CTextDecoder(shared_ptr[const CTokenTable] table, cbool skip_control, cbool continues) except +
        void push(int32_t token, string& out) except +
        void flush(string& out) except +


cdef class TokenTable:
    cdef shared_ptr[CTokenTable] table


cdef class TextDecoder:
    cdef CTextDecoder decoder
