// Q4_K (144 bytes: float16 d and dmin, 12 bytes of scales, 128 of nibbles) and Q5_K (176: d, dmin, 12 of scales, 32 of
// fifth bits, 128 of nibbles); blocks of 256, scale and min for every 32 elements.
// Element k: nibble k % 64 / 32 of byte 32 (k / 64) + k % 32; fifth bit: bit k / 32 of byte k % 32.
// 6-bit scale s and min m of 32-column block i, over bytes b: i < 4: s = b[i] & 63, m = b[i+4] & 63; else
// s = b[i+4] & 15 | b[i-4] >> 6 << 4, m = b[i+4] >> 4 | b[i] >> 6 << 4. w = d s q - dmin m.
#pragma once

#include "dequant.cuh"

HOST_DEVICE uint32_t nibble_chunks(const uint8_t* bytes, int k) {
    return (bytes[k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4)) & 15u;
}

// Scales of Q4_K and Q5_K: the first 16 bytes of each row's block, as they are.
template <class Q>
struct KScales {
    static constexpr int kScaleK = 32;
    static constexpr bool kHasMin = true;
    struct Scales {
        Words4 row[2];  // {(d, dmin), scale bytes 0-3, 4-7, 8-11} of rows g and g + 8
    };

    // Words: [row][4].
    static HOST_DEVICE uint32_t scale_word(const RawRowTile& raw, int word) {
        return pad_u32(raw.block(word / 4, 0), 4 * (word % 4));
    }
    static HOST_DEVICE Scales load_scales(const uint8_t* packed_tile, int lane) {
        const uint8_t* p = packed_tile + Q::kScaleOffset + (lane >> 2) * 16;
        return {{load_words4(p), load_words4(p + 128)}};
    }
    // The bytes with scale and min of blocks 0-3 or 4-7 of a row.
    static HOST_DEVICE Words2 six_bits(const Words4& v, int block) {
        if (block < 4) return {v.y & 0x3f3f3f3fu, v.z & 0x3f3f3f3fu};
        return {(v.w & 0x0f0f0f0fu) | ((v.y >> 2) & 0x30303030u),
                ((v.w >> 4) & 0x0f0f0f0fu) | ((v.z >> 2) & 0x30303030u)};
    }
#ifdef __CUDACC__
    static DEVICE_MEMBER void half_scales(const Scales& s, int block, uint32_t (&scale)[2][2], uint32_t (&min)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // Of two neighbouring blocks at once.
            const Words2 b = six_bits(s.row[r], block);
            const uint32_t super = raise_f16x2(s.row[r].x ^ 0x80000000u);  // (d, -dmin)
            const uint32_t power = mul_f16x2(super, kMinusF16Power);  // exact where k_weights.h lets the block pass
            const int i = block & 2;
            const uint32_t scales = f16_of_bytes_times(b.x, i, i + 1, both_halves(super, 0), both_halves(power, 0));
            const uint32_t mins = f16_of_bytes_times(b.y, i, i + 1, both_halves(super, 1), both_halves(power, 1));
            scale[0][r] = both_halves(scales, block & 1), min[0][r] = both_halves(mins, block & 1);
        }
    }
#endif
    static HOST_DEVICE void scales(const Scales& s, int block, float (&scale)[2][2], float (&min)[2][2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Words4& v = s.row[r];
            const Words2 b = six_bits(v, block);
            const uint32_t scale_bytes = b.x, min_bytes = b.y;
            scale[0][r] = half_float(v.x) * byte_float(scale_bytes, block & 3);
            min[0][r] = -(half_float(v.x >> 16) * byte_float(min_bytes, block & 3));
        }
    }
};

struct Q4_K : PackedTile<256, 256, 144, 4, 0>, KScales<Q4_K>, IntegerCodes<Q4_K, 0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) { return nibble_chunks(block + 16, k); }
    static HOST_DEVICE uint32_t code(const Codes<4, 0>& q, int pair) { return Plane<4>::codes(q.low, pair); }
};

struct Q5_K : PackedTile<256, 256, 176, 4, 1>, KScales<Q5_K>, IntegerCodes<Q5_K, 0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) {
        return nibble_chunks(block + 48, k) | ((block[16 + k % 32] >> (k / 32)) & 1u) << 4;
    }
    static HOST_DEVICE uint32_t code(const Codes<4, 1>& q, int pair) { return FiveBits::codes(q.low, q.high, pair); }
};

#define Q4_K_TYPES(X) \
    X(Q4_K, q4_k)     \
    X(Q5_K, q5_k)
