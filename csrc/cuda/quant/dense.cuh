// F32, F16 and BF16: unquantized matrices in the same packed tiles, one plane of whole elements and no scales.
#pragma once

#include "dequant.cuh"

struct F32 : PackedTile<64, 1, 4, 32, 0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* element, int) { return raw_u32(element); }
    static HOST_DEVICE int raw_exponent(const uint8_t* element) {
        return static_cast<int>(raw_u32(element) >> 23 & 0xff);
    }
    static HOST_DEVICE uint32_t scale_word(const RawRowTile&, int) { return 0; }
    static HOST_DEVICE void values(const Codes<32, 0>& q, int pair, float& low, float& high) {
        low = bits_float(q.low[2 * pair]), high = bits_float(q.low[2 * pair + 1]);
    }
};

struct F16 : PackedTile<64, 1, 2, 16, 0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* element, int) { return raw_u16(element); }
    static HOST_DEVICE uint32_t scale_word(const RawRowTile&, int) { return 0; }
    static HOST_DEVICE void values(const Codes<16, 0>& q, int pair, float& low, float& high) {
        low = half_float(q.low[pair]), high = half_float(q.low[pair] >> 16);
    }
};

struct BF16 : PackedTile<64, 1, 2, 16, 0> {
    static HOST_DEVICE uint32_t raw_code(const uint8_t* element, int) { return raw_u16(element); }
    static HOST_DEVICE int raw_exponent(const uint8_t* element) {
        return static_cast<int>(raw_u16(element) >> 7 & 0xff);
    }
    static HOST_DEVICE uint32_t scale_word(const RawRowTile&, int) { return 0; }
    static HOST_DEVICE void values(const Codes<16, 0>& q, int pair, float& low, float& high) {
        low = bits_float(q.low[pair] << 16), high = bits_float(q.low[pair] & 0xffff0000u);
    }
};

#define DENSE_TYPES(X) \
    X(F32, f32)        \
    X(F16, f16)        \
    X(BF16, bf16)
