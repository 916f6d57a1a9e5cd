// Q8_0: blocks of 32 in 34 bytes: float16 d, 32 int8 codes. w = d q.
#pragma once

#include "dequant.cuh"

struct Q8_0 : PackedTile<64, 32, 34, 8, 0>, HalfScales<Q8_0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) { return block[2 + k]; }

    static HOST_DEVICE void values(const Codes<8, 0>& q, int pair, float& low, float& high) {
        const uint32_t c = Plane<8>::codes(q.low, pair);
        low = static_cast<float>(static_cast<int8_t>(c & 0xff));
        high = static_cast<float>(static_cast<int8_t>(c >> 16));
    }
#ifdef __CUDACC__
    // The low seven bits over 128, less 128 or (sign bit set: the step above) 256. Exact.
    static DEVICE_MEMBER uint32_t bf16_pair(const Codes<8, 0>& q, int pair) {
        const uint32_t c = Plane<8>::codes(q.low, pair);
        const uint32_t low7 = (c & 0x007f007fu) | 0x43004300u, sign = (c & 0x00800080u) | 0x43004300u;
        return fma_bf16x2(sign, 0xbf80bf80u, low7);
    }
    static DEVICE_MEMBER uint32_t f16_pair(const Codes<8, 0>& q, int pair) {
        return f16_of_codes<128>(Plane<8>::codes(q.low, pair) ^ 0x00800080u);
    }
#endif
};

#define Q8_0_TYPES(X) X(Q8_0, q8_0)
