// Into the layout of quant/layout.cuh and out of it again.
//
// repack_<type>(RepackParams): grid (strips of the piece, any number of blocks a strip), 256 threads. Reads each raw
//   byte through the cache several times and writes every record once; runs at load only.
// rows_<type>(RowsParams): rows of a repacked matrix as float32, exactly (embedding lookup; the weights of one row are
//   spread over the record, so it reads 16 times what it returns, of a matrix of which it reads little). Grid n_rows,
//   128 threads.
#include "params/matmul_params.h"
#include "quant/types.cuh"

template <class Q>
DEVICE void repack(const RepackParams& p) {
    const int strip = p.row0 / kStripRows + blockIdx.x, first = blockIdx.x * kStripRows;
    const int n_rows = min(kStripRows, p.n_rows - first);
    const int n_blocks = p.k / Q::kBlockK, n_units = (p.k + Q::kUnitK - 1) / Q::kUnitK;
    constexpr int kWords = Q::kRecordBytes / 4, kUnitBlocks = Q::kUnitK / Q::kBlockK;
    const uint8_t* rows = p.rows + first * p.row_bytes;
    uint32_t* out = reinterpret_cast<uint32_t*>(p.w + static_cast<int64_t>(strip) * n_units * Q::kRecordBytes);

    pdl_launch_dependents();
    pdl_wait();
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < n_units * kWords; i += gridDim.y * blockDim.x) {
        const int block0 = i / kWords * kUnitBlocks;
        const RawStrip raw{rows + static_cast<int64_t>(block0) * Q::kBlockBytes, p.row_bytes, n_rows, n_blocks - block0,
                           Q::kBlockBytes};
        out[i] = record_word<Q>(raw, i % kWords);
    }

    if constexpr (kRowScaled<Q>) {
        __shared__ int largest[kStripRows];
        if (blockIdx.y != 0) return;
        if (threadIdx.x < kStripRows) largest[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n_rows * n_blocks; i += blockDim.x) {
            const int row = i / n_blocks;
            const uint8_t* block = rows + row * p.row_bytes + static_cast<int64_t>(i % n_blocks) * Q::kBlockBytes;
            atomicMax(&largest[row], Q::raw_exponent(block));
        }
        __syncthreads();
        const int n_strips = (p.n_out + kStripRows - 1) / kStripRows;
        uint32_t* scales =
            reinterpret_cast<uint32_t*>(p.w + static_cast<int64_t>(n_strips) * n_units * Q::kRecordBytes);
        if (threadIdx.x < kStripRows) scales[strip * kStripRows + threadIdx.x] = row_scale_bits(largest[threadIdx.x]);
    }
}

template <class Q>
DEVICE void rows(const RowsParams& p) {
    pdl_launch_dependents();
    pdl_wait();
    const int index = p.index[blockIdx.x], n_units = (p.k + Q::kUnitK - 1) / Q::kUnitK;
    const bool exists = index >= 0 && index < p.n_table;
    const int row = exists ? index : 0, r = row % kStripRows / 8;
    const uint8_t* strip = p.w + static_cast<int64_t>(row / kStripRows) * n_units * Q::kRecordBytes;
    float* out = p.out + blockIdx.x * p.out_stride;

    // A thread takes what lane 4g + t holds of one sub-unit: sixteen elements of rows g and g + 8, of which it needs r.
    for (int i = threadIdx.x; i < n_units * Q::kSubs * 4; i += blockDim.x) {
        const int unit = i / (4 * Q::kSubs), sub = i / 4 % Q::kSubs, lane = 4 * (row % 8) + i % 4;
        const uint8_t* record = strip + static_cast<int64_t>(unit) * Q::kRecordBytes;
        const auto codes = load_codes<Q>(record, sub, lane);
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
            const int k = unit * Q::kUnitK + sub * kSubK + pair_column(lane, pair);
            if ((pair & 1) != r || k >= p.k) continue;
            float low, high;
            Q::values(codes, pair, low, high);
            if constexpr (!kDense<Q>) {
                float scale[2][2], min[2][2];
                Q::scales(Q::load_scales(record, lane), 2 * sub + (pair >> 3), scale, min);
                const int j = Q::kScaleK == 16 ? (pair >> 2) & 1 : 0;
                low = __fmul_rn(scale[j][pair & 1], low), high = __fmul_rn(scale[j][pair & 1], high);
                if constexpr (Q::kHasMin) {
                    low = __fadd_rn(low, min[j][pair & 1]), high = __fadd_rn(high, min[j][pair & 1]);
                }
            }
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
