// The arithmetic of packed tiles on the tensor cores: what a warp does with weights and activations that it can read.
//
//   add_quantized, add_dense   decode (matvec.cu, experts_decode.cu): sums over x for one or more row tiles
//   f16_fragments              prefill (prefill_tile.cuh): weights as fp16 A fragments
//
// Weights lie in the layout of quant/layout.cuh, activations in that of activations.cuh. `lane` is 4g + t.
#pragma once

#include "quant/types.cuh"

// Where a lane finds its activations in rows written by split_item: B fragments of row 8 * tile + g, sums of rows
// 8 * tile + 2t and the next. Tiles from n_tiles on have no rows.
template <int kTiles>
struct SplitRows {
    const uint8_t* rows;
    uint32_t fragments[kTiles];  // bytes from `rows` on
    uint32_t sums[kTiles][2];
    int n_tiles;

    DEVICE_MEMBER bool exists(int tile) const { return tile == 0 || tile < n_tiles; }
    DEVICE_MEMBER uint4 high(int tile, int block) const { return at(tile, block * 128); }
    DEVICE_MEMBER uint4 low(int tile, int block) const { return at(tile, block * 128 + 64); }
    DEVICE_MEMBER float2 block_sums(int tile, int column, int block) const {
        return *reinterpret_cast<const float2*>(rows + (sums[tile][column] + block * 8));
    }

    DEVICE_MEMBER uint4 at(int tile, int offset) const {
        return *reinterpret_cast<const uint4*>(rows + (fragments[tile] + offset));
    }
};

// Weights that one bf16 number cannot hold: they become two, high and low.
template <class Q>
constexpr bool kTwoTerms = std::is_same_v<Q, F32> || std::is_same_v<Q, F16>;

// A lane's float32 sums by row tile and by tile of 8 rows of x, in the order of mma_bf16.
template <int kRowTiles, int kTiles>
using Sums = float[kRowTiles][kTiles][4];

// One 64-column sub-tile of a quantized type: block by block an exact product of codes, then its scales. `packed_tiles`
// is an array with the address of each row tile's packed tile or, for one row tile, the address itself (an array of one
// costs the compiler registers). `x_block0` is the k tile's first 32-column block of x. X is SplitRows or a type with
// the same members.
template <class Q, int kTiles, int kRowTiles, class W, class X>
DEVICE void add_quantized(Sums<kRowTiles, kTiles>& acc, W packed_tiles, int sub, int x_block0, const X& x, int lane) {
    constexpr int kParts = Q::kScaleK == 16 ? 2 : 1, kLoadTiles = kTiles == 8 ? 2 : 4;
    Codes<Q::kLowBits, Q::kHighBits> codes[kRowTiles];
    typename Q::Scales scales[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
        const uint8_t* packed_tile;
        if constexpr (std::is_same_v<W, const uint8_t*>)
            packed_tile = packed_tiles;
        else
            packed_tile = packed_tiles[i];
        codes[i] = load_codes<Q>(packed_tile, sub, lane);
        scales[i] = Q::load_scales(packed_tile, lane);
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        keep_loads_here();  // of both blocks and of all tiles they would be too many
        uint32_t a[kRowTiles][8];
        float scale[kRowTiles][2][2], min[kRowTiles][2][2];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            Q::scales(scales[i], 2 * sub + b, scale[i], min[i]);
#pragma unroll
            for (int pair = 0; pair < 8; ++pair) a[i][pair] = Q::bf16_pair(codes[i], 8 * b + pair);
        }
        const int x_block = x_block0 + 2 * sub + b;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            if (!x.exists(tile)) break;
            if (kTiles >= 4 && tile % kLoadTiles == 0) keep_loads_here();
            const uint4 high = x.high(tile, x_block), low = x.low(tile, x_block);
            float2 sums[2];
            if constexpr (Q::kHasMin) {
                sums[0] = x.block_sums(tile, 0, x_block), sums[1] = x.block_sums(tile, 1, x_block);
            }
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                float d[kParts][4] = {};
                mma_bf16(d[0], a[i], low.x, low.y);
                mma_bf16(d[kParts - 1], a[i] + 4, low.z, low.w);
                mma_bf16(d[0], a[i], high.x, high.y);
                mma_bf16(d[kParts - 1], a[i] + 4, high.z, high.w);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float& sum = acc[i][tile][c];
#pragma unroll
                    for (int j = 0; j < kParts; ++j) {
                        sum = fmaf(scale[i][j][c >> 1], d[j][c], sum);
                        if constexpr (Q::kHasMin) {
                            const float2 s = sums[c & 1];
                            const float x_sum = kParts == 2 ? (j ? s.y : s.x) : s.x + s.y;
                            sum = fmaf(min[i][j][c >> 1], x_sum, sum);
                        }
                    }
                }
            }
        }
    }
}

// A fragments of 32-column block b of an unquantized type; F32 and F16 as two bf16 terms of the weight.
template <class Q>
DEVICE void dense_fragments(uint32_t (&high)[8], uint32_t (&low)[8], const Codes<Q::kLowBits, 0>& codes, int b) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
        if constexpr (kTwoTerms<Q>) {
            float v[2];
            Q::values(codes, 8 * b + pair, v[0], v[1]);
            high[pair] = pack_bf16(v[0], v[1]);
            low[pair] = pack_bf16(v[0] - bf16_low(high[pair]), v[1] - bf16_high(high[pair]));
        } else {
            high[pair] = codes.low[8 * b + pair];
        }
    }
}

// The products of such fragments with 32-column block x_block of x.
template <class Q, int kTiles, int kRowTiles, class X>
DEVICE void add_dense(Sums<kRowTiles, kTiles>& acc, const uint32_t (&high)[kRowTiles][8],
                      const uint32_t (&low)[kRowTiles][8], int x_block, const X& x) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        if (!x.exists(tile)) break;
        const uint4 x_high = x.high(tile, x_block), x_low = x.low(tile, x_block);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            float (&d)[4] = acc[i][tile];
            if constexpr (kTwoTerms<Q>) {
                mma_bf16(d, low[i], x_high.x, x_high.y);
                mma_bf16(d, low[i] + 4, x_high.z, x_high.w);
            }
            mma_bf16(d, high[i], x_low.x, x_low.y);
            mma_bf16(d, high[i] + 4, x_low.z, x_low.w);
            mma_bf16(d, high[i], x_high.x, x_high.y);
            mma_bf16(d, high[i] + 4, x_high.z, x_high.w);
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
