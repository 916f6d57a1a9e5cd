// Decode: out[r, s, o] = sum_k x[r(, s), k] W[e, o, k] (+ bias[e, o]) for every slot s of up to 64 rows, e = ids[r, s].
//
// expert_matvec_<type>_<tiles>(ExpertMatvecParams), one or two matrices of one shape and input (gate and up). With
// tiles 1, for few rows, a block converts float32 x into shared memory itself; with tiles 2 it reads rows by
// convert_split. An item is an expert and up to 8 * tiles of its pairs. The blocks that share an item divide its row
// tiles of 16 outputs among them, so with any number of items all blocks have about equal work. How many items there
// are is known on the device only: the grid is what the GPU holds at once.
//
// As in matvec.cu, K is cut into stages, stage i belongs to warp i % warps, each warp has a ring of its own, and the
// warps' sums are added in order of the warp: a pair's result has the same bits alone and in any company.
//
// Bytes: the chosen experts' weights once per item from memory; x once per block (1 tile) or from L1 (2 tiles).
#include "common/activations.cuh"
#include "params/experts_params.h"
#include "common/mma_tile.cuh"
#include "matmul_shapes.cuh"

// The stream of one warp's stages over the row tiles of its block: always kDepth - 1 stages ahead of the sums.
template <class Q>
struct RowTileStream {
    using S = MatvecShape<Q, 1>;
    static_assert(S::kRowTiles == 1);
    const ExpertMatvecParams& p;
    uint32_t ring;
    int lane, warp, n_warps, n_stages, n_row_tiles, slot;
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
        row_tile = first_row_tile, row_tile_step = step, stage = warp;
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
            stage += n_warps;
            if (stage >= n_stages) {
                stage = warp;
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
    // [warps][kDepth][kSlotBytes] rings, [2][warps][kSums] float32 partial sums, 1 tile: [item.n][split_bytes] rows
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ int pairs[8 * kTiles];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, g = lane >> 2, t = lane & 3;
    const int n_stages = (p.n_k_tiles + S::kStageKTiles - 1) / S::kStageKTiles;
    const int n_row_tiles = (p.n_out + kTileRows - 1) / kTileRows, n_x_blocks = p.n_k_tiles * (Q::kTileK / 32);
    const uint8_t* ring = smem + warp * (S::kDepth * S::kSlotBytes);
    float* partial = reinterpret_cast<float*>(smem + p.ring_bytes);
    RowTileStream<Q> stream{p, smem_address(ring), lane, warp, n_warps, n_stages, n_row_tiles, 0};
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
        if (threadIdx.x < item.n) pairs[threadIdx.x] = p.list.pairs[item.first + threadIdx.x];
        __syncthreads();

        // Columns of rows that do not exist are computed from row 0 and dropped: they touch no other column.
        SplitRows<kTiles> x;
        x.n_tiles = (item.n + 7) / 8;
        const auto set_rows = [&](auto byte_of_row) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                x.fragments[tile] = static_cast<uint32_t>(byte_of_row(8 * tile + g)) + t * 16;
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    x.sums[tile][c] =
                        static_cast<uint32_t>(byte_of_row(8 * tile + 2 * t + c)) + split_sums_offset(n_x_blocks);
            }
        };
        if constexpr (kTiles == 1) {
            uint8_t* const rows = smem + p.ring_bytes + 2 * n_warps * kSums * 4;
            const int n_lanes = (4 * n_x_blocks + 31) & ~31;
            for (int r = 0; r < item.n; ++r) {
                const float* from = p.x + pairs[r] / p.n_used * p.x_stride + pairs[r] % p.n_used * p.x_slot_stride;
                for (int at = threadIdx.x; at < n_lanes; at += blockDim.x)
                    split_item(rows + r * p.split_bytes, from, at, n_x_blocks, p.k / 32);
            }
            __syncthreads();
            x.rows = rows;
            set_rows([&](int r) { return (r < item.n ? r : 0) * p.split_bytes; });
        } else {
            x.rows = p.split;
            set_rows([&](int r) {
                const int pair = pairs[r < item.n ? r : 0];
                return (pair / p.n_used + pair % p.n_used * p.split_slot_rows) * p.split_bytes;
            });
        }

        for (int row_tile = part; row_tile < p.n_matrices * n_row_tiles; row_tile += n_parts) {
            Sums<1, kTiles> acc = {};
            for (int stage = warp; stage < n_stages; stage += n_warps) {
                cp_async_wait<S::kDepth - 2>();
                // Everyone's part of this stage has landed, everyone has left the slot that is filled next.
                __syncwarp();
                stream.issue();
#pragma unroll
                for (int u = 0; u < S::kStageKTiles; ++u) {
                    const int k_tile = stage * S::kStageKTiles + u;
                    if (k_tile >= p.n_k_tiles) break;
                    const uint8_t* packed_tile = ring + slot * S::kSlotBytes + u * Q::kPackedTileBytes;
                    const int x_block0 = k_tile * (Q::kTileK / 32);
                    if constexpr (kDense<Q>) {
                        const auto codes = load_codes<Q>(packed_tile, 0, lane);
#pragma unroll
                        for (int b = 0; b < 2; ++b) {
                            uint32_t high[1][8], low[1][8];
                            dense_fragments<Q>(high[0], low[0], codes, b);
                            add_dense<Q>(acc, high, low, x_block0 + b, x);
                        }
                    } else {
#pragma unroll 1
                        for (int sub = 0; sub < Q::kSubs; ++sub)
                            add_quantized<Q>(acc, packed_tile, sub, x_block0, x, lane);
                    }
                }
                slot = slot + 1 == S::kDepth ? 0 : slot + 1;
            }

            // partial[warp][output of the row tile][row of x], two sets in turn: one barrier a round suffices.
            const ExpertMatrix& m = p.m[row_tile >= n_row_tiles];
            const int o0 = (row_tile >= n_row_tiles ? row_tile - n_row_tiles : row_tile) * kTileRows;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const int n_here = min(8, item.n - 8 * tile);
                if (n_here <= 0) break;
                float* set = partial + parity * n_warps * kSums;
                float* to = set + warp * kSums + g * 8 + 2 * t;
                *reinterpret_cast<float2*>(to) = make_float2(acc[0][tile][0], acc[0][tile][1]);
                *reinterpret_cast<float2*>(to + 64) = make_float2(acc[0][tile][2], acc[0][tile][3]);
                __syncthreads();
                for (int at = threadIdx.x; at < n_here * kTileRows; at += blockDim.x) {
                    const int n = at / kTileRows, o = o0 + at % kTileRows, pair = pairs[8 * tile + n];
                    if (o >= p.n_out) continue;
                    float sum = 0.0f;
                    for (int w = 0; w < n_warps; ++w) sum += set[w * kSums + at % kTileRows * 8 + n];
                    if (m.bias != nullptr) sum += m.bias[static_cast<int64_t>(item.expert) * p.n_out + o];
                    m.out[pair / p.n_used * m.out_stride + static_cast<int64_t>(pair % p.n_used) * p.n_out + o] = sum;
                }
                parity ^= 1;
            }
        }
    }
    cp_async_wait<0>();
}

// Q5_1 spills with the registers of three blocks.
template <class Q>
constexpr int kBlocks1 = std::is_same_v<Q, Q5_1> ? 2 : 3;

#define DEFINE_TILES(Type, name, tiles, blocks)                                        \
    extern "C" __global__ void __launch_bounds__(256, blocks)                          \
        expert_matvec_##name##_##tiles(const __grid_constant__ ExpertMatvecParams p) { \
        expert_matvec<Type, tiles>(p);                                                 \
    }
#define DEFINE(Type, name)                      \
    DEFINE_TILES(Type, name, 1, kBlocks1<Type>) \
    DEFINE_TILES(Type, name, 2, 2)
FOR_EACH_TYPE(DEFINE)
