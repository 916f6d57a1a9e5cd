// Prefill: out[r, s, o] = sum_k x[r(, s), k] W[e, o, k] (+ bias[e, o]) for every slot s of any number of rows.
//
// expert_matmul_<type>_<rows>(ExpertMatmulParams), rows 64 or 16: a block has 128 outputs x an item, which is up to
// `rows` pairs of one expert, and gathers their rows of x. 128 threads, grid (matrices * blocks along n_out, most items
// that there can be): how many items there are is known on the device only, the blocks of the others end at once.
//
// The loop over K is common/prefill_tile.cuh; the numbers are those of all products (common/mma_tile.cuh): any company
// gives a pair the same bits, in a decode step too.
//
// Bytes: an expert's weights once per item, x n_out / 128 times, mostly from L2.
#include "common/prefill_tile.cuh"
#include "params/experts_params.h"

// Rows of x from anywhere, as bytes from `x` on.
template <int kCopies>
struct GatheredRows {
    const uint8_t* x;
    const int* index;  // of the block's rows
    uint32_t x_bytes;
    uint32_t from[kCopies];

    DEVICE_MEMBER const uint8_t* at(int i) const { return x + from[i]; }
    DEVICE_MEMBER void advance() {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) from[i] += 2 * kSubK;
    }
    DEVICE_MEMBER const uint8_t* row(int r) const { return x + static_cast<int64_t>(index[r]) * x_bytes; }
};

template <class Q, int kTiles>
DEVICE void expert_matmul(const ExpertMatmulParams& p) {
    using S = MatmulShape<Q, 4, 1, kTiles>;
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ int pairs[S::kRows], index[S::kRows];
    const int n_row_tiles = (p.n_out + kTileRows - 1) / kTileRows;
    const int n_tiles = (n_row_tiles + S::kRowTiles - 1) / S::kRowTiles;
    const PrefillTile<Q, S> block(p.n_out, p.n_k_tiles, static_cast<int>(blockIdx.x) % n_tiles);
    const ExpertMatrix& m = p.m[static_cast<int>(blockIdx.x) / n_tiles];

    pdl_launch_dependents();
    pdl_wait();
    if (static_cast<int>(blockIdx.y) >= *p.list.n_items) return;
    const ExpertItem item = p.list.items[blockIdx.y];
    const uint8_t* const weights = m.w + item.expert * p.matrix_bytes;
    // Rows past the item's end are its last one again, computed and dropped.
    if (threadIdx.x < S::kRows) {
        const int pair = p.list.pairs[item.first + min(static_cast<int>(threadIdx.x), item.n - 1)];
        pairs[threadIdx.x] = pair, index[threadIdx.x] = pair / p.n_used + pair % p.n_used * p.x_slot_rows;
    }
    __syncthreads();

    GatheredRows<S::kCopies> x{p.x, index, static_cast<uint32_t>(p.x_bytes)};
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
        const int row = threadIdx.x / 8 + i * S::kRowStep;
        x.from[i] = static_cast<uint32_t>(index[row]) * p.x_bytes + threadIdx.x % 8 * 16;
    }
    float sum[2][kTiles][4] = {};
    block.multiply(sum, weights, p.k, x, smem);

    float bias[2][2], unit[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int o = block.output(i, r);
            const bool has = m.bias != nullptr && o < p.n_out;
            unit[i][r] = o < p.n_out ? weight_unit<Q>(weights, block.n_row_tiles * block.row_tile_bytes, o) : 0.0f;
            bias[i][r] = has ? m.bias[static_cast<int64_t>(item.expert) * p.n_out + o] : 0.0f;
        }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = block.row(tile, c);
            if (row >= item.n) continue;
            float* out =
                m.out + pairs[row] / p.n_used * m.out_stride + static_cast<int64_t>(pairs[row] % p.n_used) * p.n_out;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int o = block.output(i, r);
                    if (o >= p.n_out) continue;
                    out[o] = __fmaf_rn(sum[i][tile][2 * r + c], unit[i][r], bias[i][r]);
                }
        }
}

#define DEFINE_ROWS(Type, name, rows, blocks)                                         \
    extern "C" __global__ void __launch_bounds__(128, blocks)                         \
        expert_matmul_##name##_##rows(const __grid_constant__ ExpertMatmulParams p) { \
        expert_matmul<Type, rows / 8>(p);                                             \
    }
#define DEFINE(Type, name)         \
    DEFINE_ROWS(Type, name, 64, 2) \
    DEFINE_ROWS(Type, name, 16, 4)
FOR_EACH_TYPE(DEFINE)
