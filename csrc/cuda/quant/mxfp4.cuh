// MXFP4: blocks of 32 in 17 bytes: E8M0 scale byte e (2^(e - 127); 255 is refused on load), 16 bytes of E2M1 codes,
// nibbles as in Q4_0. A code is sign, two exponent bits, one mantissa bit: 0 .5 1 1.5 2 3 4 6 and their negatives.
#pragma once

#include "q4_0.cuh"

struct MXFP4 : PackedTile<64, 32, 17, 4, 0> {
    using Scales = uint32_t;  // bytes: e of blocks 0 and 1 of row g, then of row g + 8
    static constexpr int kScaleK = 32;
    static constexpr bool kHasMin = false;

    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) { return nibble_halves(block + 1, k); }
    // Biased float32 exponent of the largest weight that a block can hold (6 = 1.5 * 2^2).
    static HOST_DEVICE int raw_exponent(const uint8_t* block) { return block[0] + 2; }

    // Words: [g].
    static HOST_DEVICE uint32_t scale_word(const RawRowTile& raw, int word) {
        return pad_u8(raw.block(word, 0), 0) | pad_u8(raw.block(word, 1), 0) << 8 |
               pad_u8(raw.block(word + 8, 0), 0) << 16 | pad_u8(raw.block(word + 8, 1), 0) << 24;
    }
    static HOST_DEVICE Scales load_scales(const uint8_t* packed_tile, int lane) {
        return load_u32(packed_tile + kScaleOffset + (lane >> 2) * 4);
    }
    static HOST_DEVICE void scales(const Scales& s, int block, float (&scale)[2][2], float (&)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t e = (s >> (16 * r + 8 * block)) & 0xff;
            scale[0][r] = bits_float(e ? e << 23 : 0x00400000u);  // 2^-127 is a subnormal
        }
    }
    static HOST_DEVICE void values(const Codes<4, 0>& q, int pair, float& low, float& high) {
        const uint32_t c = Plane<4>::codes(q.low, pair);
        low = e2m1(c & 15), high = e2m1(c >> 16);
    }
    static HOST_DEVICE float e2m1(uint32_t code) {
        const uint32_t e = (code >> 1) & 3, m = code & 1;
        const float magnitude = e ? bits_float((126 + e) << 23 | m << 22) : 0.5f * static_cast<float>(m);
        return code > 8 ? -magnitude : magnitude;  // ggml's negative zero is zero
    }
#ifdef __CUDACC__
    // The three magnitude bits land on the lowest exponent bits and the highest mantissa bit: the number, subnormals
    // included, times a power of two that one exact product takes away.
    static DEVICE_MEMBER uint32_t f16_pair(const Codes<4, 0>& q, int pair) {
        const uint32_t magnitude = Plane<4>::codes<9>(q.low, pair) & 0x0e000e00u;
        const uint32_t sign = Plane<4>::codes<12>(q.low, pair) & 0x80008000u;
        return mul_f16x2(magnitude | sign, 0x74007400u);  // 2^14
    }
#endif
};

#define MXFP4_TYPES(X) X(MXFP4, mxfp4)
