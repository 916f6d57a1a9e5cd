// Decode: out[r, o] (+)= sum_k h[r, k] W[o, k] (+ bias[o]) for 1 to 8 rows r, quantized W, float32 results; or of two
// such products act(first) * second.
//
// decode_<type>_<variant>(DecodeParams). Variants 128, 256: K is cut into chunks of as many columns (chunk_columns), at
// most one for each warp; `long`: any number of chunks. A warp has its chunk of x in registers (128, 256) or reads it
// from shared memory (256e, and one row of `long`) or L1. With an `e` weights are decoded before the wait for the
// kernel before: those of the first two row tiles of every warp (128e; of some types the first), or of the only one
// (256e).
//
// decode_<type>_<type>_<variant>(DecodePairParams): products of one input with matrices of two types, as of q and k
// with v: the first blocks are those of one launch, the rest those of another.
//
// One row of float32 x is converted here, with the RMS norm before it, by each warp for its own chunk; several rows
// come converted (convert.cu). The bits are the same (common/activations.cuh), as they are in all products
// (common/mma_tile.cuh).
//
// A block has neighbouring row tiles of 16 outputs; with PRODUCT_GLU those of both matrices in turn. Each warp streams
// its chunks of its group's row tiles through a ring of its own in shared memory, filled before the wait, and
// multiplies on the tensor cores; a unit is what one slot holds. Sums of chunks meet in shared memory, once for every
// `batch` row tiles, and are added in order of the chunk.
//
// The code runs about once a launch, and what is on the way from the wait to the last store costs its instructions'
// latency from memory, not their execution: it is kept short, and everything that can be known before is.
//
// Bytes: each weight once from memory; x (4 k bytes, or 2 k a row) once per block from L2.
#include "common/activations.cuh"
#include "common/glu.cuh"
#include "common/decode_unit.cuh"
#include "params/matmul_params.h"

constexpr int kWarpX = 512 + 1024;  // shared memory of a warp's converted chunk and its norm weights

