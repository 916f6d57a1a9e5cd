// Decode: out[r, s, o] = sum_k x[r(, s), k] W[e, o, k] (+ bias[e, o]) for every slot s of 9 to 64 rows, e = ids[r, s].
//
// expert_matvec_<type>_<tiles>(ExpertMatvecParams), one or two matrices of one shape and input (gate and up). An item
// is an expert and up to 8 * tiles of its pairs. The blocks that share an item divide its row tiles of 16 outputs among
// them, so with any number of items all blocks have about equal work. How many items there are is known on the device
// only: the grid is what the GPU holds at once.
//
// As in matvec.cu, chunk c of K belongs to warp c % warps, each warp has a ring of its own, and the chunks' sums are
// added in order. The numbers are those of all products (common/mma_tile.cuh).
//
// Bytes: the chosen experts' weights once per item from memory; the converted rows once per row tile, from L1.
#include "common/activations.cuh"
#include "common/mma_tile.cuh"
#include "params/experts_params.h"
#include "matmul_shapes.cuh"

// The stream of one warp's stages over the row tiles of its block: always kDepth - 1 stages ahead of the sums.
template <class Q>
struct RowTileStream {
    using S = MatvecShape<Q, 1>;
    static_assert(S::kRowTiles == 1);
    const ExpertMatvecParams& p;
    uint32_t ring;
    int lane, warp, n_warps, n_stages, chunk_stages, n_row_tiles, slot;
    const uint8_t* src;
    int64_t expert_at;
    int row_tile, row_tile_step, stage;

    DEVICE_MEMBER void find_row_tile() {
        if (row_tile >= p.n_matrices * n_row_tiles) return;
        const int m = row_tile >= n_row_tiles;
        src =
            p.m[m].w + expert_at + static_cast<int64_t>(row_tile - m * n_row_tiles) * p.n_k_tiles * Q::kPackedTileBytes;
    }

    DEVICE_MEMBER void begin(int expert, int first_row_tile, int step) {
        expert_at = expert * p.matrix_bytes;
        row_tile = first_row_tile, row_tile_step = step, stage = warp * chunk_stages;
        find_row_tile();
#pragma unroll
        for (int i = 0; i < S::kDepth - 1; ++i) issue();
    }

    // Starts the copy of the next stage (nothing after the last) and commits one group either way.
    DEVICE_MEMBER void issue() {
        if (row_tile < p.n_matrices * n_row_tiles) {
            const int k_tile = stage * S::kStageKTiles,
                      n = min(S::kStageKTiles, p.n_k_tiles - k_tile) * Q::kPackedTileBytes;
            const uint8_t* from = src + static_cast<int64_t>(k_tile) * Q::kPackedTileBytes;
            const uint32_t to = ring + slot * S::kSlotBytes;
#pragma unroll
            for (int at = 0; at < S::kStageBytes; at += 512)
                if (at + lane * 16 < n) cp_async_16(to + at + lane * 16, from + at + lane * 16);
            slot = slot + 1 == S::kDepth ? 0 : slot + 1;
            stage = next_stage(stage, chunk_stages, n_warps);
            if (stage >= n_stages) {
                stage = warp * chunk_stages;
                row_tile += row_tile_step;
                find_row_tile();
            }
        }
        cp_async_commit();
    }
};

