// Q6_K: blocks of 256 in 210 bytes: 128 bytes of low nibbles, 64 of upper bit pairs, 16 int8 scales of 16 elements
// each, float16 d. Element k, with n = k / 128, q = k % 128 / 32, l = k % 32: nibble q / 2 of byte 64n + 32 (q % 2) +
// l, upper bits 2q of byte 32n + l. w = d scale (q - 32).
#pragma once

#include "dequant.cuh"

struct Q6_K : PackedTile<256, 256, 210, 4, 2>, IntegerCodes<Q6_K, 32> {
    static constexpr int kScaleK = 16;
    static constexpr bool kHasMin = false;
    struct Scales {
        Words4 sub[2];   // of rows g and g + 8: int8 scale of elements 16i .. 16i + 15 in byte i
        uint32_t super;  // d of row g (low half) and row g + 8
    };

    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) {
        const int n = k / 128, q = k % 128 / 32, l = k % 32;
        const uint32_t low = (block[64 * n + 32 * (q % 2) + l] >> (4 * (q / 2))) & 15u;
        return low | ((block[128 + 32 * n + l] >> (2 * q)) & 3u) << 4;
    }
    static HOST_DEVICE uint32_t code(const Codes<4, 2>& q, int pair) { return SixBits::codes(q.low, q.high, pair); }

    // Words: [row][4] of scale bytes, then [g] of d of both rows.
    static HOST_DEVICE uint32_t scale_word(const RawRowTile& raw, int word) {
        if (word < 64) return pad_u32(raw.block(word / 4, 0), 192 + 4 * (word % 4));
        return pad_u16(raw.block(word - 64, 0), 208) | pad_u16(raw.block(word - 56, 0), 208) << 16;
    }
    static HOST_DEVICE Scales load_scales(const uint8_t* packed_tile, int lane) {
        const uint8_t* p = packed_tile + kScaleOffset;
        const int g = lane >> 2;
        return {{load_words4(p + g * 16), load_words4(p + (g + 8) * 16)}, load_u32(p + 256 + g * 4)};
    }
#ifdef __CUDACC__
    static DEVICE_MEMBER void half_scales(const Scales& s, int block, uint32_t (&scale)[2][2], uint32_t (&)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Words4& v = s.sub[r];
            const int which = block >> 1, i = 2 * (block & 1);
            const uint32_t word = which == 0 ? v.x : which == 1 ? v.y : which == 2 ? v.z : v.w;
            const uint32_t both = f16_of_bytes<128>(word ^ 0x80808080u, i, i + 1);
            const uint32_t scaled = mul_f16x2(both, both_halves(raise_f16x2(s.super), r));
            scale[0][r] = both_halves(scaled, 0), scale[1][r] = both_halves(scaled, 1);
        }
    }
#endif
    static HOST_DEVICE void scales(const Scales& s, int block, float (&scale)[2][2], float (&)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int which = block >> 1;
            const Words4& v = s.sub[r];
            const uint32_t word = which == 0 ? v.x : which == 1 ? v.y : which == 2 ? v.z : v.w;
            const float d = half_float(r ? s.super >> 16 : s.super);
            // Signed bytes, moved by 128 to unsigned ones.
#pragma unroll
            for (int j = 0; j < 2; ++j)
                scale[j][r] = d * (byte_float(word ^ 0x80808080u, 2 * (block & 1) + j) - 128.0f);
        }
    }
};

#define Q6_K_TYPES(X) X(Q6_K, q6_k)
