// Decode: out[r, o] (+)= sum_k x[r, k] W[o, k] (+ bias[o]) for 9 .. 64 rows r, quantized W, float32 results.
//
// matvec_<type>_<tiles>(MatvecParams), tiles 2, 4, 8: up to 8 * tiles rows. One launch may cover several matrices of
// one type that share the input; their row tiles of 16 outputs are numbered through.
//
// Any grid and number of warps: a block takes one or two row tiles (kRowTiles) at a time, in steps of the grid. Chunk c
// of K belongs to warp c % warps: each warp streams its chunks, in stages of 128 columns (64 for unquantized types, 256
// for K-quants), through a ring of its own in shared memory (cp.async, no block-wide barrier) and multiplies on the
// tensor cores; the chunks' sums are added in order. The numbers are those of all products (common/mma_tile.cuh).
//
// Bytes: each weight once from memory; the converted rows once per row tile or two, from L2. Weights are in flight
// before the wait for the kernel before.
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

// Bytes of a matrix's packed tiles.
template <class Q>
DEVICE int64_t matrix_bytes(const ProductMatrix& m, int n_k_tiles) {
    return static_cast<int64_t>((m.n_out + kTileRows - 1) / kTileRows) * n_k_tiles * Q::kPackedTileBytes;
}

// Where a row tile's packed tiles begin.
template <class Q>
DEVICE const uint8_t* row_tile_address(const MatvecParams& p, int row_tile) {
    const ProductMatrix& m = p.m[matrix_of(p, row_tile)];
    return m.w + static_cast<int64_t>(row_tile - m.row_tile0) * p.n_k_tiles * Q::kPackedTileBytes;
}

// The stream of one warp's stages over the row tiles of its block: always kDepth - 1 stages ahead of the sums.
template <class Q, int kTiles>
struct Loader {
    using S = MatvecShape<Q, kTiles>;
    const MatvecParams& p;
    const uint8_t* src[S::kRowTiles];
    uint32_t ring;
    int lane, warp, n_warps, n_stages, chunk_stages, n_tiles, tile, stage, slot = 0;

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
            stage = next_stage(stage, chunk_stages, n_warps);
            if (stage >= n_stages) {
                stage = warp * chunk_stages;
                tile += gridDim.x;
                find_row_tiles();
            }
        }
        cp_async_commit();
    }
};

