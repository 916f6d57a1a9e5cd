// Whether the weights of a K-quant block are small enough for a GPU, whose products take them in fp16 after a factor of
// 2^4 (csrc/cuda/quant/dequant.cuh, raise_f16x2): the block's scales, the products of these with the scales and minima
// of its parts, and each weight must not be above 4,094 in magnitude, nor, of Q4_K and Q5_K, 1,024 times its scales
// (f16_of_bytes_times). One of them that is becomes infinite.
//
// Most blocks are known to fit by their two float16 numbers alone. The layouts are those of csrc/cuda/quant.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace check {

enum KQuant : uint8_t { kNoKQuant, kQ2K, kQ3K, kQ4K, kQ5K, kQ6K };

constexpr float kLargestWeight = 4094.0f;

inline uint16_t half_bits(const uint8_t* p) {
    uint16_t v;
    std::memcpy(&v, p, 2);
    return v;
}

// The value of a finite float16.
inline float half_value(const uint8_t* p) {
    const int bits = half_bits(p), exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float v = exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                             : std::ldexp(static_cast<float>(fraction), -24);
    return bits >> 15 ? -v : v;
}

// Scale and minimum of 32 elements, part i of 8, of the 12 bytes `b` of a Q4_K or Q5_K block.
inline void six_bits(const uint8_t* b, int i, int* scale, int* min) {
    *scale = i < 4 ? b[i] & 63 : (b[i + 4] & 15) | b[i - 4] >> 6 << 4;
    *min = i < 4 ? b[i + 4] & 63 : b[i + 4] >> 4 | b[i] >> 6 << 4;
}

// Code of element k of a block, less what is taken off all codes of the type; scale and minimum of its part.
inline int k_element(KQuant type, const uint8_t* b, int k, int* scale, int* min) {
    *min = 0;
    const int pair = b[(type == kQ2K ? 16 : 32) + k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2) & 3;  // of Q2_K, Q3_K
    switch (type) {
        case kQ2K:
            *scale = b[k / 16] & 15, *min = b[k / 16] >> 4;
            return pair;
        case kQ3K: {
            const int s = k / 16;
            *scale = ((b[96 + s % 8] >> (s / 8 * 4) & 15) | (b[104 + s % 4] >> (s / 4 * 2) & 3) << 4) - 32;
            return (pair | (b[k % 32] >> (k / 32) & 1) << 2) - 4;
        }
        case kQ6K: {
            const int n = k / 128, q = k % 128 / 32, l = k % 32;
            *scale = static_cast<int8_t>(b[192 + k / 16]);
            return ((b[64 * n + 32 * (q % 2) + l] >> (q / 2 * 4) & 15) | (b[128 + 32 * n + l] >> (2 * q) & 3) << 4) -
                   32;
        }
        default: {
            six_bits(b + 4, k / 32, scale, min);
            const int low = b[(type == kQ4K ? 16 : 48) + k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4) & 15;
            return type == kQ4K ? low : low | (b[16 + k % 32] >> (k / 32) & 1) << 4;
        }
    }
}

// Where a block's d and its dmin are (twice d where there is none), and magnitudes of both, as float16 bits, up to
// which every block fits whatever else is in it.
struct KNumbers {
    int d, dmin;
    uint16_t safe_d, safe_dmin;
};

inline KNumbers k_numbers(KQuant type) {
    switch (type) {
        case kQ2K:
            return {80, 82, 0x5000, 0x5800};  // 15 * 3 * 32 + 15 * 128 = 3360
        case kQ3K:
            return {108, 108, 0x4c00, 0x4c00};  // 32 * 4 * 16 = 2048
        case kQ4K:
            return {0, 2, 0x4000, 0x4200};  // 63 * 15 * 2 + 63 * 3 = 2079, 1024 * 3
        case kQ5K:
            return {0, 2, 0x3c00, 0x4200};  // 63 * 31 * 1 + 63 * 3 = 2142, 1024 * 3
        default:
            return {208, 208, 0x3800, 0x3800};  // 128 * 32 * 0.5 = 2048
    }
}

inline bool is_safe(const KNumbers& n, const uint8_t* block) {
    return ((half_bits(block + n.d) & 0x7fff) <= n.safe_d) & ((half_bits(block + n.dmin) & 0x7fff) <= n.safe_dmin);
}

inline bool k_weights_fit(KQuant type, const KNumbers& n, const uint8_t* block) {
    if (is_safe(n, block)) return true;
    const float d = half_value(block + n.d), dmin = n.dmin == n.d ? 0.0f : half_value(block + n.dmin);
    const float power = type == kQ4K || type == kQ5K ? 1024.0f : 1.0f;
    float largest = power * std::max(std::fabs(d), std::fabs(dmin));
    for (int k = 0; k < 256; ++k) {
        int scale, min;
        const int code = k_element(type, block, k, &scale, &min);
        const float ds = d * static_cast<float>(scale), dm = dmin * static_cast<float>(min);
        largest = std::max({largest, std::fabs(ds), std::fabs(dm), std::fabs(ds * static_cast<float>(code) - dm)});
    }
    return largest <= kLargestWeight;
}

}  // namespace check