// Block `block` of those that a matrix has.
template <class Q, class S>
DEVICE void decode(const DecodeParams& p, int block) {
    constexpr bool kRowsInSmem = S::kBlocks == 8;
    // rings, x, [2][batch][n_chunks] sums of chunks, [n_chunks][8] factors, [2 * n_pieces] sums of squares, barriers
    extern __shared__ __align__(128) uint8_t smem[];
    pdl_launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    int chunk0 = warp, group = 0;
    while (chunk0 >= p.n_warps) chunk0 -= p.n_warps, ++group;
    const int chunk = S::kBlocks ? 32 * S::kBlocks : chunk_columns(p.k), n_chunks = p.n_chunks;
    const int chunk_tiles = chunk / Q::kTileK;
    const int pairs = p.mode == PRODUCT_GLU;  // tiles of two matrices in turn
    const int first_tile = block * p.block_tiles + min(block, p.more_tiles);
    const int n_tiles = (p.block_tiles + (block < p.more_tiles)) << pairs;
    const uint32_t barriers = smem_address(smem) + p.barriers + 8 * warp * p.depth;
    const uint8_t* const ring = smem + warp * p.depth * S::kUnitBytes;

    // The units of this warp in the order in which it multiplies them, from the next to be copied on, which is in the
    // chunk (`long`: the row tile) at `src`.
    int in_tile = group, in_chunk = chunk0, in_unit = S::kBlocks ? 0 : chunk0 * chunk_tiles;
    const auto source = [&](int tile) {
        return p.m[tile & pairs].w + static_cast<int64_t>(first_tile + (tile >> pairs)) * p.tile_bytes +
               static_cast<int64_t>(S::kBlocks ? chunk0 * chunk_tiles : 0) * Q::kPackedTileBytes;
    };
    const uint8_t* src = source(group);
    const int src_step = p.tile_bytes * (p.n_groups >> pairs);
    const auto issue = [&](int slot) {  // starts the copy of the next unit into `slot`; nothing after the last
        if (in_tile >= n_tiles) return;
        const int n = S::kUnitTiles == 1
                          ? 1
                          : min(S::kUnitTiles, p.n_k_tiles - in_unit - (S::kBlocks ? chunk0 * chunk_tiles : 0));
        copy_to_smem(barriers + 8 * slot, smem_address(ring) + slot * S::kUnitBytes,
                     src + in_unit * Q::kPackedTileBytes, n * Q::kPackedTileBytes, lane);
        if constexpr (S::kBlocks == 0) {
            in_unit += S::kUnitTiles;
            if (in_unit < min(p.n_k_tiles, (in_chunk + 1) * chunk_tiles)) return;
            in_chunk += p.n_warps;
            if (in_chunk >= n_chunks) in_chunk = chunk0, in_tile += p.n_groups, src = source(in_tile);
            in_unit = in_chunk * chunk_tiles;
            return;
        }
        if constexpr (S::kChunkUnits > 1) {
            in_unit += S::kUnitTiles;
            if (in_unit < min(chunk_tiles, p.n_k_tiles - chunk0 * chunk_tiles)) return;
            in_unit = 0;
        }
        in_tile += p.n_groups;
        if (pairs & p.n_groups)  // the next is of the other matrix
            src = source(in_tile);
        else
            src += src_step;
    };
    // Columns of x that this lane converts: of its warp's chunk, one piece or half of one.
    const auto first_column = [&] { return chunk0 * chunk + 32 * g + 4 * t; };
    const int column_end = S::kBlocks == 4 && lane >= 16 ? 0 : p.k;
    uint8_t* const converted = smem + p.ring_bytes + (S::kBlocks ? warp * kWarpX : 0);
    const auto load_norm_weights = [&] {
        if (S::kBlocks > 0 && p.norm_weight != nullptr && first_column() < column_end) {
            const uint32_t to = smem_address(converted + 512) + 32 * lane;
            cp_async_16(to, p.norm_weight + first_column());
            cp_async_16(to + 16, p.norm_weight + first_column() + 16);
        }
        cp_async_commit();
    };
    // Before the matrix's, behind which they would wait; where those are decoded early, there is time behind them.
    if constexpr (!S::kEarly) load_norm_weights();
    if (lane == 0) {
        for (int i = 0; i < p.depth; ++i) copy_barrier_init(barriers + 8 * i);
        copy_barrier_fence();
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < p.depth; ++i) issue(i);

    int slot = 0, parity = 0;
    // Waits for the next unit, calls f(32-column block of it, A fragments) for its blocks, of which n packed tiles
    // exist, and lets the unit after next come into its slot.
    const auto take_unit = [&](const float (&inverse)[2], int n, auto f) {
        copy_wait(barriers + 8 * slot, parity);
        unit_fragments<Q, S>(ring + slot * S::kUnitBytes, n, inverse, lane, f);
        if constexpr (!S::kEarlyOnly) {
            __syncwarp();
            issue(slot);
        }
        if (++slot == p.depth) slot = 0, parity ^= 1;
    };
    const auto load_inverse = [&](float (&inverse)[2], int tile) {
        inverse[0] = inverse[1] = 1.0f;
        if (kRowScaled<Q> && tile < n_tiles)
            row_inverse<Q>(inverse, p.m[tile & pairs].w, p.scales_at, first_tile + (tile >> pairs), g);
    };
    const int own_tiles = S::kBlocks ? p.n_k_tiles - chunk0 * chunk_tiles : 0;  // of the chunk that exist, or more

    [[maybe_unused]] uint32_t early[S::kEarly ? S::kEarlyTiles : 1][S::kEarly ? S::kBlocks : 1][8];
    if constexpr (S::kEarly) {
#pragma unroll
        for (int e = 0; e < S::kEarlyTiles; ++e) {
            const int tile = group + e * p.n_groups;
            float inverse[2];
            load_inverse(inverse, tile);
#pragma unroll
            for (int u = 0; u < S::kChunkUnits; ++u) {
                const int n = tile < n_tiles ? own_tiles - u * S::kUnitTiles : 0;
                if (n < S::kUnitTiles) {  // the chunk ends here
#pragma unroll
                    for (int i = 0; i < S::kUnitBlocks; ++i)
#pragma unroll
                        for (int j = 0; j < 8; ++j) early[e][u * S::kUnitBlocks + i][j] = 0;
                }
                if (n > 0)
                    take_unit(inverse, n, [&](int b, const uint32_t (&a)[8]) {
#pragma unroll
                        for (int j = 0; j < 8; ++j) early[e][u * S::kUnitBlocks + b][j] = a[j];
                    });
            }
        }
#pragma unroll
        for (int e = 0; e < S::kEarlyTiles; ++e)  // now, not where they are used
#pragma unroll
            for (int i = 0; i < S::kBlocks; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) asm volatile("" : "+r"(early[e][i][j]));
    }

    if constexpr (S::kEarly) load_norm_weights();
    const bool has_norm = p.norm_weight != nullptr, one_row = p.n_rows == 1;
    float* const factors = reinterpret_cast<float*>(smem + p.factors);
    float* const squares = factors + 8 * n_chunks;
    const float inverse_k = __frcp_rn(static_cast<float>(p.k));

    // Result `item` of a batch: output item % 16 of row tile item / 16, or with several rows of row item / 16 % 8 of
    // row tile item / 128; a row tile is that of both matrices where there are two.
    const int item_shift = one_row ? 4 : 7;
    const auto row_of = [&](int item) { return one_row ? 0 : item >> 4 & 7; };
    const auto output_of = [&](int item, int tile0) {
        return (first_tile + (tile0 >> pairs) + (item >> item_shift)) * kTileRows + (item & 15);
    };
    // What a thread's first result needs beside the sums.
    const int first_output = output_of(threadIdx.x, 0);
    float first_bias[2] = {0.0f, 0.0f}, first_before = 0.0f;
    const bool has_first =
        (threadIdx.x >> item_shift << pairs) < n_tiles && row_of(threadIdx.x) < p.n_rows && first_output < p.n_out;
    if (has_first) {
        if (p.m[0].bias != nullptr) first_bias[0] = p.m[0].bias[first_output];
        if (p.m[1].bias != nullptr) first_bias[1] = p.m[1].bias[first_output];
    }
    cp_async_wait<0>();
    pdl_wait();

    uint4 x[S::kKeepX ? S::kBlocks : 1];
    // Where the lane's part of block b of the chunk is (`long`: of the row), 64 b further on: in shared memory, or in
    // global memory without `converts`.
    const bool converts = p.x != nullptr;
    int x_in_smem = p.ring_bytes + t * 16;
    const uint8_t* x_at = nullptr;
    if (converts) {
        float v[8];
        if constexpr (S::kBlocks > 0) {
            const int column = first_column();
            load_columns(v, p.x, column, column_end);
            if (p.mode == PRODUCT_ADD && has_first) first_before = __ldcg(p.out + first_output);
            if (has_norm) {
                const float square = sum_of_squares(v);
                if (group == 0 && lane % 16 == 0 && lane < 4 * S::kBlocks)
                    squares[chunk0 * (S::kBlocks / 4) + lane / 16] = square;
                if (column < column_end) {
                    const float* const norm_weight = reinterpret_cast<const float*>(converted + 512) + 8 * lane;
#pragma unroll
                    for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], norm_weight[i]);
                }
            }
            const float scale = chunk_scale(largest_bits(v));
            *reinterpret_cast<uint4*>(converted + lane * 16) = pack_columns(v, scale);
            if (group == 0 && lane == 0) factors[8 * chunk0] = scale;
            __syncwarp();
            x_in_smem += warp * kWarpX;
        } else {
            const int n_pieces = (p.k + kPieceColumns - 1) / kPieceColumns;
            if (p.mode == PRODUCT_ADD && has_first) first_before = __ldcg(p.out + first_output);
            for (int c = warp; c < n_chunks; c += p.n_warps * p.n_groups) {
                const int first = c * (chunk / kPieceColumns), last = min(n_pieces, first + chunk / kPieceColumns);
                int largest = 0;
                const auto values = [&](int piece) {
                    float w[8];
                    load_columns(v, p.x, piece_column(piece, lane), p.k);
                    if (!has_norm) return;
                    const float square = sum_of_squares(v);
                    if (lane % 16 == 0) squares[2 * piece + lane / 16] = square;
                    load_columns(w, p.norm_weight, piece_column(piece, lane), p.k);
#pragma unroll
                    for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], w[i]);
                };
                for (int piece = first; piece < last; ++piece) {
                    values(piece);
                    largest = max(largest, largest_bits(v));
                }
                const float scale = chunk_scale(largest);
                for (int piece = first; piece < last; ++piece) {
                    values(piece);
                    *reinterpret_cast<uint4*>(converted + (piece * 32 + lane) * 16) = pack_columns(v, scale);
                }
                if (lane == 0) factors[8 * c] = scale;
            }
            __syncthreads();
        }
    } else {
        // Columns of rows that do not exist are those of the last one and dropped: they touch no other column.
        const int row = min(g, p.n_rows - 1);
        if constexpr (kRowsInSmem) {
            const int n_bytes = converted_fragment_bytes(p.k), x_row = n_bytes + 64;  // no bank conflicts
            const uint32_t to = smem_address(smem) + p.ring_bytes;
            for (int r = 0; r < p.n_rows; ++r)
                for (int at = threadIdx.x * 16; at < n_bytes; at += blockDim.x * 16)
                    cp_async_16(to + r * x_row + at, p.rows + static_cast<int64_t>(r) * p.x_bytes + at);
            cp_async_commit();
            x_in_smem += row * x_row + chunk0 * S::kBlocks * 64;
        } else {
            x_at = p.rows + static_cast<int64_t>(row) * p.x_bytes + t * 16 + chunk0 * S::kBlocks * 64;
        }
        if (p.mode == PRODUCT_ADD && has_first)
            first_before = __ldcg(p.out + row_of(threadIdx.x) * p.out_stride + first_output);
        for (int i = threadIdx.x; i < 8 * n_chunks; i += blockDim.x) {
            const uint8_t* of = p.rows + static_cast<int64_t>(min(i & 7, p.n_rows - 1)) * p.x_bytes;
            factors[i] = __ldcg(reinterpret_cast<const float*>(of + converted_fragment_bytes(p.k)) + (i >> 3));
        }
        if constexpr (kRowsInSmem) {
            cp_async_wait<0>();
            __syncthreads();
        }
    }
    const auto x_of = [&](int block) {
        if (kRowsInSmem || converts) return *reinterpret_cast<const uint4*>(smem + x_in_smem + block * 64);
        return *reinterpret_cast<const uint4*>(x_at + block * 64);
    };
