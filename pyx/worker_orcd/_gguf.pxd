# C view of how a tensor type is checked, for the uploader.
from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef extern from "host/tensor_check.h" namespace "check" nogil:
    enum Number:
        CHECK_F32 "check::kF32"
        CHECK_F16 "check::kF16"
        CHECK_BF16 "check::kBF16"
        CHECK_E8M0 "check::kE8M0"

    enum KQuant:
        CHECK_NO_K_QUANT "check::kNoKQuant"
        CHECK_Q2_K "check::kQ2K"
        CHECK_Q3_K "check::kQ3K"
        CHECK_Q4_K "check::kQ4K"
        CHECK_Q5_K "check::kQ5K"
        CHECK_Q6_K "check::kQ6K"

    cppclass Rule:
        uint32_t block_bytes
        Number number
        uint8_t n_at
        uint16_t at[2]
        KQuant weights


cdef Rule rule_of(tuple description)
