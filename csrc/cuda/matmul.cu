// Prefill: out[r, o] (+)= sum_k x[r, k] W[o, k] (+ bias[o]) for any number of rows r, quantized W, float32 results.
//
// matmul_<type>(MatmulParams): blocks of 128 outputs x 64 rows, each warp 32 x 64; matmul_<type>_small: 64 x 64, each
// warp 32 x 32. 128 threads, grid (blocks along n_out, blocks along the rows). The loop over K is
// common/prefill_tile.cuh; the numbers are those of all products (common/mma_tile.cuh), so a row has the same bits as
// in the decode kernels.
//
// Bytes: weights ceil(rows / 64) times, x ceil(n_out / 128) times, mostly from L2.
#include "common/prefill_tile.cuh"
#include "params/matmul_params.h"

// Rows of x that follow one another: row i * kRowStep from `from` on.
template <int kRowStep>
struct AdjacentRows {
    const MatmulParams& p;
    const uint8_t* from;

    const uint8_t* first;

    DEVICE_MEMBER const uint8_t* at(int i) const { return from + i * kRowStep * p.x_bytes; }
    DEVICE_MEMBER void advance() { from += 2 * kSubK; }
    DEVICE_MEMBER const uint8_t* row(int r) const { return first + static_cast<int64_t>(r) * p.x_bytes; }
};

template <class Q, int kWarpsM, int kWarpsN, int kTiles>
DEVICE void matmul(const MatmulParams& p) {
    using S = MatmulShape<Q, kWarpsM, kWarpsN, kTiles>;
    extern __shared__ __align__(128) uint8_t smem[];
    const int row0 = blockIdx.y * S::kRows;
    const PrefillTile<Q, S> block(p.n_out, p.n_k_tiles, blockIdx.x);

    pdl_launch_dependents();
    pdl_wait();

    // x has rows for whole blocks of 64.
    const int x_row = threadIdx.x / 8, x_chunk = threadIdx.x % 8;
    const uint8_t* const first = p.x + static_cast<int64_t>(row0) * p.x_bytes;
    const AdjacentRows<S::kRowStep> x{p, first + static_cast<int64_t>(x_row) * p.x_bytes + x_chunk * 16, first};
    float sum[2][kTiles][4] = {};
    block.multiply(sum, p.w, p.k, x, smem);

    float bias[2][2], unit[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int o = block.output(i, r);
            bias[i][r] = p.bias != nullptr && o < p.n_out ? p.bias[o] : 0.0f;
            unit[i][r] = o < p.n_out ? weight_unit<Q>(p.w, block.n_row_tiles * block.row_tile_bytes, o) : 0.0f;
        }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = row0 + block.row(tile, c);
            if (row >= p.n_rows) continue;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int o = block.output(i, r);
                    if (o >= p.n_out) continue;
                    const float v = __fmaf_rn(sum[i][tile][2 * r + c], unit[i][r], bias[i][r]);
                    float* to = p.out + row * p.out_stride + o;
                    *to = p.add ? __fadd_rn(*to, v) : v;
                }
        }
}

#define DEFINE(Type, name)                                                                                       \
    extern "C" __global__ void __launch_bounds__(128, 2) matmul_##name(const __grid_constant__ MatmulParams p) { \
        matmul<Type, 4, 1, 8>(p);                                                                                \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 3)                                                         \
        matmul_##name##_small(const __grid_constant__ MatmulParams p) {                                          \
        matmul<Type, 2, 2, 4>(p);                                                                                \
    }
FOR_EACH_TYPE(DEFINE)
