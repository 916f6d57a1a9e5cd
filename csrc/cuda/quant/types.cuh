// All matrix types, and what kernels ask of a type beyond its header.
//
// A type gives (static members):
//   PackedTile<...>           sizes of its packed tile
//   raw_code, scale_word, arrange  from GGUF blocks to the packed tile
//   values(codes, pair)       the two numbers of a pair, before scales, in float32, exact
// a row-scaled type (kRowScaled) also:
//   raw_exponent(block)       a biased float32 exponent, at least that of the block's largest magnitude
// a quantized type also:
//   kScaleK, kHasMin          columns of one scale (16 or 32), whether a minimum is added
//   Scales, load_scales       what a lane needs of the scales of a packed tile
//   scales(s, block, scale[j][r], min[j][r])
//                             of 32-column block `block` of the k tile; j: half of the block (only 0 where kScaleK is
//                             32), r: row g + 8r
//   f16_pair                  the unscaled pair, packed fp16, exact
//   half_scales(s, block, scale[j][r], min[j][r])
//                             as `scales`, each rounded to fp16 and in both halves of a register, times kWeightUnit's
//                             inverse; of a row-scaled type half_scales(s, block, inverse[r], scale[j][r]), over the
//                             row scale, times what f16_pair is too small by
#pragma once

#include <type_traits>

#include "dense.cuh"
#include "mxfp4.cuh"
#include "q2_k.cuh"
#include "q3_k.cuh"
#include "q4_0.cuh"
#include "q4_k.cuh"
#include "q5_0.cuh"
#include "q6_k.cuh"
#include "q8_0.cuh"

// X(Type, name in kernel names) for every type: each header lists its own.
#define FOR_EACH_TYPE(X) \
    DENSE_TYPES(X)       \
    Q4_0_TYPES(X)        \
    Q5_0_TYPES(X)        \
    Q8_0_TYPES(X)        \
    Q2_K_TYPES(X)        \
    Q3_K_TYPES(X)        \
    Q4_K_TYPES(X)        \
    Q6_K_TYPES(X)        \
    MXFP4_TYPES(X)

template <class Q>
constexpr bool kDense = std::is_same_v<Q, F32> || std::is_same_v<Q, F16> || std::is_same_v<Q, BF16>;

// Types whose weights may lie outside the range of fp16. After a matrix's packed tiles comes one float32 per row (of
// whole row tiles), a power of two: products are made of fp16(w / row scale) and the sum is scaled back.
template <class Q>
constexpr bool kRowScaled = std::is_same_v<Q, F32> || std::is_same_v<Q, BF16> || std::is_same_v<Q, MXFP4>;

// What an fp16 weight that comes of `half_scales` is a multiple of: the powers of two in raise_f16x2.
template <class Q>
constexpr float kWeightUnit = Q::kTileK == 256 ? 0.0625f : 1.0f;

// Exponent of the row scale from the largest biased float32 exponent in the row: the scaled row's largest magnitude is
// in [2^13, 2^14), 2^27 above the smallest normal fp16.
HOST_DEVICE uint32_t row_scale_bits(int max_exponent) {
    const int e = max_exponent - 13;
    return static_cast<uint32_t>(e < 1 ? 1 : e) << 23;
}
// Bits of 1 / scale for a power of two.
HOST_DEVICE uint32_t inverse_bits(uint32_t scale_bits) { return (254u << 23) - scale_bits; }

#ifdef __CUDACC__

// The two weights of a lane's `pair` of sub-tile `sub`, bit for bit what the format defines: scale * code, then + min,
// each rounded to float32 by itself (never contracted).
template <class Q, class C>
DEVICE void exact_weights(float& low, float& high, const C& codes, const uint8_t* packed_tile, int sub, int pair,
                          int lane) {
    Q::values(codes, pair, low, high);
    if constexpr (!kDense<Q>) {
        float scale[2][2], min[2][2];
        Q::scales(Q::load_scales(packed_tile, lane), 2 * sub + (pair >> 3), scale, min);
        const int j = Q::kScaleK == 16 ? (pair >> 2) & 1 : 0;
        low = __fmul_rn(scale[j][pair & 1], low), high = __fmul_rn(scale[j][pair & 1], high);
        if constexpr (Q::kHasMin) low = __fadd_rn(low, min[j][pair & 1]), high = __fadd_rn(high, min[j][pair & 1]);
    }
}

#endif
