// Prompts: out[r, o] (+)= sum_k x[r, k] W[o, k] (+ bias[o]) for any number of rows r, quantized W, float32 results.
//
// matmul_<type>(MatmulParams): tiles of 128 outputs x 64 rows; matmul_<type>_small: 64 x 64. 128 threads, grid (tiles
// along n_out, tiles along rows). One output is one chain of tensor core products over ascending K,
// whatever the tile: both variants and any number of rows give a row the same bits.
//
// A warp holds 32 outputs x 64 (32) rows. Records of the weights and 64-column slices of x arrive in shared memory by
// cp.async, several stages ahead; a warp turns the codes of its two row tiles into fp16 A fragments in registers
// (packed tiles are in fragment order) and x is the B operand, one 16-byte shared load for 32 columns (x is in fragment
// order too).
//
// Numbers: weights rounded to fp16 once, after scaling in float32 where the scale is no fp16 number; x in fp16 times a
// power of two per row (convert_f16); float32 accumulators. Types that may leave the range of fp16 carry a power of
// two per output (quant/types.cuh, kRowScaled).
//
// Bytes: weights ceil(rows / 64) times, x ceil(n_out / 128) times, mostly from L2.
#include "common/mma_tile.cuh"
#include "params/matmul_params.h"
#include "matmul_shapes.cuh"

