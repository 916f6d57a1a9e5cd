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
    static DEVICE_MEMBER uint32_t f16_pair(const Codes<8, 0>& q, int pair) {
        // 1024 + code + 128: the exclusive or moves the sign bit
        return f16_less_power<128>(and_xor(Plane<8>::shifted(q.low, pair), 0x00ff00ffu, kF16Power | 0x00800080u));
    }
#endif
};

#define Q8_0_TYPES(X) X(Q8_0, q8_0)
