// Q2_K: blocks of 256 in 84 bytes: 16 bytes of scales (low nibble) and mins (high nibble) of 16 elements each, 64 bytes
// of 2-bit codes, float16 d and dmin. Element k: bits 2 (k % 128 / 32) of code byte 32 (k / 128) + k % 32.
// w = d scale q - dmin min.
#pragma once

#include "dequant.cuh"

struct Q2_K : PackedTile<256, 256, 84, 2, 0>, IntegerCodes<Q2_K, 0> {
    static constexpr int kScaleK = 16;
    static constexpr bool kHasMin = true;
    struct Scales {
        Words4 sub[2];  // of rows g and g + 8: byte i holds scale and min of elements 16i .. 16i + 15
        Words2 super;   // (d, dmin) of rows g and g + 8
    };

    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) {
        return (block[16 + k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2)) & 3u;
    }
    static HOST_DEVICE uint32_t code(const Codes<2, 0>& q, int pair) { return Plane<2>::codes(q.low, pair); }

    // Words: [row][4] of scale bytes, then [g][r] of (d, dmin).
    static HOST_DEVICE uint32_t scale_word(const RawRowTile& raw, int word) {
        if (word < 64) return pad_u32(raw.block(word / 4, 0), 4 * (word % 4));
        return pad_u32(raw.block((word - 64) / 2 + 8 * (word % 2), 0), 80);
    }
    static HOST_DEVICE Scales load_scales(const uint8_t* packed_tile, int lane) {
        const uint8_t* p = packed_tile + kScaleOffset;
        const int g = lane >> 2;
        return {{load_words4(p + g * 16), load_words4(p + (g + 8) * 16)}, load_words2(p + 256 + g * 8)};
    }
#ifdef __CUDACC__
    static DEVICE_MEMBER void half_scales(const Scales& s, int block, uint32_t (&scale)[2][2], uint32_t (&min)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Words4& v = s.sub[r];
            const int which = block >> 1;
            const uint32_t word = which == 0 ? v.x : which == 1 ? v.y : which == 2 ? v.z : v.w;
            const uint32_t super = raise_f16x2((r ? s.super.y : s.super.x) ^ 0x80000000u);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t byte = word >> (8 * (2 * (block & 1) + j));
                const uint32_t both = f16_of_codes<0>((byte & 15u) | (byte & 0xf0u) << 12);
                const uint32_t scaled = mul_f16x2(both, super);  // (d scale, -dmin min)
                scale[j][r] = both_halves(scaled, 0), min[j][r] = both_halves(scaled, 1);
            }
        }
    }
#endif
    static HOST_DEVICE void scales(const Scales& s, int block, float (&scale)[2][2], float (&min)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int which = block >> 1;
            const Words4& v = s.sub[r];
            const uint32_t word = which == 0 ? v.x : which == 1 ? v.y : which == 2 ? v.z : v.w;
            const uint32_t super = r ? s.super.y : s.super.x, low = word & 0x0f0f0f0fu,
                           high = (word >> 4) & 0x0f0f0f0fu;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                scale[j][r] = half_float(super) * byte_float(low, 2 * (block & 1) + j);
                min[j][r] = -(half_float(super >> 16) * byte_float(high, 2 * (block & 1) + j));
            }
        }
    }
};

#define Q2_K_TYPES(X) X(Q2_K, q2_k)
