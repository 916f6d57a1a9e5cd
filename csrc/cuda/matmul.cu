// Prefill: out[r, o] (+)= sum_k x[r, k] W[o, k] (+ bias[o]) for any number of rows r, quantized W, float32 results.
//
// matmul_<type>(MatmulParams): blocks of 128 outputs x 64 rows, each warp 32 x 64; matmul_<type>_small: 64 x 64, each
// warp 32 x 32. 128 threads, grid (blocks along n_out, blocks along the rows). The loop over K is
// common/prefill_tile.cuh: an output is one chain of tensor core products over ascending K, so both variants and any
// number of rows give a row the same bits.
//
// Numbers: weights rounded to fp16 once, after scaling in float32 where the scale is no fp16 number; x in fp16 times a
// power of two per row (convert_f16); float32 accumulators. Types whose weights may leave the range of fp16 carry a
// power of two per output (quant/types.cuh, kRowScaled).
//
// Bytes: weights ceil(rows / 64) times, x ceil(n_out / 128) times, mostly from L2.
#include "common/prefill_tile.cuh"
#include "params/matmul_params.h"

// Rows of x that follow one another: row i * kRowStep from `from` on.
template <int kRowStep>
struct AdjacentRows {
    const MatmulParams& p;
    const uint8_t* from;

    DEVICE_MEMBER const uint8_t* at(int i) const { return from + i * kRowStep * p.x_bytes; }
    DEVICE_MEMBER void advance() { from += 2 * kSubK; }
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
    const AdjacentRows<S::kRowStep> x{p, p.x + static_cast<int64_t>(row0 + x_row) * p.x_bytes + x_chunk * 16};
    float acc[2][kTiles][4] = {}, inverse[2][2];
    block.multiply(acc, inverse, p.w, x, smem);

    float bias[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int o = block.output(i, r);
            bias[i][r] = p.bias != nullptr && o < p.n_out ? p.bias[o] : 0.0f;
        }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = row0 + block.row(tile, c);
            if (row >= p.n_rows) continue;
            const float x_scale = p.x_scale[row];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int o = block.output(i, r);
                    if (o >= p.n_out) continue;
                    const float row_scale = __uint_as_float(inverse_bits(__float_as_uint(inverse[i][r])));
                    const float v = acc[i][tile][2 * r + c] * x_scale * row_scale + bias[i][r];
                    float* to = p.out + row * p.out_stride + o;
                    *to = p.add ? *to + v : v;
                }
        }
}

#define DEFINE(Type, name)                                                                                       \
    extern "C" __global__ void __launch_bounds__(128, 3) matmul_##name(const __grid_constant__ MatmulParams p) { \
        matmul<Type, 4, 1, 8>(p);                                                                                \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 4)                                                         \
        matmul_##name##_small(const __grid_constant__ MatmulParams p) {                                          \
        matmul<Type, 2, 2, 4>(p);                                                                                \
    }
FOR_EACH_TYPE(DEFINE)
