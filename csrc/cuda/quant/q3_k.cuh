// Q3_K: blocks of 256 in 110 bytes: 32 bytes of third bits, 64 of 2-bit codes (as Q2_K), 12 of 6-bit scales, float16 d.
// The third bit of element k is bit k / 32 of byte k % 32. Scale s of elements 16s .. 16s + 15: low four bits in
// nibble s / 8 of byte s % 8, upper two in bits 2 (s / 4) of byte 8 + s % 4. w = d (scale - 32) (q - 4).
#pragma once

#include "dequant.cuh"

struct Q3_K : PackedTile<256, 256, 110, 2, 1>, IntegerCodes<Q3_K, 4> {
    static constexpr int kScaleK = 16;
    static constexpr bool kHasMin = false;
    struct Scales {
        uint32_t low[2][2];  // [r][bytes 0-3, 4-7]
        uint32_t high[2];    // [r] bytes 8-11
        uint32_t super;      // d of row g (low half) and row g + 8
    };

    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) {
        const uint32_t low = (block[32 + k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2)) & 3u;
        return low | ((block[k % 32] >> (k / 32)) & 1u) << 2;
    }
    static HOST_DEVICE uint32_t code(const Codes<2, 1>& q, int pair) {
        return Plane<2>::codes(q.low, pair) | Plane<1>::codes<2>(q.high, pair);
    }

    // Words: [three words of scale bytes][g][r], then [g] of d of both rows.
    static HOST_DEVICE uint32_t scale_word(const RawRowTile& raw, int word) {
        if (word < 48) return pad_u32(raw.block(word % 16 / 2 + 8 * (word % 2), 0), 96 + 4 * (word / 16));
        return pad_u16(raw.block(word - 48, 0), 108) | pad_u16(raw.block(word - 40, 0), 108) << 16;
    }
    static HOST_DEVICE Scales load_scales(const uint8_t* packed_tile, int lane) {
        const uint8_t* p = packed_tile + kScaleOffset;
        const int g = lane >> 2;
        const Words2 a = load_words2(p + g * 8), b = load_words2(p + 64 + g * 8), c = load_words2(p + 128 + g * 8);
        return {{{a.x, b.x}, {a.y, b.y}}, {c.x, c.y}, load_u32(p + 192 + g * 4)};
    }
    // Scales 4i .. 4i + 3 of row g + 8r, over 32, in four bytes; a 32-column block has two of them.
    static HOST_DEVICE uint32_t six_bits(const Scales& s, int i, int r) {
        const uint32_t low = ((i & 1 ? s.low[r][1] : s.low[r][0]) >> (4 * (i >> 1))) & 0x0f0f0f0fu;
        return low | ((s.high[r] >> (2 * i)) & 0x03030303u) << 4;
    }
#ifdef __CUDACC__
    static DEVICE_MEMBER void half_scales(const Scales& s, int block, uint32_t (&scale)[2][2], uint32_t (&)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = 2 * (block & 1);
            const uint32_t both = f16_of_bytes<32>(six_bits(s, block >> 1, r), i, i + 1);
            const uint32_t scaled = mul_f16x2(both, both_halves(raise_f16x2(s.super), r));
            scale[0][r] = both_halves(scaled, 0), scale[1][r] = both_halves(scaled, 1);
        }
    }
#endif
    static HOST_DEVICE void scales(const Scales& s, int block, float (&scale)[2][2], float (&)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t bytes = six_bits(s, block >> 1, r);
            const float d = half_float(r ? s.super >> 16 : s.super);
#pragma unroll
            for (int j = 0; j < 2; ++j) scale[j][r] = d * (byte_float(bytes, 2 * (block & 1) + j) - 32.0f);
        }
    }
};

#define Q3_K_TYPES(X) X(Q3_K, q3_k)
