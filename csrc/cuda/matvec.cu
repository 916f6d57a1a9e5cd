// Decode: out[r, o] (+)= sum_k x[r, k] W[o, k] (+ bias[o]) for 1 .. 64 rows r, quantized W, float32 results.
//
// matvec_<type>_<tiles>(MatvecParams), tiles 1, 2, 4, 8: up to 8 * tiles rows. One launch may cover several matrices of
// one type that share the input; their row tiles of 16 outputs are numbered through.
//
// Any grid and number of warps: a block takes one or two row tiles (kRowTiles) at a time, in steps of the grid. K is
// cut into stages of 128 columns (64 for unquantized types, 256 for K-quants). Stage i belongs to warp i % warps: each
// warp streams its stages through a ring of its own in shared memory (cp.async, no block-wide barrier) and multiplies
// on the tensor cores; the warps' sums are added in order of the warp. So the order of an output's sum depends on K,
// the type and the number of warps, and neither on the rows of the launch nor on `tiles` nor on the grid.
//
// Numbers: codes are exact in bf16 and activations are two bf16 terms; the products of a scale block accumulate in
// float32 and are scaled in float32, so the weights are exact. Unquantized weights become bf16 terms too, F32 and F16
// two of them.
//
// Bytes: each weight once from memory. x: with 1 tile each block converts the float32 rows itself, else it reads the
// split rows once per step, from L2. Weights are in flight before the wait for the kernel before.
#include "common/activations.cuh"
#include "common/mma_tile.cuh"
#include "params/matmul_params.h"
#include "matmul_shapes.cuh"

DEVICE int matrix_of(const MatvecParams& p, int row_tile) {
    int m = 0;
#pragma unroll
    for (int i = 1; i < MATVEC_MAX_MATRICES; ++i)
        if (i < p.n_matrices && row_tile >= p.m[i].row_tile0) m = i;
    return m;
}

// Where a row tile's packed tiles begin.
template <class Q>
DEVICE const uint8_t* row_tile_address(const MatvecParams& p, int row_tile) {
    const MatvecMatrix& m = p.m[matrix_of(p, row_tile)];
    return m.w + static_cast<int64_t>(row_tile - m.row_tile0) * p.n_k_tiles * Q::kPackedTileBytes;
}

// The stream of one warp's stages over the row tiles of its block: always kDepth - 1 stages ahead of the sums.
template <class Q, int kTiles>
struct Loader {
    using S = MatvecShape<Q, kTiles>;
    const MatvecParams& p;
    const uint8_t* src[S::kRowTiles];
    uint32_t ring;
    int lane, warp, n_warps, n_stages, n_tiles, tile, stage, slot = 0;

    DEVICE_MEMBER void find_row_tiles() {
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i)
            if (tile < n_tiles) src[i] = row_tile_address<Q>(p, min(tile * S::kRowTiles + i, p.n_row_tiles - 1));
    }

    // Starts the copy of the next stage (nothing after the last) and commits one group either way.
    DEVICE_MEMBER void issue() {
        if (tile < n_tiles) {
            const int k_tile = stage * S::kStageKTiles,
                      n = min(S::kStageKTiles, p.n_k_tiles - k_tile) * Q::kPackedTileBytes;
            const uint32_t to = ring + slot * S::kSlotBytes;
#pragma unroll
            for (int i = 0; i < S::kRowTiles; ++i) {
                const uint8_t* from = src[i] + static_cast<int64_t>(k_tile) * Q::kPackedTileBytes;
#pragma unroll
                for (int at = 0; at < S::kStageBytes; at += 512)
                    if (at + lane * 16 < n)
                        cp_async_16(to + i * S::kStageBytes + at + lane * 16, from + at + lane * 16);
            }
            slot = slot + 1 == S::kDepth ? 0 : slot + 1;
            stage += n_warps;
            if (stage >= n_stages) {
                stage = warp;
                tile += gridDim.x;
                find_row_tiles();
            }
        }
        cp_async_commit();
    }
};

