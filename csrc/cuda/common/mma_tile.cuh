// Packed tiles as fp16 A fragments of the tensor cores: the weights of every product, whichever kernel it is in.
//
// The numbers of all products:
// out = (sum over chunks c, in order: factor[c] * sum_k in c fp16(w[k]) x16[k]) * unit + bias
//   weights   fp16(scale * code (+ min)), with scale (and min) rounded to fp16 first; types of wide range divided by a
//             power of two of their row first, `unit` undoes it
//   x16       the row of x (times the weight of a norm) over a power of two of its own in each chunk, in fp16
//             (activations.cuh); factor[c] is that power of two times the norm's 1 / root
//   chunks    of chunk_columns(K) columns; within one the tensor cores add products of ascending groups of 16 columns
//             to float32 sums that start at zero
// So the bits of a row's outputs depend on the row, K and the type alone: not on the kernel, the launch or the other
// rows.
#pragma once

#include "quant/types.cuh"

// What a lane needs of the scales of a packed tile.
struct NoScales {};
template <class Q>
DEVICE auto tile_scales(const uint8_t* packed_tile, int lane) {
    if constexpr (kDense<Q>)
        return NoScales();
    else
        return Q::load_scales(packed_tile, lane);
}

// 1 / row scale of rows g and g + 8, as it is kept for many fragments.
template <class Q>
DEVICE auto kept_inverse(const float (&inverse)[2]) {
    if constexpr (std::is_same_v<Q, MXFP4>)
        return Q::row_exponents(inverse);
    else
        return make_float2(inverse[0], inverse[1]);
}
DEVICE float inverse_of(const float (&inverse)[2], int r) { return inverse[r]; }
DEVICE float inverse_of(float2 inverse, int r) { return r ? inverse.y : inverse.x; }

// A fragments of 32-column block `block` of a k tile from the codes of its sub-tile and the tile's scales; inverse[r]
// is 1 / row scale of row g + 8r, used by row-scaled types, or what `kept_inverse` makes of it.
template <class Q, class C, class S, class I>
DEVICE void f16_fragments(uint32_t (&a)[8], const C& codes, const S& scales, int block, const I& inverse) {
    const int b = block & 1;
    if constexpr (std::is_same_v<Q, F16>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = codes.low[8 * b + i];
    } else if constexpr (kDense<Q>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float low, high;
            Q::values(codes, 8 * b + i, low, high);
            a[i] = pack_f16(low * inverse_of(inverse, i & 1), high * inverse_of(inverse, i & 1));
        }
    } else {
        uint32_t scale[2][2], min[2][2];
        if constexpr (kRowScaled<Q>) {
            Q::half_scales(scales, block, inverse, scale);
        } else {
            Q::half_scales(scales, block, scale, min);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int j = Q::kScaleK == 16 ? i >> 2 : 0, r = i & 1;
            const uint32_t q = Q::f16_pair(codes, 8 * b + i);
            a[i] = Q::kHasMin ? fma_f16x2(q, scale[j][r], min[j][r]) : mul_f16x2(q, scale[j][r]);
        }
    }
}

// The same of block b (0, 1) of sub-tile `sub` of a packed tile in memory; `lane` is 4g + t.
template <class Q, class I>
DEVICE void f16_fragments(uint32_t (&a)[8], const uint8_t* packed_tile, int sub, int b, int lane, const I& inverse) {
    f16_fragments<Q>(a, load_codes<Q>(packed_tile, sub, lane), tile_scales<Q>(packed_tile, lane), 2 * sub + b, inverse);
}

// 1 / row scale of rows g and g + 8 of a row tile; 1 for types without. `w` is the matrix [n_row_tiles][n_k_tiles].
template <class Q>
DEVICE void row_inverse(float (&inverse)[2], const uint8_t* w, int64_t matrix_tiles_bytes, int row_tile, int g) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        inverse[r] = 1.0f;
        if constexpr (kRowScaled<Q>)
            inverse[r] = __uint_as_float(inverse_bits(
                reinterpret_cast<const uint32_t*>(w + matrix_tiles_bytes)[row_tile * kTileRows + g + 8 * r]));
    }
}

// What a sum over fp16 weights of output `o` is multiplied by.
template <class Q>
DEVICE float weight_unit(const uint8_t* w, int64_t matrix_tiles_bytes, int o) {
    if constexpr (kRowScaled<Q>) return reinterpret_cast<const float*>(w + matrix_tiles_bytes)[o];
    return kWeightUnit<Q>;
}