template <class Q, int kWarpsM, int kWarpsN, int kTiles>
DEVICE void matmul(const MatmulParams& p) {
    using S = MatmulShape<Q, kWarpsM, kWarpsN, kTiles>;
    // [kStages][kRows][64 columns] fp16 x, its eight 16-byte chunks in exchanged halves in odd rows (bank conflicts);
    // [kSlots][kRowTiles][kPackedTileBytes] weights
    extern __shared__ __align__(128) uint8_t smem[];
    uint8_t* const w_ring = smem + S::kStages * S::kXBytes;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    const int warp_m = warp % kWarpsM, warp_n = warp / kWarpsM;
    const int n_row_tiles = (p.n_out + kTileRows - 1) / kTileRows, row_tile0 = blockIdx.x * S::kRowTiles;
    const int row0 = blockIdx.y * S::kRows, n_steps = p.n_k_tiles * Q::kSubs;
    const int64_t row_tile_bytes = static_cast<int64_t>(p.n_k_tiles) * Q::kPackedTileBytes;

    pdl_launch_dependents();
    pdl_wait();

    // x has rows for whole tiles; row tiles past the end are read as the last one and dropped. Thread i copies chunk i
    // % 8 of rows i / 8 + a multiple of kRowStep (even: one exchange of halves serves all); warp w row tiles w, w +
    // kWarps,
    // ...
    constexpr int kRowStep = 4 * S::kWarps;
    constexpr int kRowTilesPerWarp = S::kRowTiles / S::kWarps;
    static_assert(S::kRowTiles % S::kWarps == 0 && S::kRows % kRowStep == 0 && kRowStep % 2 == 0);
    const int x_row = threadIdx.x / 8, x_chunk = threadIdx.x % 8;
    const uint8_t* x_from = p.x + static_cast<int64_t>(row0 + x_row) * p.x_bytes + x_chunk * 16;
    const uint8_t* w_from[kRowTilesPerWarp];
#pragma unroll
    for (int i = 0; i < kRowTilesPerWarp; ++i)
        w_from[i] = p.w + min(row_tile0 + warp + i * S::kWarps, n_row_tiles - 1) * row_tile_bytes + lane * 16;
    const uint32_t x_to = smem_address(smem) + x_row * 128 + (x_chunk ^ (x_row & 1) * 4) * 16;
    const uint32_t w_to = smem_address(w_ring) + warp * Q::kPackedTileBytes + lane * 16;
    int issued = 0, x_slot_in = 0, w_slot_in = 0;
    const auto issue = [&] {
        if (issued < n_steps) {
#pragma unroll
            for (int i = 0; i < S::kRows / kRowStep; ++i)
                cp_async_16(x_to + x_slot_in * S::kXBytes + i * kRowStep * 128, x_from + i * kRowStep * p.x_bytes);
            x_from += 2 * kSubK;
            x_slot_in = x_slot_in + 1 == S::kStages ? 0 : x_slot_in + 1;
            if (issued % Q::kSubs == 0) {
#pragma unroll
                for (int i = 0; i < kRowTilesPerWarp; ++i) {
                    const uint32_t to = w_to + w_slot_in * S::kWBytes + i * S::kWarps * Q::kPackedTileBytes;
#pragma unroll
                    for (int at = 0; at < Q::kPackedTileBytes; at += 512)
                        if (at + 512 <= Q::kPackedTileBytes || at + lane * 16 < Q::kPackedTileBytes)
                            cp_async_16(to + at, w_from[i] + at);
                    w_from[i] += Q::kPackedTileBytes;
                }
                w_slot_in = w_slot_in + 1 == S::kSlots ? 0 : w_slot_in + 1;
            }
            ++issued;
        }
        cp_async_commit();
    };
    for (int i = 0; i < S::kStages - 1; ++i) issue();

    float inverse[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            inverse[i][r] = 1.0f;
            if constexpr (kRowScaled<Q>) {
                const int row_tile = min(row_tile0 + 2 * warp_m + i, n_row_tiles - 1);
                const uint32_t* scales = reinterpret_cast<const uint32_t*>(p.w + n_row_tiles * row_tile_bytes);
                inverse[i][r] = __uint_as_float(inverse_bits(scales[row_tile * kTileRows + g + 8 * r]));
            }
        }

    float acc[2][kTiles][4] = {};
    const uint8_t* const x_lane = smem + (warp_n * 8 * kTiles + g) * 128 + (t ^ (g & 1) * 4) * 16;
    const uint8_t* const w_warp = w_ring + 2 * warp_m * Q::kPackedTileBytes;
    const int x_half = (g & 1) ? -64 : 64;  // from the chunk of block 0 to that of block 1
    int x_slot_out = 0, w_slot_out = 0, sub = 0;
#pragma unroll 1
    for (int step = 0; step < n_steps; ++step) {
        cp_async_wait<S::kStages - 2>();
        __syncthreads();
        issue();
        const uint8_t* const x = x_lane + x_slot_out * S::kXBytes;
        const uint8_t* const w = w_warp + w_slot_out * S::kWBytes;
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            uint32_t a[2][8];
            f16_fragments<Q>(a[0], w, sub, b, lane, inverse[0]);
            f16_fragments<Q>(a[1], w + Q::kPackedTileBytes, sub, b, lane, inverse[1]);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint4 v = *reinterpret_cast<const uint4*>(x + tile * 1024 + b * x_half);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    mma_f16(acc[i][tile], a[i], v.x, v.y);
                    mma_f16(acc[i][tile], a[i] + 4, v.z, v.w);
                }
            }
        }
        x_slot_out = x_slot_out + 1 == S::kStages ? 0 : x_slot_out + 1;
        if (++sub == Q::kSubs) {
            sub = 0;
            w_slot_out = w_slot_out + 1 == S::kSlots ? 0 : w_slot_out + 1;
        }
    }
    cp_async_wait<0>();

    float bias[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int o = (row_tile0 + 2 * warp_m + i) * kTileRows + g + 8 * r;
            bias[i][r] = p.bias != nullptr && o < p.n_out ? p.bias[o] : 0.0f;
        }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = row0 + (warp_n * kTiles + tile) * 8 + 2 * t + c;
            if (row >= p.n_rows) continue;
            const float x_scale = p.x_scale[row];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int o = (row_tile0 + 2 * warp_m + i) * kTileRows + g + 8 * r;
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