#pragma unroll
    for (int b = 0; b < (S::kKeepX ? S::kBlocks : 0); ++b) x[b] = x_of(b);

    const int chunk_floats = one_row ? kTileRows : 8 * S::kPartialRow, tile_floats = n_chunks * chunk_floats;
    // Where the sums of this batch are: two sets take turns, so that one barrier a batch suffices.
    int set_at = p.ring_bytes + p.x_smem;
    const auto set = [&] { return reinterpret_cast<float*>(smem + set_at); };
    const auto store_sums = [&](const float (&acc)[4], int tile, int c) {
        float* to = set() + tile * tile_floats + c * chunk_floats;
        if (one_row) {
            if (t == 0) to[g] = acc[0], to[g + 8] = acc[2];
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) to[(2 * t + (i & 1)) * S::kPartialRow + g + 8 * (i >> 1)] = acc[i];
    };
    const auto multiply = [&](float (&acc)[4], const uint32_t (&a)[8], const uint4& v) {
        mma_f16(acc, a, v.x, v.y);
        mma_f16(acc, a + 4, v.z, v.w);
    };

#pragma unroll 1
    for (int tile0 = 0; tile0 < n_tiles; tile0 += p.batch) {
        const int n_here = S::kEarlyOnly ? n_tiles : min(p.batch, n_tiles - tile0);
        int tile = tile0 + group;
        if constexpr (S::kEarly) {
            if (tile0 == 0) {
#pragma unroll
                for (int e = 0; e < S::kEarlyTiles; ++e, tile += p.n_groups) {
                    if (tile >= n_here) break;
                    float acc[4] = {};
#pragma unroll
                    for (int b = 0; b < S::kBlocks; ++b) {
                        if constexpr (S::kKeepX) {
                            multiply(acc, early[e][b], x[b]);
                        } else {
                            if (b % 2 == 0) keep_loads_here();  // x of all blocks would take too many registers
                            multiply(acc, early[e][b], x_of(b));
                        }
                    }
                    store_sums(acc, tile, chunk0);
                }
            }
        }
        if constexpr (!S::kEarlyOnly) {
            float inverse[2];
            load_inverse(inverse, tile);
#pragma unroll 1
            for (; tile < tile0 + n_here; tile += p.n_groups) {
                float next_inverse[2];
                load_inverse(next_inverse, tile + p.n_groups);
                if constexpr (S::kBlocks > 0) {
                    float acc[4] = {};
#pragma unroll
                    for (int u = 0; u < S::kChunkUnits; ++u) {
                        const int n = own_tiles - u * S::kUnitTiles;
                        if (n <= 0) break;
                        take_unit(inverse, n, [&](int b, const uint32_t (&a)[8]) {
                            const int block = u * S::kUnitBlocks + b;
                            multiply(acc, a, S::kKeepX ? x[S::kKeepX ? block : 0] : x_of(block));
                        });
                    }
                    store_sums(acc, tile - tile0, chunk0);
                } else {
#pragma unroll 1
                    for (int c = chunk0; c < n_chunks; c += p.n_warps) {
                        float acc[4] = {};
                        const int end = min(p.n_k_tiles, (c + 1) * chunk_tiles);
#pragma unroll 1
                        for (int k_tile = c * chunk_tiles; k_tile < end; k_tile += S::kUnitTiles)
                            take_unit(inverse, p.n_k_tiles - k_tile, [&](int b, const uint32_t (&a)[8]) {
                                multiply(acc, a, x_of(k_tile * S::kTileBlocks + b));
                            });
                        store_sums(acc, tile - tile0, c);
                    }
                }
                inverse[0] = next_inverse[0], inverse[1] = next_inverse[1];
            }
        }
        __syncthreads();

        float root = 1.0f;
        if (has_norm && p.x != nullptr) root = norm_factor(row_sum(squares, p.k), inverse_k, p.eps);
#pragma unroll 1
        for (int item = threadIdx.x; (item >> item_shift << pairs) < n_here; item += blockDim.x) {
            const int row = row_of(item), o = output_of(item, tile0);
            if (row >= p.n_rows || o >= p.n_out) continue;
            const float* from =
                set() + (item >> item_shift << pairs) * tile_floats + row * S::kPartialRow + (item & 15);
            const bool is_first = tile0 == 0 && item == static_cast<int>(threadIdx.x);
            float v[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (i > pairs) break;
                float sum = 0.0f;
                constexpr int kGroup = S::kBlocks == 8 ? 5 : 4;  // whose loads are on their way at once
#pragma unroll 1
                for (int c0 = 0; c0 < n_chunks; c0 += kGroup) {
                    float part[kGroup], factor[kGroup];
#pragma unroll
                    for (int c = 0; c < kGroup; ++c) {
                        const int at = min(c0 + c, n_chunks - 1);
                        part[c] = from[i * tile_floats + at * chunk_floats], factor[c] = factors[8 * at + row];
                    }
#pragma unroll
                    for (int c = 0; c < kGroup; ++c)
                        sum = c0 + c < n_chunks ? __fmaf_rn(part[c], __fmul_rn(factor[c], root), sum) : sum;
                }
                float bias = first_bias[i];
                if (!is_first) bias = p.m[i].bias != nullptr ? p.m[i].bias[o] : 0.0f;
                v[i] = __fmaf_rn(sum, weight_unit<Q>(p.m[i].w, p.scales_at, o), bias);
            }
            float* const to = p.out + row * p.out_stride + o;
            if (pairs)
                *to = glu_value(p.glu, v[0], v[1]);
            else
                *to = p.mode == PRODUCT_ADD ? __fadd_rn(is_first ? first_before : __ldcg(to), v[0]) : v[0];
        }
        if (S::kEarlyOnly) break;  // there is one batch
        set_at = set_at == p.ring_bytes + p.x_smem ? set_at + 4 * p.batch * tile_floats : p.ring_bytes + p.x_smem;
    }
}

