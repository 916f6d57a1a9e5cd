// From integer codes to packed fp16 numbers, exactly, without conversion instructions; scales as packed fp16.
//
// A code in the low bits of a power of two's significand makes the number "power plus code"; subtracting the power and
// the zero point together leaves the code's value. Both steps are exact: codes have at most 8 bits.
#pragma once

#include "layout.cuh"

#ifdef __CUDACC__

constexpr uint32_t kF16Power = 0x64006400u;       // 1024 in fp16, whose step is 1 there
constexpr uint32_t kMinusF16Power = 0xe400e400u;  // -1024

// From packed fp16 numbers 1024 + code * 2^kShift to the codes minus kZero.
template <int kZero, int kShift = 0>
DEVICE uint32_t f16_less_power(uint32_t sums) {
    if constexpr (kShift == 0) {
        constexpr uint32_t kBias = 0x6400u + kZero;
        return sub_f16x2(sums, kBias | kBias << 16);
    } else if constexpr (kShift == 4) {
        static_assert(kZero < 64);
        constexpr uint32_t kBias = 0xd400u + 16 * kZero;  // -(64 + kZero), whose step is 1/16 there
        return fma_f16x2(sums, 0x2c002c00u, kBias | kBias << 16);
    } else {
        static_assert(kShift == 5 && kZero < 32);
        constexpr uint32_t kBias = 0xd000u + 32 * kZero;  // -(32 + kZero), whose step is 1/32 there
        return fma_f16x2(sums, 0x28002800u, kBias | kBias << 16);
    }
}

// Packed codes below 1024, minus kZero.
template <int kZero>
DEVICE uint32_t f16_of_codes(uint32_t codes) {
    return f16_less_power<kZero>(codes | kF16Power);
}

// Scales of K-quants, which are rounded to fp16, are made 2^4 times larger first: the small blocks of a matrix keep
// their precision, and weights up to 4094 fit (kWeightUnit).
DEVICE uint32_t raise_f16x2(uint32_t scales) { return mul_f16x2(scales, 0x4c004c00u); }

// Bytes i and j of `a`, as packed fp16 numbers minus kZero. Exact.
template <int kZero>
DEVICE uint32_t f16_of_bytes(uint32_t a, int i, int j) {
    return f16_less_power<kZero>(__byte_perm(a, kF16Power, static_cast<uint32_t>(i | j << 8 | 0x5050)));
}

// Bytes i and j of `a`, each times `scale`, rounded once; minus_power is -1024 * scale, exact.
DEVICE uint32_t f16_of_bytes_times(uint32_t a, int i, int j, uint32_t scale, uint32_t minus_power) {
    return fma_f16x2(__byte_perm(a, kF16Power, static_cast<uint32_t>(i | j << 8 | 0x5050)), scale, minus_power);
}

#endif

// The low or high 16-bit half of `word`, in both halves.
HOST_DEVICE uint32_t both_halves(uint32_t word, int high) {
#ifdef __CUDA_ARCH__
    return high ? both_high(word) : both_low(word);
#else
    const uint32_t half = high ? word >> 16 : word & 0xffffu;
    return half | half << 16;
#endif
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
    static DEVICE_MEMBER uint32_t f16_pair(const C& q, int pair) {
        if constexpr (Q::kFiveBits) {
            if (pair == FiveBits::kLastPair) return f16_of_codes<kZero>(FiveBits::codes(q.low, q.high, pair));
            const uint32_t word = FiveBits::word(q.low, q.high, pair / 3);
            if (pair % 3 == 1) return f16_less_power<kZero, 5>(and_or(word, 0x03e003e0u, kF16Power));
            return f16_less_power<kZero>(and_or(pair % 3 ? word >> 10 : word, 0x001f001fu, kF16Power));
        }
        if constexpr (Q::kSixBits) {
            if (pair >= SixBits::kFirstSplit) {
                const uint32_t upper = and_or(q.low[pair - SixBits::kFirstSplit], 0x03c003c0u, kF16Power);
                return f16_less_power<kZero, 4>(and_or(SixBits::lower_at_4(q.high, pair), 0x00300030u, upper));
            }
            const uint32_t word = SixBits::word(q.low, q.high, pair % SixBits::kWords);
            return f16_less_power<kZero>(and_or(pair < SixBits::kWords ? word : word >> 10, 0x003f003fu, kF16Power));
        }
        // Odd pairs of four-bit codes stay where an even shift puts them: half the shifts.
        if (Q::kLowBits == 4 && (pair & 1)) return f16_less_power<kZero, 4>(or_codes<4>(q, pair));
        return f16_less_power<kZero>(or_codes<0>(q, pair));
    }
    // 1024 + code * 2^kTo.
    template <int kTo, class C>
    static DEVICE_MEMBER uint32_t or_codes(const C& q, int pair) {
        const uint32_t low = Plane<Q::kLowBits>::template or_codes<kTo>(q.low, pair, kF16Power);
        if constexpr (Q::kHighBits > 0)
            return Plane<Q::kHighBits>::template or_codes<Q::kLowBits + kTo>(q.high, pair, low);
        else
            return low;
    }
#endif
};

// Scales of types with 32-element blocks and one float16 scale: per row two halves (block 0 low), as {row g, row g+8}.
template <class Q>
struct HalfScales {
    using Scales = Words2;
    static constexpr int kScaleK = 32;
    static constexpr bool kHasMin = false;

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
    static HOST_DEVICE void half_scales(const Scales& s, int block, uint32_t (&scale)[2][2], uint32_t (&)[2][2]) {
        scale[0][0] = both_halves(s.x, block), scale[0][1] = both_halves(s.y, block);
    }
};

// As HalfScales with a float16 minimum beside each scale: weight = scale * code + min.
template <class Q>
struct HalfScalesMins {
    using Scales = Words4;  // {scales of row g, mins of row g, scales of row g + 8, mins of row g + 8}
    static constexpr int kScaleK = 32;
    static constexpr bool kHasMin = true;

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
    static HOST_DEVICE void half_scales(const Scales& s, int block, uint32_t (&scale)[2][2], uint32_t (&min)[2][2]) {
        scale[0][0] = both_halves(s.x, block), scale[0][1] = both_halves(s.z, block);
        min[0][0] = both_halves(s.y, block), min[0][1] = both_halves(s.w, block);
    }
};
