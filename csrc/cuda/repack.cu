// Into the layout of quant/layout.cuh and out of it again.
//
// repack_<type>(RepackParams): grid (row tiles of the piece, any number of blocks for each), 256 threads. Runs at load.
//   Bytes: every packed tile is written once, every raw byte read several times, from memory once.
// rows_<type>(RowsParams): rows of a repacked matrix as float32, exactly (embedding lookup). Grid n_rows, 128 threads.
//   Bytes: a row's weights are spread over its packed tiles, so it reads up to 16 times what the row has.
#include "params/repack_params.h"
#include "quant/types.cuh"

template <class Q>
DEVICE void repack(const RepackParams& p) {
    const int row_tile = p.row0 / kTileRows + blockIdx.x, first = blockIdx.x * kTileRows;
    const int n_rows = min(kTileRows, p.n_rows - first);
    const int n_blocks = p.k / Q::kBlockK, n_k_tiles = (p.k + Q::kTileK - 1) / Q::kTileK;
    constexpr int kWords = Q::kPackedTileBytes / 4, kTileBlocks = Q::kTileK / Q::kBlockK;
    const uint8_t* rows = p.rows + first * p.row_bytes;
    uint32_t* out = reinterpret_cast<uint32_t*>(p.w + static_cast<int64_t>(row_tile) * n_k_tiles * Q::kPackedTileBytes);

    pdl_launch_dependents();
    pdl_wait();
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < n_k_tiles * kWords; i += gridDim.y * blockDim.x) {
        const int block0 = i / kWords * kTileBlocks;
        const RawRowTile raw{rows + static_cast<int64_t>(block0) * Q::kBlockBytes, p.row_bytes, n_rows,
                             n_blocks - block0, Q::kBlockBytes};
        out[i] = packed_word<Q>(raw, i % kWords);
    }

    if constexpr (kRowScaled<Q>) {
        __shared__ int largest[kTileRows];
        if (blockIdx.y != 0) return;
        if (threadIdx.x < kTileRows) largest[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n_rows * n_blocks; i += blockDim.x) {
            const int row = i / n_blocks;
            const uint8_t* block = rows + row * p.row_bytes + static_cast<int64_t>(i % n_blocks) * Q::kBlockBytes;
            atomicMax(&largest[row], Q::raw_exponent(block));
        }
        __syncthreads();
        const int n_row_tiles = (p.n_out + kTileRows - 1) / kTileRows;
        uint32_t* scales =
            reinterpret_cast<uint32_t*>(p.w + static_cast<int64_t>(n_row_tiles) * n_k_tiles * Q::kPackedTileBytes);
        if (threadIdx.x < kTileRows) scales[row_tile * kTileRows + threadIdx.x] = row_scale_bits(largest[threadIdx.x]);
    }
}

template <class Q>
DEVICE void rows(const RowsParams& p) {
    // The first launch of a step: what comes after it may rely on the steps before being over.
    pdl_wait();
    pdl_launch_dependents();
    const int index = p.index[blockIdx.x], n_k_tiles = (p.k + Q::kTileK - 1) / Q::kTileK;
    const bool exists = index >= 0 && index < p.n_table;
    const int row = exists ? index : 0, r = row % kTileRows / 8;
    const uint8_t* row_tile = p.w + static_cast<int64_t>(row / kTileRows) * n_k_tiles * Q::kPackedTileBytes;
    float* out = p.out + blockIdx.x * p.out_stride;

    // A thread takes what lane 4g + t holds of one sub-tile: sixteen elements of rows g and g + 8, of which it needs r.
    for (int i = threadIdx.x; i < n_k_tiles * Q::kSubs * 4; i += blockDim.x) {
        const int k_tile = i / (4 * Q::kSubs), sub = i / 4 % Q::kSubs, lane = 4 * (row % 8) + i % 4;
        const uint8_t* packed_tile = row_tile + static_cast<int64_t>(k_tile) * Q::kPackedTileBytes;
        const auto codes = load_codes<Q>(packed_tile, sub, lane);
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
            const int k = k_tile * Q::kTileK + sub * kSubK + pair_column(lane, pair);
            if ((pair & 1) != r || k >= p.k) continue;
            float low, high;
            exact_weights<Q>(low, high, codes, packed_tile, sub, pair, lane);
            low = exists ? __fmul_rn(p.scale, low) : 0.0f, high = exists ? __fmul_rn(p.scale, high) : 0.0f;
            float2* to = reinterpret_cast<float2*>(out + k);
            const float2 old = p.add ? *to : make_float2(-0.0f, -0.0f);  // -0 + v is v, the sign of zero included
            *to = make_float2(__fadd_rn(old.x, low), __fadd_rn(old.y, high));
        }
    }
}

#define DEFINE(Type, name)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) repack_##name(const __grid_constant__ RepackParams p) { \
        repack<Type>(p);                                                                                      \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) rows_##name(const __grid_constant__ RowsParams p) {     \
        rows<Type>(p);                                                                                        \
    }
FOR_EACH_TYPE(DEFINE)