template <class Q, int kTiles>
DEVICE void matvec(const MatvecParams& p) {
    using S = MatvecShape<Q, kTiles>;
    // [warps][kDepth][kSlotBytes] rings, [2][warps][kSums] sums of chunks, [n_chunks][8 * kTiles] factors,
    // [kTiles][kSums] sums so far
    extern __shared__ __align__(128) uint8_t smem[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32, g = lane >> 2, t = lane & 3;
    const int n_stages = (p.n_k_tiles + S::kStageKTiles - 1) / S::kStageKTiles;
    const int n_tiles = (p.n_row_tiles + S::kRowTiles - 1) / S::kRowTiles;
    const int chunk = chunk_columns(p.k), n_chunks = (p.k + chunk - 1) / chunk;
    const int chunk_stages = chunk / (S::kStageKTiles * Q::kTileK), n_rounds = (n_chunks + n_warps - 1) / n_warps;
    const uint8_t* ring = smem + warp * (S::kDepth * S::kSlotBytes);
    float* partial = reinterpret_cast<float*>(smem + p.ring_bytes);
    float* factors = partial + 2 * n_warps * S::kSums;
    float* so_far = factors + n_chunks * 8 * kTiles;

    pdl_launch_dependents();
    Loader<Q, kTiles> loader{p,
                             {},
                             smem_address(ring),
                             lane,
                             warp,
                             n_warps,
                             n_stages,
                             chunk_stages,
                             n_tiles,
                             static_cast<int>(blockIdx.x),
                             warp * chunk_stages};
    loader.find_row_tiles();
#pragma unroll
    for (int i = 0; i < S::kDepth - 1; ++i) loader.issue();
    pdl_wait();

    for (int i = threadIdx.x; i < 8 * kTiles * n_chunks; i += blockDim.x) {
        const int r = min(i % (8 * kTiles), p.n_rows - 1), c = i / (8 * kTiles);
        const uint8_t* row = p.rows + static_cast<int64_t>(r) * p.x_bytes;
        factors[i] = reinterpret_cast<const float*>(row + converted_fragment_bytes(p.k))[c];
    }
    // Block b of row 8 * tile + g is at x + 8 * tile * x_bytes + 64 * b. Rows past n_rows hold anything: they touch no
    // other column and are dropped.
    const uint8_t* const x = p.rows + g * p.x_bytes + t * 16;

    int slot = 0, parity = 0;
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        float inverse[S::kRowTiles][2];
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) {
            const int row_tile = min(tile * S::kRowTiles + i, p.n_row_tiles - 1);
            const ProductMatrix& m = p.m[matrix_of(p, row_tile)];
            row_inverse<Q>(inverse[i], m.w, matrix_bytes<Q>(m, p.n_k_tiles), row_tile - m.row_tile0, g);
        }
        for (int round = 0; round < n_rounds; ++round) {  // a chunk of every warp
            float acc[S::kRowTiles][kTiles][4] = {};
            const int first = (round * n_warps + warp) * chunk_stages, last = min(n_stages, first + chunk_stages);
            for (int stage = first; stage < last; ++stage) {
                cp_async_wait<S::kDepth - 2>();
                // Everyone's part of this stage has landed, everyone has left the slot that is filled next.
                __syncwarp();
                loader.issue();
#pragma unroll kTiles >= 4 ? 1 : S::kStageKTiles
                for (int u = 0; u < S::kStageKTiles; ++u) {
                    const int k_tile = stage * S::kStageKTiles + u;
                    if (k_tile >= p.n_k_tiles) break;
#pragma unroll 1
                    for (int sub = 0; sub < Q::kSubs; ++sub) {
#pragma unroll
                        for (int b = 0; b < 2; ++b) {
                            keep_loads_here();  // of both blocks they would be too many
                            uint32_t a[S::kRowTiles][8];
#pragma unroll
                            for (int i = 0; i < S::kRowTiles; ++i)
                                f16_fragments<Q>(
                                    a[i], ring + slot * S::kSlotBytes + i * S::kStageBytes + u * Q::kPackedTileBytes,
                                    sub, b, lane, inverse[i]);
                            const uint8_t* from = x + (k_tile * (Q::kTileK / 32) + 2 * sub + b) * 64;
#pragma unroll
                            for (int x_tile = 0; x_tile < kTiles; ++x_tile) {
                                const uint4 v = *reinterpret_cast<const uint4*>(from + 8 * x_tile * p.x_bytes);
#pragma unroll
                                for (int i = 0; i < S::kRowTiles; ++i) {
                                    mma_f16(acc[i][x_tile], a[i], v.x, v.y);
                                    mma_f16(acc[i][x_tile], a[i] + 4, v.z, v.w);
                                }
                            }
                        }
                    }
                }
                slot = slot + 1 == S::kDepth ? 0 : slot + 1;
            }

            // partial[warp][row tile][output of it][row of x], two sets in turn: one barrier a round suffices.
            const int n_here_chunks = min(n_warps, n_chunks - round * n_warps);
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
                    const ProductMatrix& m = p.m[matrix_of(p, row_tile)];
                    const int o = (row_tile - m.row_tile0) * 16 + in_tile % 16;
                    if (o >= m.n_out) continue;
                    float* kept = so_far + x_tile * S::kSums + i;
                    float sum = round ? *kept : 0.0f;
                    for (int w = 0; w < n_here_chunks; ++w)
                        sum = __fmaf_rn(set[w * S::kSums + in_tile * 8 + n],
                                        factors[(round * n_warps + w) * 8 * kTiles + 8 * x_tile + n], sum);
                    if (round + 1 < n_rounds) {
                        *kept = sum;
                        continue;
                    }
                    const float v = __fmaf_rn(sum, weight_unit<Q>(m.w, matrix_bytes<Q>(m, p.n_k_tiles), o),
                                              m.bias != nullptr ? m.bias[o] : 0.0f);
                    float* to = m.out + (8 * x_tile + n) * m.out_stride + o;
                    *to = p.mode == PRODUCT_ADD ? __fadd_rn(*to, v) : v;
                }
                parity ^= 1;
            }
        }
    }
    cp_async_wait<0>();
}

// Blocks per multiprocessor of the 8-tile kernels: asked for 1, the compiler spends all registers on scheduling, asked
// for none (0) it saves them. Tried one by one: the types that would spill with the one get the other.
template <class Q>
constexpr int kBlocks8 = 1;

#define DEFINE_TILES(Type, name, tiles, blocks)                           \
    extern "C" __global__ void __launch_bounds__(256, blocks)             \
        matvec_##name##_##tiles(const __grid_constant__ MatvecParams p) { \
        matvec<Type, tiles>(p);                                           \
    }
#define DEFINE(Type, name)         \
    DEFINE_TILES(Type, name, 2, 2) \
    DEFINE_TILES(Type, name, 4, 1) \
    DEFINE_TILES(Type, name, 8, kBlocks8<Type>)
FOR_EACH_TYPE(DEFINE)