template <class Q, int kTiles>
DEVICE void expert_matvec(const ExpertMatvecParams& p) {
    using S = MatvecShape<Q, 1>;
    constexpr int kSums = 128;
    // [warps][kDepth][kSlotBytes] rings, [2][warps][kSums] sums of chunks, [n_chunks][8 * kTiles] factors,
    // [kTiles][kSums] sums so far
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ int pairs[8 * kTiles];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, g = lane >> 2, t = lane & 3;
    const int n_stages = (p.n_k_tiles + S::kStageKTiles - 1) / S::kStageKTiles;
    const int n_row_tiles = (p.n_out + kTileRows - 1) / kTileRows;
    const int chunk = chunk_columns(p.k), n_chunks = (p.k + chunk - 1) / chunk;
    const int chunk_stages = chunk / (S::kStageKTiles * Q::kTileK), n_rounds = (n_chunks + n_warps - 1) / n_warps;
    const int64_t tiles_bytes = static_cast<int64_t>(n_row_tiles) * p.n_k_tiles * Q::kPackedTileBytes;
    const uint8_t* ring = smem + warp * (S::kDepth * S::kSlotBytes);
    float* partial = reinterpret_cast<float*>(smem + p.ring_bytes);
    float* factors = partial + 2 * n_warps * kSums;
    float* so_far = factors + n_chunks * 8 * kTiles;
    RowTileStream<Q> stream{p, smem_address(ring), lane, warp, n_warps, n_stages, chunk_stages, n_row_tiles, 0};
    int slot = 0, parity = 0;

    pdl_launch_dependents();
    pdl_wait();
    // Block b has item b % n_items and, of the blocks that share it, is number b / n_items.
    const int n_items = *p.list.n_items, n_blocks = gridDim.x;
    if (n_items == 0) return;
    const int part = static_cast<int>(blockIdx.x) / n_items;
    for (int i = static_cast<int>(blockIdx.x) % n_items; i < n_items; i += n_blocks) {
        const ExpertItem item = p.list.items[i];
        const int n_parts = max(1, (n_blocks - i + n_items - 1) / n_items);
        stream.begin(item.expert, part, n_parts);
        __syncthreads();  // nobody reads the item before any more
        if (threadIdx.x < 8 * kTiles)
            pairs[threadIdx.x] = p.list.pairs[item.first + min(static_cast<int>(threadIdx.x), item.n - 1)];
        __syncthreads();
        const auto converted = [&](int r) {
            return p.rows + static_cast<int64_t>(pairs[r] / p.n_used + pairs[r] % p.n_used * p.x_slot_rows) * p.x_bytes;
        };
        for (int at = threadIdx.x; at < 8 * kTiles * n_chunks; at += blockDim.x)
            factors[at] = reinterpret_cast<const float*>(converted(at % (8 * kTiles)) +
                                                         converted_fragment_bytes(p.k))[at / (8 * kTiles)];
        // Columns of rows that do not exist are those of the last one and dropped: they touch no other column.
        const uint8_t* x[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) x[tile] = converted(8 * tile + g) + t * 16;
        const int n_x_tiles = (item.n + 7) / 8;

        for (int row_tile = part; row_tile < p.n_matrices * n_row_tiles; row_tile += n_parts) {
            const ExpertMatrix& m = p.m[row_tile >= n_row_tiles];
            const uint8_t* const weights = m.w + item.expert * p.matrix_bytes;
            const int in_matrix = row_tile >= n_row_tiles ? row_tile - n_row_tiles : row_tile;
            const int o0 = in_matrix * kTileRows;
            float inverse[2];
            row_inverse<Q>(inverse, weights, tiles_bytes, in_matrix, g);
            for (int round = 0; round < n_rounds; ++round) {  // a chunk of every warp
                float acc[kTiles][4] = {};
                const int first = (round * n_warps + warp) * chunk_stages, last = min(n_stages, first + chunk_stages);
                for (int stage = first; stage < last; ++stage) {
                    cp_async_wait<S::kDepth - 2>();
                    // Everyone's part of this stage has landed, everyone has left the slot that is filled next.
                    __syncwarp();
                    stream.issue();
#pragma unroll
                    for (int u = 0; u < S::kStageKTiles; ++u) {
                        const int k_tile = stage * S::kStageKTiles + u;
                        if (k_tile >= p.n_k_tiles) break;
                        const uint8_t* packed_tile = ring + slot * S::kSlotBytes + u * Q::kPackedTileBytes;
#pragma unroll 1
                        for (int sub = 0; sub < Q::kSubs; ++sub) {
#pragma unroll
                            for (int b = 0; b < 2; ++b) {
                                uint32_t a[8];
                                f16_fragments<Q>(a, packed_tile, sub, b, lane, inverse);
                                const int at = (k_tile * (Q::kTileK / 32) + 2 * sub + b) * 64;
#pragma unroll
                                for (int tile = 0; tile < kTiles; ++tile) {
                                    if (tile > 0 && tile >= n_x_tiles) break;
                                    const uint4 v = *reinterpret_cast<const uint4*>(x[tile] + at);
                                    mma_f16(acc[tile], a, v.x, v.y);
                                    mma_f16(acc[tile], a + 4, v.z, v.w);
                                }
                            }
                        }
                    }
                    slot = slot + 1 == S::kDepth ? 0 : slot + 1;
                }

                // partial[warp][output of the row tile][row of x], two sets in turn: one barrier a round suffices.
                const int n_here_chunks = min(n_warps, n_chunks - round * n_warps);
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const int n_here = min(8, item.n - 8 * tile);
                    if (n_here <= 0) break;
                    float* set = partial + parity * n_warps * kSums;
                    float* to = set + warp * kSums + g * 8 + 2 * t;
                    *reinterpret_cast<float2*>(to) = make_float2(acc[tile][0], acc[tile][1]);
                    *reinterpret_cast<float2*>(to + 64) = make_float2(acc[tile][2], acc[tile][3]);
                    __syncthreads();
                    for (int at = threadIdx.x; at < n_here * kTileRows; at += blockDim.x) {
                        const int n = at / kTileRows, o = o0 + at % kTileRows, pair = pairs[8 * tile + n];
                        if (o >= p.n_out) continue;
                        float* kept = so_far + tile * kSums + at;
                        float sum = round ? *kept : 0.0f;
                        for (int w = 0; w < n_here_chunks; ++w)
                            sum = __fmaf_rn(set[w * kSums + at % kTileRows * 8 + n],
                                            factors[(round * n_warps + w) * 8 * kTiles + 8 * tile + n], sum);
                        if (round + 1 < n_rounds) {
                            *kept = sum;
                            continue;
                        }
                        const bool has = m.bias != nullptr;
                        m.out[pair / p.n_used * m.out_stride + static_cast<int64_t>(pair % p.n_used) * p.n_out + o] =
                            __fmaf_rn(sum, weight_unit<Q>(weights, tiles_bytes, o),
                                      has ? m.bias[static_cast<int64_t>(item.expert) * p.n_out + o] : 0.0f);
                    }
                    parity ^= 1;
                }
            }
        }
    }
    cp_async_wait<0>();
}

#define DEFINE_TILES(Type, name, tiles, blocks)                                        \
    extern "C" __global__ void __launch_bounds__(256, blocks)                          \
        expert_matvec_##name##_##tiles(const __grid_constant__ ExpertMatvecParams p) { \
        expert_matvec<Type, tiles>(p);                                                 \
    }
#define DEFINE(Type, name) DEFINE_TILES(Type, name, 2, 2)
FOR_EACH_TYPE(DEFINE)
