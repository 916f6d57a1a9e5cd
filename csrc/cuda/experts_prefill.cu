// Prompts: out[r, s, o] = sum_k x[r(, s), k] W[e, o, k] (+ bias[e, o]) for every slot s of any number of rows.
//
// expert_matmul_<type>_<rows>(ExpertMatmulParams): the product of matmul.cu in tiles of 128 outputs x 64 (16) pairs of
// one expert, whose rows of x are gathered. 128 threads, grid (matrices * tiles along n_out, items that there can be):
// how many there are is known on the device only, the blocks of the others end at once.
//
// One output is one chain of tensor core products over ascending K, whatever the tile and whoever shares it: both
// variants and any company give a pair the same bits. Numbers as in matmul.cu: weights and x in fp16, powers of two per
// row, float32 accumulators.
//
// Bytes: an expert's weights once per item, x n_out / 128 times, mostly from L2.
#include "params/experts_params.h"
#include "common/mma_tile.cuh"
#include "matmul_shapes.cuh"

template <class Q, int kTiles>
DEVICE void expert_matmul(const ExpertMatmulParams& p) {
    using S = MatmulShape<Q, 4, 1, kTiles>;
    // [kStages][kRows][64 columns] fp16 x, its eight 16-byte chunks in exchanged halves in odd rows (bank conflicts);
    // [kSlots][kRowTiles][kPackedTileBytes] weights
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ int pairs[S::kRows];
    uint8_t* const w_ring = smem + S::kStages * S::kXBytes;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    const int n_row_tiles = (p.n_out + kTileRows - 1) / kTileRows,
              n_tiles = (n_row_tiles + S::kRowTiles - 1) / S::kRowTiles;
    const int row_tile0 = static_cast<int>(blockIdx.x) % n_tiles * S::kRowTiles, n_steps = p.n_k_tiles * Q::kSubs;
    const int64_t row_tile_bytes = static_cast<int64_t>(p.n_k_tiles) * Q::kPackedTileBytes;
    const ExpertMatrix& m = p.m[static_cast<int>(blockIdx.x) / n_tiles];

    pdl_launch_dependents();
    pdl_wait();
    if (static_cast<int>(blockIdx.y) >= *p.list.n_items) return;
    const ExpertItem item = p.list.items[blockIdx.y];
    const uint8_t* const weights = m.w + item.expert * p.matrix_bytes;
    if (threadIdx.x < S::kRows)
        pairs[threadIdx.x] = p.list.pairs[item.first + min(static_cast<int>(threadIdx.x), item.n - 1)];
    __syncthreads();
    const auto x_index = [&](int row) { return pairs[row] / p.n_used + pairs[row] % p.n_used * p.x_slot_rows; };

    // Rows past the item's are its last one, row tiles past the end the last one: computed and dropped. Thread i copies
    // chunk i % 8 of rows i / 8 + a multiple of kRowStep (even: one exchange of halves serves all); warp w row tiles w
    // and w + 4.
    constexpr int kRowStep = 4 * S::kWarps, kCopies = S::kRows / kRowStep, kRowTilesPerWarp = S::kRowTiles / S::kWarps;
    static_assert(S::kRowTiles % S::kWarps == 0 && S::kRows % kRowStep == 0 && kRowStep % 2 == 0);
    const int x_row = threadIdx.x / 8, x_chunk = threadIdx.x % 8;
    uint32_t x_from[kCopies];  // bytes from p.x on
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
        x_from[i] = static_cast<uint32_t>(x_index(x_row + i * kRowStep)) * p.x_bytes + x_chunk * 16;
    const uint8_t* w_from[kRowTilesPerWarp];
#pragma unroll
    for (int i = 0; i < kRowTilesPerWarp; ++i)
        w_from[i] = weights + min(row_tile0 + warp + i * S::kWarps, n_row_tiles - 1) * row_tile_bytes + lane * 16;
    const uint32_t x_to = smem_address(smem) + x_row * 128 + (x_chunk ^ (x_row & 1) * 4) * 16;
    const uint32_t w_to = smem_address(w_ring) + warp * Q::kPackedTileBytes + lane * 16;
    int issued = 0, x_slot_in = 0, w_slot_in = 0;
    const auto issue = [&] {
        if (issued < n_steps) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                cp_async_16(x_to + x_slot_in * S::kXBytes + i * kRowStep * 128, p.x + x_from[i]);
                x_from[i] += 2 * kSubK;
            }
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
                const int row_tile = min(row_tile0 + 2 * warp + i, n_row_tiles - 1);
                const uint32_t* scales = reinterpret_cast<const uint32_t*>(weights + n_row_tiles * row_tile_bytes);
                inverse[i][r] = __uint_as_float(inverse_bits(scales[row_tile * kTileRows + g + 8 * r]));
            }
        }

    float acc[2][kTiles][4] = {};
    const uint8_t* const x_lane = smem + g * 128 + (t ^ (g & 1) * 4) * 16;
    const uint8_t* const w_warp = w_ring + 2 * warp * Q::kPackedTileBytes;
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
            const int o = (row_tile0 + 2 * warp + i) * kTileRows + g + 8 * r;
            const bool has = m.bias != nullptr && o < p.n_out;
            bias[i][r] = has ? m.bias[static_cast<int64_t>(item.expert) * p.n_out + o] : 0.0f;
        }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row = tile * 8 + 2 * t + c;
            if (row >= item.n) continue;
            const float x_scale = p.x_scale[x_index(row)];
            float* out =
                m.out + pairs[row] / p.n_used * m.out_stride + static_cast<int64_t>(pairs[row] % p.n_used) * p.n_out;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int o = (row_tile0 + 2 * warp + i) * kTileRows + g + 8 * r;
                    if (o >= p.n_out) continue;
                    const float row_scale = __uint_as_float(inverse_bits(__float_as_uint(inverse[i][r])));
                    out[o] = acc[i][tile][2 * r + c] * x_scale * row_scale + bias[i][r];
                }
        }
}

#define DEFINE_ROWS(Type, name, rows, blocks)                                         \
    extern "C" __global__ void __launch_bounds__(128, blocks)                         \
        expert_matmul_##name##_##rows(const __grid_constant__ ExpertMatmulParams p) { \
        expert_matmul<Type, rows / 8>(p);                                             \
    }
#define DEFINE(Type, name)         \
    DEFINE_ROWS(Type, name, 64, 3) \
    DEFINE_ROWS(Type, name, 16, 4)
FOR_EACH_TYPE(DEFINE)
