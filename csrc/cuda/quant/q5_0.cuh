// Q5_0 (22 bytes: float16 d, 4 bytes of fifth bits, 16 bytes of nibbles) and Q5_1 (24: d, float16 m, fifth bits,
// nibbles); blocks of 32. Nibbles as in Q4_0; bit l of the little-endian 32-bit word is the fifth bit of element l.
// Q5_0: w = d (q - 16). Q5_1: w = d q + m.
#pragma once

#include "q4_0.cuh"

HOST_DEVICE uint32_t code5(const Codes<4, 1>& q, int pair) { return FiveBits::codes(q.low, q.high, pair); }

struct Q5_0 : PackedTile<64, 32, 22, 4, 1>, HalfScales<Q5_0>, IntegerCodes<Q5_0, 16> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) {
        return nibble_halves(block + 6, k) | ((block[2 + k / 8] >> (k % 8)) & 1u) << 4;
    }
    static HOST_DEVICE uint32_t code(const Codes<4, 1>& q, int pair) { return code5(q, pair); }
};

struct Q5_1 : PackedTile<64, 32, 24, 4, 1>, HalfScalesMins<Q5_1>, IntegerCodes<Q5_1, 0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) {
        return nibble_halves(block + 8, k) | ((block[4 + k / 8] >> (k % 8)) & 1u) << 4;
    }
    static HOST_DEVICE uint32_t code(const Codes<4, 1>& q, int pair) { return code5(q, pair); }
};

#define Q5_0_TYPES(X) \
    X(Q5_0, q5_0)     \
    X(Q5_1, q5_1)