// Row tiles that 128e decodes early: what registers there are for.
template <class Q>
constexpr int kEarlyTiles = Q::kHasMin || Q::kLowBits == 8 || kRowScaled<Q> ? 1 : 2;

#define DEFINE_VARIANT(Type, name, blocks, early, suffix)                        \
    extern "C" __global__ void __launch_bounds__(most_threads(blocks, early), 1) \
        decode_##name##_##suffix(const __grid_constant__ DecodeParams p) {       \
        decode<Type, DecodeShape<Type, blocks, early>>(p, blockIdx.x);           \
    }
#define DEFINE_SMALL(Type, name)          \
    DEFINE_VARIANT(Type, name, 4, 0, 128) \
    DEFINE_VARIANT(Type, name, 8, 0, 256) \
    DEFINE_VARIANT(Type, name, 0, 0, long)
#define DEFINE_SMALL_EARLY(Type, name)                     \
    DEFINE_SMALL(Type, name)                               \
    DEFINE_VARIANT(Type, name, 4, kEarlyTiles<Type>, 128e) \
    DEFINE_VARIANT(Type, name, 8, 1, 256e)
#define DEFINE_K(Type, name)               \
    DEFINE_VARIANT(Type, name, 8, 0, 256)  \
    DEFINE_VARIANT(Type, name, 0, 0, long) \
    DEFINE_VARIANT(Type, name, 8, 1, 256e)
