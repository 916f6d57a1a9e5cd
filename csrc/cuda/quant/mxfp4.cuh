// MXFP4: blocks of 32 in 17 bytes: E8M0 scale byte e (2^(e - 127); 255 is refused on load), 16 bytes of E2M1 codes,
// nibbles as in Q4_0. A code is sign, two exponent bits, one mantissa bit: 0 .5 1 1.5 2 3 4 6 and their negatives.
//
// In a half word of packed codes lie four signs in bits 15, 12, 14, 13 and four magnitudes from bits 9, 6, 3, 0 on, so
// that a shift brings sign and magnitude of a code to where an fp16 number has its sign and the three bits around its
// exponent's end: of two of the codes both at once.
#pragma once

#include "q4_0.cuh"

struct MXFP4 : PackedTile<64, 32, 17, 4, 0> {
    using Scales = uint32_t;  // bytes: e of blocks 0 and 1 of row g, then of row g + 8
    static constexpr int kScaleK = 32;
    static constexpr bool kHasMin = false;

    static HOST_DEVICE uint32_t raw_code(const uint8_t* block, int k) { return nibble_halves(block + 1, k); }
    // Biased float32 exponent of the largest weight that a block can hold (6 = 1.5 * 2^2), 2^10 larger: the scales of
    // `half_scales` then fit into fp16.
    static HOST_DEVICE int raw_exponent(const uint8_t* block) { return block[0] + 12; }

    // First bit of the magnitude and bit of the sign of code i of a half word.
    static HOST_DEVICE int magnitude_at(int i) { return 9 - 3 * i; }
    static HOST_DEVICE int sign_at(int i) { return i == 0 ? 15 : i == 1 ? 12 : 16 - i; }
    static HOST_DEVICE uint32_t arrange(uint32_t nibbles) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i) {
            const uint32_t codes = nibbles >> (4 * i);
            word |= (codes & 0x00070007u) << magnitude_at(i) | (codes >> 3 & 0x00010001u) << sign_at(i);
        }
        return word;
    }

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
        const uint32_t word = q.low[pair / 4];
        const int i = pair % 4;
        const uint32_t c = (word >> magnitude_at(i) & 0x00070007u) | (word >> sign_at(i) & 0x00010001u) << 3;
        low = e2m1(c & 15), high = e2m1(c >> 16);
    }
    static HOST_DEVICE float e2m1(uint32_t code) {
        const uint32_t e = (code >> 1) & 3, m = code & 1;
        const float magnitude = e ? bits_float((126 + e) << 23 | m << 22) : 0.5f * static_cast<float>(m);
        return code > 8 ? -magnitude : magnitude;  // ggml's negative zero is zero
    }
#ifdef __CUDACC__
    // The three magnitude bits are the lowest exponent bits and the highest mantissa bit: the number, subnormals
    // included, over 2^14.
    static DEVICE_MEMBER uint32_t f16_pair(const Codes<4, 0>& q, int pair) {
        const uint32_t word = q.low[pair / 4];
        const int i = pair % 4;
        if (i < 2) return (word << (3 * i)) & 0x8e008e00u;
        // Both shifts as one product: of the bits that are left, no two meet where the mask looks.
        constexpr uint32_t kCodes[] = {0x40384038u, 0x20072007u};
        return (word & kCodes[i - 2]) * ((1u << (3 * i)) + (1u << (i - 1))) & 0x8e008e00u;
    }
    // What `half_scales` adds to the exponents of the blocks' scales in rows g and g + 8.
    static DEVICE_MEMBER uint32_t row_exponents(const float (&inverse)[2]) {
        constexpr uint32_t kBiases = 127 + 127 - 15 - 14;
        return ((__float_as_uint(inverse[0]) >> 23) - kBiases & 0xffffu) |
               ((__float_as_uint(inverse[1]) >> 23) - kBiases) << 16;
    }
    // 2^14 times the scale over the row scale: powers of two all, whose exponents are added. Of a block 2^30 below the
    // row's largest it is 0.
    static DEVICE_MEMBER void half_scales(const Scales& s, int block, const float (&inverse)[2],
                                          uint32_t (&scale)[2][2]) {
        half_scales(s, block, row_exponents(inverse), scale);
    }
    static DEVICE_MEMBER void half_scales(const Scales& s, int block, uint32_t rows, uint32_t (&scale)[2][2]) {
        const uint32_t exponents = __viaddmax_s16x2_relu(s >> (8 * block) & 0x00ff00ffu, rows, 0) << 10;
        scale[0][0] = both_halves(exponents, 0), scale[0][1] = both_halves(exponents, 1);
    }
#endif
};

#define MXFP4_TYPES(X) X(MXFP4, mxfp4)
