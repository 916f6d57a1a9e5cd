// What the kernels of 1 to 8 decode rows share (decode.cu, experts_few.cu): the sizes of a variant, and the weights of
// a unit, which is what one slot of a warp's ring holds.
#pragma once

#include "common/mma_tile.cuh"
#include "params/matmul_params.h"

// Columns of a unit: of short codes a whole chunk of 256, about as many bytes as 128 columns of others have.
template <class Q>
constexpr int unit_columns(int blocks) {
    if (kDense<Q> || Q::kTileK == 256) return Q::kTileK;
    return blocks == 8 && Q::kLowBits + Q::kHighBits <= 5 ? 256 : 128;
}

// kBlocks: 32-column blocks of a chunk, 0 for `long`. kEarlyTiles: row tiles of a warp that are decoded early. kOneRow:
// the launch is of one row that it converts.
template <class Q, int kBlocks_, int kEarlyTiles_, bool kOneRow_ = false>
struct DecodeShape {
    static constexpr int kBlocks = kBlocks_;
    static constexpr int kEarlyTiles = kEarlyTiles_;
    static constexpr bool kEarly = kEarlyTiles > 0;
    static constexpr bool kOneRow = kOneRow_;
    // A warp has no row tiles beside those decoded early.
    static constexpr bool kEarlyOnly = kEarly && (kBlocks == 8 || kOneRow);
    static constexpr int kMostStaged = kBlocks == 8 ? 1 : 3;  // row tiles of a warp that are decoded into shared memory
    static constexpr bool kKeepX = kBlocks > 0 && !kEarlyOnly;  // x is in registers
    static constexpr int kUnitTiles = unit_columns<Q>(kBlocks) / Q::kTileK;
    static constexpr int kTileBlocks = Q::kTileK / 32;
    static constexpr int kUnitBlocks = kUnitTiles * kTileBlocks;
    static constexpr int kUnitBytes = kUnitTiles * Q::kPackedTileBytes;
    static constexpr int kChunkUnits = kBlocks ? kBlocks / kUnitBlocks : 1;  // of a chunk in registers
    // Shared memory of a warp's converted chunk and, but for kOneRow, its norm weights.
    static constexpr int kWarpX = 512 + (kOneRow ? 0 : 1024);
    static constexpr int kPartialRow = 20;  // floats from a row's sums to the next: no bank conflicts
};

// Calls f(32-column block of the unit, A fragments) for the blocks of a unit in shared memory, of which n packed tiles
// exist.
template <class Q, class S, class F>
DEVICE void unit_fragments(const uint8_t* unit, int n, const float (&inverse)[2], int lane, F f) {
#pragma unroll
    for (int i = 0; i < S::kUnitTiles; ++i) {
        if (S::kUnitTiles > 1 && i >= n) break;
        const uint8_t* const packed_tile = unit + i * Q::kPackedTileBytes;
        const auto scales = tile_scales<Q>(packed_tile, lane);
#pragma unroll
        for (int sub = 0; sub < Q::kSubs; ++sub) {
            if (sub > 0) keep_loads_here();  // codes of all sub-tiles would take too many registers
            const auto codes = load_codes<Q>(packed_tile, sub, lane);
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                uint32_t a[8];
                f16_fragments<Q>(a, codes, scales, 2 * sub + b, inverse);
                f(i * S::kTileBlocks + 2 * sub + b, a);
            }
        }
    }
}

// A result from the sums of its n chunks, kPart floats apart, and their factors, kFactor apart, each times `root`; of
// kMost chunks the loads are under way at once. Both lie in shared memory, the factors of one row 16-byte aligned.
template <int kMost, int kPart, int kFactor>
DEVICE float sum_of_chunks(uint32_t parts, uint32_t factors, float root, int n) {
    float sum = 0.0f;
#pragma unroll 1
    for (int c0 = 0; c0 < n; c0 += kMost, parts += 4 * kMost * kPart, factors += 4 * kMost * kFactor) {
        float part[kMost], factor[kMost];
#pragma unroll
        for (int c = 0; c < kMost; ++c) {
            if (c0 + c < n) part[c] = load_shared(parts + 4 * c * kPart);
            if (kFactor > 1 && c0 + c < n) factor[c] = load_shared(factors + 4 * c * kFactor);
            if (kFactor == 1 && c % 4 == 0 && c0 + c < n) {
                const float4 four = load_shared_float4(factors + 4 * c);
                factor[c] = four.x, factor[c + 1] = four.y, factor[c + 2] = four.z, factor[c + 3] = four.w;
            }
        }
#pragma unroll
        for (int c = 0; c < kMost; ++c)
            if (c0 + c < n) sum = __fmaf_rn(part[c], __fmul_rn(factor[c], root), sum);
    }
    return sum;
}

// Most threads of a variant: by the registers that it takes.
constexpr int most_threads(int blocks, int early, bool = false) {
    return blocks == 0 || (blocks == 4 && early) ? PRODUCT_FEW_THREADS : PRODUCT_THREADS;
}