DENSE_TYPES(DEFINE_SMALL)
Q4_0_TYPES(DEFINE_SMALL_EARLY)
Q5_0_TYPES(DEFINE_SMALL_EARLY)
Q8_0_TYPES(DEFINE_SMALL_EARLY)
MXFP4_TYPES(DEFINE_SMALL_EARLY)
Q2_K_TYPES(DEFINE_K)
Q3_K_TYPES(DEFINE_K)
Q4_K_TYPES(DEFINE_K)
Q6_K_TYPES(DEFINE_K)

// Pairs of types that files mix in q, k and v, the second where more bits are given to v.
template <class A, class SA, class B, class SB>
DEVICE void decode_pair(const DecodePairParams& p) {
    const int block = blockIdx.x;
    if (block < p.n_first_blocks)
        decode<A, SA>(p.p[0], block);
    else
        decode<B, SB>(p.p[1], block - p.n_first_blocks);
}
#define DEFINE_PAIR(A, a, B, b, blocks, early_a, early_b, suffix)                               \
    extern "C" __global__ void __launch_bounds__(most_threads(blocks, early_a), 1)              \
        decode_##a##_##b##_##suffix(const __grid_constant__ DecodePairParams p) {               \
        decode_pair<A, DecodeShape<A, blocks, early_a>, B, DecodeShape<B, blocks, early_b>>(p); \
    }
DEFINE_PAIR(Q5_0, q5_0, Q8_0, q8_0, 4, 1, 1, 128e)
DEFINE_PAIR(Q5_0, q5_0, Q8_0, q8_0, 8, 1, 1, 256e)
DEFINE_PAIR(Q4_K, q4_k, Q6_K, q6_k, 8, 1, 1, 256e)
DEFINE_PAIR(Q4_K, q4_k, Q6_K, q6_k, 8, 0, 0, 256)