// Where a lane finds its activations: B fragments of row 8 * tile + g, sums of rows 8 * tile + 2t and the next.
template <int kTiles>
struct Activations {
    const uint8_t* fragments;
    const uint8_t* sums[2];
    int64_t tile_bytes;  // between tiles

    static DEVICE_MEMBER bool exists(int) { return true; }
    DEVICE_MEMBER uint4 high(int tile, int block) const { return at(tile, block * 128); }
    DEVICE_MEMBER uint4 low(int tile, int block) const { return at(tile, block * 128 + 64); }
    DEVICE_MEMBER float2 block_sums(int tile, int column, int block) const {
        return *reinterpret_cast<const float2*>(sums[column] + tile * tile_bytes + block * 8);
    }

    DEVICE_MEMBER uint4 at(int tile, int offset) const {
        return *reinterpret_cast<const uint4*>(fragments + tile * tile_bytes + offset);
    }
};

template <class Q, int kTiles>
DEVICE void matvec(const MatvecParams& p) {
    using S = MatvecShape<Q, kTiles>;
    // [warps][kDepth][kSlotBytes] rings, [2][warps][kSums] float32 partial sums, 1 tile: [n_rows][split_bytes] rows
    extern __shared__ __align__(128) uint8_t smem[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, g = lane >> 2, t = lane & 3;
    const int n_stages = (p.n_k_tiles + S::kStageKTiles - 1) / S::kStageKTiles;
    const int n_tiles = (p.n_row_tiles + S::kRowTiles - 1) / S::kRowTiles;
    const int n_x_blocks = p.n_k_tiles * (Q::kTileK / 32);
    const uint8_t* ring = smem + warp * (S::kDepth * S::kSlotBytes);
    float* partial = reinterpret_cast<float*>(smem + p.ring_bytes);

    pdl_launch_dependents();
    Loader<Q, kTiles> loader{p,        {},      smem_address(ring),           lane, warp, n_warps,
                             n_stages, n_tiles, static_cast<int>(blockIdx.x), warp};
    loader.find_row_tiles();
#pragma unroll
    for (int i = 0; i < S::kDepth - 1; ++i) loader.issue();
    pdl_wait();

    Activations<kTiles> x;
    if constexpr (kTiles == 1) {
        uint8_t* rows = smem + p.ring_bytes + 2 * n_warps * S::kSums * 4;
        const int n_items = (4 * n_x_blocks + 31) & ~31;
        for (int row = 0; row < p.n_rows; ++row)
            for (int item = threadIdx.x; item < n_items; item += blockDim.x)
                split_item(rows + row * p.split_bytes, p.x + row * p.x_stride, item, n_x_blocks, p.k / 32);
        __syncthreads();
        // Columns of rows that do not exist are computed from row 0 and dropped: they touch no other column.
        const auto row = [&](int r) { return rows + (r < p.n_rows ? r : 0) * p.split_bytes; };
        x.fragments = row(g) + t * 16;
        x.sums[0] = row(2 * t) + split_sums_offset(n_x_blocks);
        x.sums[1] = row(2 * t + 1) + split_sums_offset(n_x_blocks);
        x.tile_bytes = 0;
    } else {
        x.fragments = p.split + g * p.split_bytes + t * 16;
        x.sums[0] = p.split + 2 * t * p.split_bytes + split_sums_offset(n_x_blocks);
        x.sums[1] = x.sums[0] + p.split_bytes;
        x.tile_bytes = 8 * p.split_bytes;
    }

    int slot = 0, parity = 0;
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        Sums<S::kRowTiles, kTiles> acc = {};
        for (int stage = warp; stage < n_stages; stage += n_warps) {
            cp_async_wait<S::kDepth - 2>();
            // Everyone's part of this stage has landed, everyone has left the slot that is filled next.
            __syncwarp();
            loader.issue();
#pragma unroll kTiles >= 4 ? 1 : S::kStageKTiles
            for (int u = 0; u < S::kStageKTiles; ++u) {
                const int k_tile = stage * S::kStageKTiles + u;
                if (k_tile >= p.n_k_tiles) break;
                const uint8_t* packed_tile[S::kRowTiles];
#pragma unroll
                for (int i = 0; i < S::kRowTiles; ++i)
                    packed_tile[i] = ring + slot * S::kSlotBytes + i * S::kStageBytes + u * Q::kPackedTileBytes;
                const int x_block0 = k_tile * (Q::kTileK / 32);
                if constexpr (kDense<Q>) {
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        uint32_t high[S::kRowTiles][8], low[S::kRowTiles][8];
#pragma unroll
                        for (int i = 0; i < S::kRowTiles; ++i)
                            dense_fragments<Q>(high[i], low[i], load_codes<Q>(packed_tile[i], 0, lane), b);
                        add_dense<Q>(acc, high, low, x_block0 + b, x);
                    }
                } else {
#pragma unroll 1
                    for (int sub = 0; sub < Q::kSubs; ++sub) add_quantized<Q>(acc, packed_tile, sub, x_block0, x, lane);
                }
            }
            slot = slot + 1 == S::kDepth ? 0 : slot + 1;
        }

        // partial[warp][row tile][output of it][row of x], two sets in turn: one barrier a round suffices.
#pragma unroll
        for (int x_tile = 0; x_tile < kTiles; ++x_tile) {
            const int n_here = min(8, p.n_rows - 8 * x_tile);
            if (n_here <= 0) break;
            float* set = partial + parity * n_warps * S::kSums;
#pragma unroll
            for (int i = 0; i < S::kRowTiles; ++i) {
                const float (&d)[4] = acc[i][x_tile];
                float* to = set + warp * S::kSums + i * 128 + g * 8 + 2 * t;
                *reinterpret_cast<float2*>(to) = make_float2(d[0], d[1]);
                *reinterpret_cast<float2*>(to + 64) = make_float2(d[2], d[3]);
            }
            __syncthreads();
            for (int i = threadIdx.x; i < n_here * 16 * S::kRowTiles; i += blockDim.x) {
                const int n = i / (16 * S::kRowTiles), in_tile = i % (16 * S::kRowTiles);
                const int row_tile = tile * S::kRowTiles + in_tile / 16;
                if (row_tile >= p.n_row_tiles) continue;
                const MatvecMatrix& m = p.m[matrix_of(p, row_tile)];
                const int o = (row_tile - m.row_tile0) * 16 + in_tile % 16;
                if (o >= m.n_out) continue;
                float sum = 0.0f;
                for (int w = 0; w < n_warps; ++w) sum += set[w * S::kSums + in_tile * 8 + n];
                if (m.bias != nullptr) sum += m.bias[o];
                float* to = m.out + (8 * x_tile + n) * m.out_stride + o;
                *to = m.add ? *to + sum : sum;
            }
            parity ^= 1;
        }
    }
    cp_async_wait<0>();
}

// Blocks per multiprocessor of the 8-tile kernels: asked for 1, the compiler spends all registers on scheduling, asked
// for none (0) it saves them. Tried one by one: the types that would spill with the one get the other.
template <class Q>
constexpr int kBlocks8 = MatvecShape<Q, 8>::kRowTiles == 1 && Q::kLowBits > 2 ? 1 : 0;

#define DEFINE_TILES(Type, name, tiles, blocks)                           \
    extern "C" __global__ void __launch_bounds__(256, blocks)             \
        matvec_##name##_##tiles(const __grid_constant__ MatvecParams p) { \
        matvec<Type, tiles>(p);                                           \
    }
#define DEFINE(Type, name)         \
    DEFINE_TILES(Type, name, 1, 3) \
    DEFINE_TILES(Type, name, 2, 2) \
    DEFINE_TILES(Type, name, 4, 1) \
    DEFINE_TILES(Type, name, 8, kBlocks8<Type>)
FOR_EACH_TYPE(DEFINE)
