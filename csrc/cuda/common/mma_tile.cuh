// One row tile (16 rows) of weights, as a warp multiplies it: A fragments from codes, and sums over a few rows of x.
//
// The sums are for kernels that take one row tile at a time (matvec.cu takes several). Packed tiles and converted x are
// in fragment order (quant/layout.cuh, activations.cuh). Knows no kernel and no way of loading.
#pragma once

#include "quant/types.cuh"

// Where a lane finds its activations in rows by split_item: B fragments of row 8 * tile + g, sums of rows 8 * tile + 2t
// and the next. Tiles from n_tiles on have no rows.
template <int kTiles>
struct SplitRows {
    const uint8_t* rows;
    uint32_t fragments[kTiles];  // bytes from `rows` on
    uint32_t sums[kTiles][2];
    int n_tiles;

    DEVICE_MEMBER uint4 high(int tile, int block) const { return at(tile, block * 128); }
    DEVICE_MEMBER uint4 low(int tile, int block) const { return at(tile, block * 128 + 64); }
    DEVICE_MEMBER float2 block_sums(int tile, int column, int block) const {
        return *reinterpret_cast<const float2*>(rows + (sums[tile][column] + block * 8));
    }

    DEVICE_MEMBER uint4 at(int tile, int offset) const {
        return *reinterpret_cast<const uint4*>(rows + (fragments[tile] + offset));
    }
};

// One 64-column sub-tile of a quantized type: block by block an exact product of codes, then its scales.
template <class Q, int kTiles>
DEVICE void add_quantized(float (&acc)[kTiles][4], const uint8_t* packed_tile, int sub, int x_block0,
                          const SplitRows<kTiles>& x, int lane) {
    constexpr int kParts = Q::kScaleK == 16 ? 2 : 1;
    const auto codes = load_codes<Q>(packed_tile, sub, lane);
    const auto scales = Q::load_scales(packed_tile, lane);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        asm volatile("" ::: "memory");  // or the loads of both blocks come first, and registers run out
        uint32_t a[8];
        float scale[2][2], min[2][2];
        Q::scales(scales, 2 * sub + b, scale, min);
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) a[pair] = Q::bf16_pair(codes, 8 * b + pair);
        const int x_block = x_block0 + 2 * sub + b;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (tile > 0 && tile >= x.n_tiles) break;
            const uint4 high = x.high(tile, x_block), low = x.low(tile, x_block);
            float d[kParts][4] = {};
            mma_bf16(d[0], a, low.x, low.y);
            mma_bf16(d[kParts - 1], a + 4, low.z, low.w);
            mma_bf16(d[0], a, high.x, high.y);
            mma_bf16(d[kParts - 1], a + 4, high.z, high.w);
            float2 sums[2];
            if constexpr (Q::kHasMin)
                sums[0] = x.block_sums(tile, 0, x_block), sums[1] = x.block_sums(tile, 1, x_block);
#pragma unroll
            for (int c = 0; c < 4; ++c)
#pragma unroll
                for (int j = 0; j < kParts; ++j) {
                    float& sum = acc[tile][c];
                    sum = fmaf(scale[j][c >> 1], d[j][c], sum);
                    if constexpr (Q::kHasMin) {
                        const float2 s = sums[c & 1];
                        sum = fmaf(min[j][c >> 1], kParts == 2 ? (j ? s.y : s.x) : s.x + s.y, sum);
                    }
                }
        }
    }
}

// One 64-column k tile of an unquantized type; F32 and F16 as two bf16 terms of the weight.
template <class Q, int kTiles>
DEVICE void add_dense(float (&acc)[kTiles][4], const uint8_t* packed_tile, int x_block0, const SplitRows<kTiles>& x,
                      int lane) {
    constexpr bool kTwoTerms = !std::is_same_v<Q, BF16>;
    const auto codes = load_codes<Q>(packed_tile, 0, lane);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        uint32_t high[8], low[8];
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            if constexpr (kTwoTerms) {
                float v[2];
                Q::values(codes, 8 * b + pair, v[0], v[1]);
                high[pair] = pack_bf16(v[0], v[1]);
                low[pair] = pack_bf16(v[0] - bf16_low(high[pair]), v[1] - bf16_high(high[pair]));
            } else {
                high[pair] = codes.low[8 * b + pair];
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (tile > 0 && tile >= x.n_tiles) break;
            const uint4 x_high = x.high(tile, x_block0 + b), x_low = x.low(tile, x_block0 + b);
            float (&d)[4] = acc[tile];
            if constexpr (kTwoTerms) {
                mma_bf16(d, low, x_high.x, x_high.y);
                mma_bf16(d, low + 4, x_high.z, x_high.w);
            }
            mma_bf16(d, high, x_low.x, x_low.y);
            mma_bf16(d, high + 4, x_low.z, x_low.w);
            mma_bf16(d, high, x_high.x, x_high.y);
            mma_bf16(d, high + 4, x_high.z, x_high.w);
        }
    }
}

// fp16 A fragments of 32-column block b of a sub-tile, scales included; inverse[r] undoes the row scale.
template <class Q>
DEVICE void f16_fragments(uint32_t (&a)[8], const uint8_t* packed_tile, int sub, int b, int lane,
                          const float (&inverse)[2]) {
    const auto codes = load_codes<Q>(packed_tile, sub, lane);
    if constexpr (std::is_same_v<Q, F16>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = codes.low[8 * b + i];
    } else if constexpr (kDense<Q>) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float low, high;
            Q::values(codes, 8 * b + i, low, high);
            a[i] = pack_f16(low * inverse[i & 1], high * inverse[i & 1]);
        }
    } else if constexpr (Q::kHalfScale) {
        const auto s = Q::load_scales(packed_tile, lane);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t q = Q::f16_pair(codes, 8 * b + i), d = Q::half_scale(s, b, i & 1);
            if constexpr (Q::kHasMin)
                a[i] = fma_f16x2(q, d, Q::half_min(s, b, i & 1));
            else
                a[i] = mul_f16x2(q, d);
        }
    } else {
        float scale[2][2], min[2][2];
        Q::scales(Q::load_scales(packed_tile, lane), 2 * sub + b, scale, min);
        if constexpr (kRowScaled<Q>) {
            uint32_t d[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) d[r] = pack_f16(scale[0][r] * inverse[r], scale[0][r] * inverse[r]);
#pragma unroll
            for (int i = 0; i < 8; ++i) a[i] = mul_f16x2(Q::f16_pair(codes, 8 * b + i), d[i & 1]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint32_t q = Q::f16_pair(codes, 8 * b + i);
                const int j = Q::kScaleK == 16 ? i >> 2 : 0, r = i & 1;
                const float m = Q::kHasMin ? min[j][r] : 0.0f;
                a[i] = pack_f16(fmaf(f16_low(q), scale[j][r], m), fmaf(f16_high(q), scale[j][r], m));
            }
        }
    }
}
