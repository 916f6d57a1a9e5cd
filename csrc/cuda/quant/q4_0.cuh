// Q4_0 (18 bytes: float16 d, 16 bytes of codes) and Q4_1 (20: d, float16 m, codes); blocks of 32.
// Element l < 16 is the low nibble of byte l, l >= 16 the high nibble of byte l - 16.
// Q4_0: w = d (q - 8). Q4_1: w = d q + m.
#pragma once

#include "dequant.cuh"

HOST_DEVICE uint32_t nibble_halves(const uint8_t* bytes, int k) { return k < 16 ? bytes[k] & 15u : bytes[k - 16] >> 4; }

struct Q4_0 : PackedTile<64, 32, 18, 4, 0>, HalfScales<Q4_0>, IntegerCodes<Q4_0, 8> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) { return nibble_halves(block + 2, k); }
    static HOST_DEVICE uint32_t code(const Codes<4, 0>& q, int pair) { return Plane<4>::codes(q.low, pair); }
};

struct Q4_1 : PackedTile<64, 32, 20, 4, 0>, HalfScalesMins<Q4_1>, IntegerCodes<Q4_1, 0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) { return nibble_halves(block + 4, k); }
    static HOST_DEVICE uint32_t code(const Codes<4, 0>& q, int pair) { return Plane<4>::codes(q.low, pair); }
};

#define Q4_0_TYPES(X) \
    X(Q4_0, q4_0)     \
    X(Q4_1, q4_1)
