// From integer codes to packed bf16 and fp16 numbers, exactly, without conversion instructions.
//
// A code in the low bits of a power of two's significand makes the number "power plus code"; subtracting the power and
// the zero point together leaves the code's value. Both steps are exact: codes have at most 8 bits.
#pragma once

#include "layout.cuh"

#ifdef __CUDACC__

// Packed codes below 128, minus kZero (0..64): 0x4300 is 128 in bf16, whose step is 1 there.
template <int kZero>
DEVICE uint32_t bf16_of_codes(uint32_t codes) {
    constexpr uint32_t kBias = 0xc300u + kZero;  // -(128 + kZero)
    return fma_bf16x2(codes | 0x43004300u, 0x3f803f80u, kBias | kBias << 16);
}

// Packed codes below 1024, minus kZero (0..1023): 0x6400 is 1024 in fp16, whose step is 1 there.
template <int kZero>
DEVICE uint32_t f16_of_codes(uint32_t codes) {
    constexpr uint32_t kBias = 0x6400u + kZero;
    return sub_f16x2(codes | 0x64006400u, kBias | kBias << 16);
}

#endif

// The low or high 16-bit half of `word`, in both halves.
HOST_DEVICE uint32_t both_halves(uint32_t word, int high) {
    const uint32_t half = high ? word >> 16 : word & 0xffffu;
    return half | half << 16;
}

// Base of types whose codes are integers c with weight scale * (c - kZero) (+ min). The type gives code(q, pair).
template <class Q, int kZero>
struct IntegerCodes {
    // The two numbers of a pair before scaling.
    template <class C>
    static HOST_DEVICE void values(const C& q, int pair, float& low, float& high) {
        const uint32_t c = Q::code(q, pair);
        low = static_cast<float>(static_cast<int>(c & 0xffff) - kZero);
        high = static_cast<float>(static_cast<int>(c >> 16) - kZero);
    }
#ifdef __CUDACC__
    template <class C>
    static DEVICE_MEMBER uint32_t bf16_pair(const C& q, int pair) {
        return bf16_of_codes<kZero>(Q::code(q, pair));
    }
    template <class C>
    static DEVICE_MEMBER uint32_t f16_pair(const C& q, int pair) {
        return f16_of_codes<kZero>(Q::code(q, pair));
    }
#endif
};

// Scales of types with 32-element blocks and one float16 scale: per row two halves (block 0 low), as {row g, row g+8}.
template <class Q>
struct HalfScales {
    using Scales = Words2;
    static constexpr int kScaleK = 32;
    static constexpr bool kHasMin = false;
    static constexpr bool kHalfScale = true;

    // Words: [g][r], each the scales of blocks 0 and 1 of row g + 8r.
    static HOST_DEVICE uint32_t scale_word(const RawRowTile& raw, int word) {
        const int row = word / 2 + 8 * (word % 2);
        return pad_u16(raw.block(row, 0), 0) | pad_u16(raw.block(row, 1), 0) << 16;
    }
    static HOST_DEVICE Scales load_scales(const uint8_t* packed_tile, int lane) {
        return load_words2(packed_tile + Q::kScaleOffset + (lane >> 2) * 8);
    }
    static HOST_DEVICE void scales(const Scales& s, int block, float (&scale)[2][2], float (&)[2][2]) {
        scale[0][0] = half_float(block ? s.x >> 16 : s.x);
        scale[0][1] = half_float(block ? s.y >> 16 : s.y);
    }
    static HOST_DEVICE uint32_t half_scale(const Scales& s, int block, int r) {
        return both_halves(r ? s.y : s.x, block);
    }
};

// As HalfScales with a float16 minimum beside each scale: weight = scale * code + min.
template <class Q>
struct HalfScalesMins {
    using Scales = Words4;  // {scales of row g, mins of row g, scales of row g + 8, mins of row g + 8}
    static constexpr int kScaleK = 32;
    static constexpr bool kHasMin = true;
    static constexpr bool kHalfScale = true;

    // Words: [g][r][scale, min], each of blocks 0 and 1.
    static HOST_DEVICE uint32_t scale_word(const RawRowTile& raw, int word) {
        const int row = word / 4 + 8 * (word / 2 % 2), at = 2 * (word % 2);
        return pad_u16(raw.block(row, 0), at) | pad_u16(raw.block(row, 1), at) << 16;
    }
    static HOST_DEVICE Scales load_scales(const uint8_t* packed_tile, int lane) {
        return load_words4(packed_tile + Q::kScaleOffset + (lane >> 2) * 16);
    }
    static HOST_DEVICE void scales(const Scales& s, int block, float (&scale)[2][2], float (&min)[2][2]) {
        scale[0][0] = half_float(block ? s.x >> 16 : s.x);
        scale[0][1] = half_float(block ? s.z >> 16 : s.z);
        min[0][0] = half_float(block ? s.y >> 16 : s.y);
        min[0][1] = half_float(block ? s.w >> 16 : s.w);
    }
    static HOST_DEVICE uint32_t half_scale(const Scales& s, int block, int r) {
        return both_halves(r ? s.z : s.x, block);
    }
    static HOST_DEVICE uint32_t half_min(const Scales& s, int block, int r) {
        return both_halves(r ? s.w : s.y, block);
    }
};
