// Decode: out[r, o] (+)= sum_k h[r, k] W[o, k] (+ bias[o]) for 1 to 8 rows r, quantized W, float32 results; or of two
// such products act(first) * second.
//
// decode_<type>_<variant>(DecodeParams). Variants 128, 256: K is cut into chunks of as many columns (chunk_columns), at
// most one for each warp; `long`: any number of chunks. A warp has its chunk of x in registers (128, 256) or reads it
// from shared memory (256e, and one row of `long`) or L1. With an `e` weights are decoded before the wait for the
// kernel before: those of a warp's first n_staged row tiles into shared memory, of the next two (128e; of some types,
// and in 256e, the next) into registers. 256e has no others. 128e1 and 256e1 are the same for one row that comes as
// float32, without other row tiles and with at most one result for a thread.
//
// decode_<type>_<type>_<variant>(DecodePairParams): products of one input with matrices of two types, as of q and k
// with v: the first blocks are those of one launch, the rest those of another.
//
// One row of float32 x is converted here, with the RMS norm before it, by each warp for its own chunk; several rows,
// and all rows of an `e`, come converted (convert.cu). The bits are the same (common/activations.cuh), as they are in
// all products (common/mma_tile.cuh).
//
// A block has neighbouring row tiles of 16 outputs; with PRODUCT_GLU those of both matrices in turn. Each warp streams
// its chunks of its group's row tiles through a ring of its own in shared memory, filled before the wait, and
// multiplies on the tensor cores; a unit is what one slot holds. Sums of chunks meet in shared memory, once for every
// `batch` row tiles, and are added in order of the chunk.
//
// Of a small launch what counts is how many instructions follow one another between the wait and the last store: a
// multiprocessor has a few warps then, and each instruction takes some five cycles. So they are few, everything that
// can be known before is, shared memory is addressed by numbers that need no finding out, and what a launch of one row
// needs no choice for (`e1`) is chosen by the compiler.
//
// Bytes: each weight once from memory; x (4 k bytes, or 2 k a row) once per block from L2.
#include "common/activations.cuh"
#include "common/glu.cuh"
#include "common/decode_unit.cuh"
#include "matmul_shapes.cuh"
#include "params/matmul_params.h"

// `sum_of_chunks` of one row whose chunks are followed by sums of -0 and factors of 0 up to a multiple of four: those
// change nothing, and no chunk is asked whether it exists. kShort: there are at most kMost.
template <int kMost, bool kShort>
DEVICE float sum_of_padded_chunks(uint32_t parts, uint32_t factors, float root, int n) {
    float sum = 0.0f;
#pragma unroll 1
    for (int c0 = 0; c0 < n; c0 += kMost, parts += 4 * kMost * kTileRows, factors += 4 * kMost) {
        float part[kMost];
        float4 factor[kMost / 4];
#pragma unroll
        for (int i = 0; i < kMost / 4; ++i) {
            if (c0 + 4 * i >= n) continue;
            factor[i] = load_shared_float4(factors + 16 * i);
#pragma unroll
            for (int c = 4 * i; c < 4 * i + 4; ++c) part[c] = load_shared(parts + 4 * c * kTileRows);
        }
#pragma unroll
        for (int i = 0; i < kMost / 4; ++i) {
            if (c0 + 4 * i >= n) continue;
            sum = __fmaf_rn(part[4 * i], __fmul_rn(factor[i].x, root), sum);
            sum = __fmaf_rn(part[4 * i + 1], __fmul_rn(factor[i].y, root), sum);
            sum = __fmaf_rn(part[4 * i + 2], __fmul_rn(factor[i].z, root), sum);
            sum = __fmaf_rn(part[4 * i + 3], __fmul_rn(factor[i].w, root), sum);
        }
        if (kShort) break;
    }
    return sum;
}

// `row_sum` of units in shared memory, which zeros follow up to a multiple of eight; kShort: there are no more.
template <bool kShort>
DEVICE float row_sum(uint32_t units, int n) {
    float sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < n; first += 8 * kUnitColumns, units += 32) {
        const float4 a = load_shared_float4(units), b = load_shared_float4(units + 16);
        const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = __fadd_rn(sum, v[i]);
        if (kShort) break;
    }
    return sum;
}

// Block `block` of those that a matrix has.
template <class Q, class S>
DEVICE void decode(const DecodeParams& p, int block) {
    constexpr bool kRowsInSmem = S::kEarlyOnly;
    // rings, x, [1 or 2][batch][n_chunks] sums of chunks, [n_chunks][8] factors, sums of squares, staged fragments,
    // barriers
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
    const uint32_t smem_at = smem_address(smem);
    const uint32_t barriers = smem_at + p.barriers + 8 * warp * p.depth;
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
        copy_to_smem(barriers + 8 * slot, smem_at + (warp * p.depth + slot) * S::kUnitBytes,
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
    const uint32_t x_smem_at = smem_at + p.ring_bytes + (S::kBlocks ? warp * S::kWarpX : 0);
    const uint32_t own_at = x_smem_at + 16 * lane;  // where they go; behind them the norm's weights for them
    const auto load_norm_weights = [&] {
        if (S::kBlocks > 0 && p.norm_weight != nullptr) {  // zeros where there are no columns
            const int column = first_column(), n_bytes = column < column_end ? 16 : 0;
            const float* const from = p.norm_weight + (n_bytes ? column : 0);
            cp_async_16_zfill(own_at + 512, from, n_bytes);
            cp_async_16_zfill(own_at + 1024, from + 16, n_bytes);
        }
        cp_async_commit();
    };
    // Before the matrix's, behind which they would wait.
    if constexpr (!S::kEarly) load_norm_weights();
    if (lane == 0) {
#pragma unroll 1
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
        __syncwarp();
        issue(slot);
        if (++slot == p.depth) slot = 0, parity ^= 1;
    };
    const auto load_inverse = [&](float (&inverse)[2], int tile) {
        inverse[0] = inverse[1] = 1.0f;
        if (kRowScaled<Q> && tile < n_tiles)
            row_inverse<Q>(inverse, p.m[tile & pairs].w, p.scales_at, first_tile + (tile >> pairs), g);
    };
    const int own_tiles = S::kBlocks ? p.n_k_tiles - chunk0 * chunk_tiles : 0;  // of the chunk that exist, or more

    // Of the weights that are decoded before the wait those of the first row tiles go to shared memory, [row tile]
    // [block][half][lane] of 16 bytes.
    const uint32_t staged_at = smem_at + p.staged + warp * p.n_staged * S::kBlocks * 1024 + 16 * lane;
    if constexpr (S::kEarly) {
#pragma unroll 1
        for (int e = 0; e < p.n_staged; ++e) {
            const int tile = group + e * p.n_groups;
            if (tile >= n_tiles) break;
            const uint32_t to = staged_at + e * S::kBlocks * 1024;
            float inverse[2];
            load_inverse(inverse, tile);
#pragma unroll
            for (int u = 0; u < S::kChunkUnits; ++u) {
                const int n = own_tiles - u * S::kUnitTiles;
                for (int b = max(0, n) * S::kTileBlocks; b < S::kUnitBlocks; ++b)  // the chunk ends here
                    for (int j = 0; j < 2; ++j) store_shared(to + (2 * (u * S::kUnitBlocks + b) + j) * 512, uint4{});
                if (n > 0)
                    take_unit(inverse, n, [&](int b, const uint32_t (&a)[8]) {
#pragma unroll
                        for (int j = 0; j < 2; ++j)
                            store_shared(to + (2 * (u * S::kUnitBlocks + b) + j) * 512,
                                         make_uint4(a[4 * j], a[4 * j + 1], a[4 * j + 2], a[4 * j + 3]));
                    });
            }
        }
    }

    [[maybe_unused]] uint32_t early[S::kEarly ? S::kEarlyTiles : 1][S::kEarly ? S::kBlocks : 1][8];
    if constexpr (S::kEarly) {
#pragma unroll
        for (int e = 0; e < S::kEarlyTiles; ++e) {
            const int tile = group + (p.n_staged + e) * p.n_groups;
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

    const bool has_norm = p.norm_weight != nullptr, converts = S::kOneRow || (!S::kEarly && p.x != nullptr);
    const bool one_row = S::kOneRow || (!S::kEarly && p.n_rows == 1);
    const uint32_t factors_at = smem_at + p.factors, squares_at = factors_at + 32 * n_chunks;

    // Sums of a batch in shared memory, [row tile][chunk][output], with several rows [row tile][chunk][8][kPartialRow]:
    // where there is more than one batch two sets of them take turns, so that one barrier a batch suffices.
    const int chunk_bytes = 4 * (one_row ? kTileRows : 8 * S::kPartialRow);
    const int n_padded = one_row ? (n_chunks + 3) & ~3 : n_chunks, tile_bytes = n_padded * chunk_bytes;
    const uint32_t sets_at = smem_at + p.ring_bytes + p.x_smem;
    int set = 0;  // where this batch's begins, from there
    const uint32_t lane_sums = sets_at + (S::kBlocks ? chunk0 * chunk_bytes : 0) +
                               4 * (one_row ? g : 2 * t * S::kPartialRow + g);  // the lane's of row tile 0 of set 0
    if (one_row) {  // what stands for chunks and for units of columns that do not exist
        const int n_pads = n_padded - n_chunks;
        const int n_tiles_padded = S::kOneRow ? n_tiles : 2 * p.batch;
        for (int i = threadIdx.x; i < n_tiles_padded * n_pads * kTileRows; i += blockDim.x) {
            const int pad = i / kTileRows, tile = pad / n_pads;
            store_shared(
                sets_at + tile * tile_bytes + (n_chunks + pad - tile * n_pads) * chunk_bytes + 4 * (i % kTileRows),
                -0.0f);
        }
        const int n_units = S::kBlocks ? n_chunks * (S::kBlocks / 4) : 2 * ((p.k + kPieceColumns - 1) / kPieceColumns);
        if (threadIdx.x < n_pads) store_shared(factors_at + 4 * (n_chunks + threadIdx.x), 0.0f);
        if (threadIdx.x < (-n_units & 7)) store_shared(squares_at + 4 * (n_units + threadIdx.x), 0.0f);
    }
    // Result `item` of a batch: of one row output item % 16 of tile item / 16, those of the second matrix 16 lanes
    // above those of the first; of several rows output item % 16 of row item / 16 % 8 of row tile item / 128, of both
    // matrices.
    const auto row_of = [&](int item) { return one_row ? 0 : item >> 4 & 7; };
    const auto tile_of = [&](int item) { return one_row ? item >> 4 : item >> 7 << pairs; };
    const auto output_of = [&](int item, int tile0) {
        return (first_tile + ((tile0 + tile_of(item)) >> pairs)) * kTileRows + (item & 15);
    };
    const auto bias_of = [&](int matrix, int output) {
        return p.m[matrix].bias != nullptr ? p.m[matrix].bias[output] : 0.0f;
    };
    // What a thread's first result needs beside the sums.
    const int first_output = output_of(threadIdx.x, 0);
    float first_bias[2] = {0.0f, 0.0f}, first_before = 0.0f;
    const bool has_first = tile_of(threadIdx.x) < n_tiles && row_of(threadIdx.x) < p.n_rows && first_output < p.n_out;
    if (has_first) {
        first_bias[0] = bias_of(one_row ? tile_of(threadIdx.x) & pairs : 0, first_output);
        if (pairs && !one_row) first_bias[1] = bias_of(1, first_output);
    }
    const float* const before_at =
        p.mode == PRODUCT_ADD && has_first ? p.out + row_of(threadIdx.x) * p.out_stride + first_output : nullptr;
    const float* const x_from = first_column() < column_end ? p.x + first_column() : nullptr;
    const auto multiply = [&](float (&acc)[4], const uint32_t (&a)[8], const uint4& v) {
        mma_f16(acc, a, v.x, v.y);
        mma_f16(acc, a + 4, v.z, v.w);
    };

    if constexpr (S::kOneRow) {
        const int tile = tile_of(threadIdx.x);
        const float unit = has_first ? weight_unit<Q>(p.m[tile & pairs].w, p.scales_at, first_output) : 0.0f;
        const uint32_t own_sums = sets_at + tile * tile_bytes + 4 * (threadIdx.x & 15);
        float* const to = p.out + first_output;
        float weights[8];
        load_columns_at_once(weights, has_norm && x_from != nullptr ? p.norm_weight + first_column() : nullptr);
        pdl_wait();

        float v[8];
        load_columns_at_once(v, x_from);
        if (before_at != nullptr) first_before = __ldcg(before_at);
        float square = lane_squares(v);
        if (has_norm) {
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], weights[i]);
        }
        const float scale = chunk_scale(largest_bits(v));
        const uint4 own = pack_columns(v, scale);
        store_shared(own_at, own);
        if (group == 0 && lane == 0) store_shared(factors_at + 4 * chunk0, scale);
        __syncwarp();

        // The products of the row tiles go side by side, since each waits for its own last one; those of row tiles that
        // do not exist are of whatever lies there, and dropped. Of x only the lanes of column 0 count, which have block
        // 0 themselves.
        const uint32_t fragments_at = own_at - 16 * (lane - t);
        const auto products = [&](auto staged) {
            constexpr int kStaged = decltype(staged)::value, kTiles = kStaged + S::kEarlyTiles;
            float acc[kTiles][4] = {};
            uint4 x = own;
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b) {
                const uint4 here = x;
                if (b + 1 < S::kBlocks) x = load_shared_uint4(fragments_at + (b + 1) * 64);
#pragma unroll
                for (int e = 0; e < kTiles; ++e) {
                    if (e >= kStaged) {
                        multiply(acc[e], early[e - kStaged][b], here);
                        continue;
                    }
                    uint32_t a[8];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const uint4 w = load_shared_uint4(staged_at + ((e * S::kBlocks + b) * 2 + j) * 512);
                        a[4 * j] = w.x, a[4 * j + 1] = w.y, a[4 * j + 2] = w.z, a[4 * j + 3] = w.w;
                    }
                    multiply(acc[e], a, here);
                }
                if (b < 4) square = __fadd_rn(square, __shfl_xor_sync(0xffffffffu, square, 1 << b));  // unit_sum
            }
#pragma unroll
            for (int e = 0; e < kTiles; ++e)
                if (t == 0 && group + e * p.n_groups < n_tiles) {
                    const uint32_t at = lane_sums + (group + e * p.n_groups) * tile_bytes;
                    store_shared(at, acc[e][0]), store_shared(at + 32, acc[e][2]);
                }
        };
        if (group < n_tiles) {
            if (p.n_staged == 0) products(std::integral_constant<int, 0>{});
            if (p.n_staged == 1) products(std::integral_constant<int, 1>{});
            if constexpr (S::kMostStaged > 1) {
                if (p.n_staged == 2) products(std::integral_constant<int, 2>{});
                if (p.n_staged == 3) products(std::integral_constant<int, 3>{});
            }
        }
        if (has_norm && group == 0 && lane % 16 == 0 && lane < 4 * S::kBlocks)
            store_shared(squares_at + 4 * (chunk0 * (S::kBlocks / 4) + lane / 16), square);
        __syncthreads();

        if (tile >= n_tiles) return;
        float root = 1.0f;
        if (has_norm) root = norm_factor(row_sum<S::kBlocks == 4>(squares_at, p.k), p.inverse_k, p.eps);
        const float sum = sum_of_padded_chunks<S::kBlocks == 4 ? 8 : 20, true>(own_sums, factors_at, root, n_chunks);
        float result = __fmaf_rn(sum, unit, first_bias[0]);
        if (pairs) {
            result = glu_value(p.glu, result, __shfl_down_sync(0xffffffffu, result, 16));
            if (tile & 1) return;
        }
        if (p.mode == PRODUCT_ADD) result = __fadd_rn(first_before, result);
        if (has_first) *to = result;
    } else {
        cp_async_wait<0>();
        pdl_wait();

        uint4 x[S::kKeepX ? S::kBlocks : 1];
        // Where the lane's part of block b of the chunk is (`long`: of the row), 64 b further on: in shared memory, or
        // in global memory without `converts`.
        uint32_t fragments_at = S::kBlocks ? own_at - 16 * (lane - t) : x_smem_at + 16 * t;
        const uint8_t* x_at = nullptr;
        float square = 0.0f;  // of the columns that this lane converted
        if (converts) {
            if constexpr (S::kBlocks > 0) {
                float v[8];
                load_columns_at_once(v, x_from);
                if (before_at != nullptr) first_before = __ldcg(before_at);
                if (has_norm) {
                    const float4 a = load_shared_float4(own_at + 512), b = load_shared_float4(own_at + 1024);
                    const float weights[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
                    square = lane_squares(v);
#pragma unroll
                    for (int i = 0; i < 8; ++i) v[i] = __fmul_rn(v[i], weights[i]);
                }
                const float scale = chunk_scale(largest_bits(v));
                store_shared(own_at, pack_columns(v, scale));
                if (group == 0 && lane == 0) store_shared(factors_at + 4 * chunk0, scale);
                __syncwarp();
            } else {
                const int n_pieces = (p.k + kPieceColumns - 1) / kPieceColumns;
                if (before_at != nullptr) first_before = __ldcg(before_at);
                for (int c = warp; c < n_chunks; c += p.n_warps * p.n_groups) {
                    const int first = c * (chunk / kPieceColumns), n = min(chunk / kPieceColumns, n_pieces - first);
                    float held[kChunkPieces][8];
                    int largest = 0;
#pragma unroll
                    for (int i = 0; i < kChunkPieces; ++i)
                        if (i < n) load_columns(held[i], p.x, piece_column(first + i, lane), p.k);
#pragma unroll
                    for (int i = 0; i < kChunkPieces; ++i) {
                        if (i >= n) break;
                        if (has_norm) {
                            float w[8];
                            const float sum = sum_of_squares(held[i]);
                            if (lane % 16 == 0) store_shared(squares_at + 4 * (2 * (first + i) + lane / 16), sum);
                            load_columns(w, p.norm_weight, piece_column(first + i, lane), p.k);
#pragma unroll
                            for (int j = 0; j < 8; ++j) held[i][j] = __fmul_rn(held[i][j], w[j]);
                        }
                        largest = max(largest, largest_bits(held[i]));
                    }
                    const float scale = chunk_scale(largest);
#pragma unroll
                    for (int i = 0; i < kChunkPieces; ++i)
                        if (i < n) store_shared(own_at + 512 * (first + i), pack_columns(held[i], scale));
                    if (lane == 0) store_shared(factors_at + 4 * c, scale);
                }
                __syncthreads();
            }
        } else {
            // Columns of rows that do not exist are those of the last one and dropped: they touch no other column.
            const int row = min(g, p.n_rows - 1);
            if constexpr (kRowsInSmem) {
                const int n_bytes = converted_fragment_bytes(p.k), x_row = n_bytes + 64;  // no bank conflicts
                const uint32_t to = smem_at + p.ring_bytes;
                for (int r = 0; r < p.n_rows; ++r)
                    for (int at = threadIdx.x * 16; at < n_bytes; at += blockDim.x * 16)
                        cp_async_16(to + r * x_row + at, p.rows + static_cast<int64_t>(r) * p.x_bytes + at);
                cp_async_commit();
                fragments_at = to + 16 * t + row * x_row + chunk0 * S::kBlocks * 64;
            } else {
                x_at = p.rows + static_cast<int64_t>(row) * p.x_bytes + t * 16 + chunk0 * S::kBlocks * 64;
#pragma unroll
                for (int b = 0; b < (S::kKeepX ? S::kBlocks : 0); ++b)
                    x[b] = *reinterpret_cast<const uint4*>(x_at + b * 64);
            }
            if (before_at != nullptr) first_before = __ldcg(before_at);
            for (int i = threadIdx.x; i < (one_row ? 1 : 8) * n_chunks; i += blockDim.x) {
                const int of_row = one_row ? 0 : min(i & 7, p.n_rows - 1), c = one_row ? i : i >> 3;
                const uint8_t* of = p.rows + static_cast<int64_t>(of_row) * p.x_bytes + converted_fragment_bytes(p.k);
                store_shared(factors_at + 4 * i, __ldcg(reinterpret_cast<const float*>(of) + c));
            }
            if constexpr (kRowsInSmem) {
                cp_async_wait<0>();
                __syncthreads();
            }
        }
        const auto x_of = [&](int block) {
            if (kRowsInSmem || converts) return load_shared_uint4(fragments_at + block * 64);
            return *reinterpret_cast<const uint4*>(x_at + block * 64);
        };
        if (converts) {
#pragma unroll
            for (int b = 0; b < (S::kKeepX ? S::kBlocks : 0); ++b) x[b] = x_of(b);
        }

        const auto store_sums = [&](const float (&acc)[4], int tile, int c) {
            const uint32_t to = lane_sums + set + tile * tile_bytes + (S::kBlocks ? 0 : c * chunk_bytes);
            if (one_row) {
                if (t == 0) store_shared(to, acc[0]), store_shared(to + 32, acc[2]);
                return;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) store_shared(to + 4 * ((i & 1) * S::kPartialRow + 8 * (i >> 1)), acc[i]);
        };
        // Results of a batch of row tiles from its sums.
        constexpr int kMost = S::kEarlyOnly ? 20 : S::kBlocks == 8 ? 4 : 8;  // chunks whose sums are read at once
        const auto finish_one_row = [&](int tile0, int n_here) {
            float root = 1.0f;
            if (has_norm && converts) root = norm_factor(row_sum<S::kBlocks == 4>(squares_at, p.k), p.inverse_k, p.eps);
#pragma unroll 1
            for (int item = threadIdx.x; item < 16 * n_here; item += blockDim.x) {
                const int tile = item >> 4, matrix = tile & pairs, o = output_of(item, tile0);
                const bool is_first = tile0 == 0 && item == static_cast<int>(threadIdx.x);
                bool exists = o < p.n_out;
                const float sum = sum_of_padded_chunks<kMost, false>(
                    sets_at + set + tile * tile_bytes + 4 * (item & 15), factors_at, root, n_chunks);
                const float bias = is_first ? first_bias[0] : exists ? bias_of(matrix, o) : 0.0f;
                float v = __fmaf_rn(sum, weight_unit<Q>(p.m[matrix].w, p.scales_at, o), bias);
                if (pairs) {
                    v = glu_value(p.glu, v, __shfl_down_sync(0xffffffffu, v, 16));
                    exists &= matrix == 0;
                }
                if (!exists) continue;
                if (p.mode == PRODUCT_ADD) v = __fadd_rn(is_first ? first_before : __ldcg(p.out + o), v);
                p.out[o] = v;
            }
        };
        const auto finish_rows = [&](int tile0, int n_here) {
#pragma unroll 1
            for (int item = threadIdx.x; tile_of(item) < n_here; item += blockDim.x) {
                const int row = row_of(item), o = output_of(item, tile0);
                if (row >= p.n_rows || o >= p.n_out) continue;
                const bool is_first = tile0 == 0 && item == static_cast<int>(threadIdx.x);
                uint32_t sums = sets_at + set + tile_of(item) * tile_bytes + 4 * (row * S::kPartialRow + (item & 15));
                float v = 0.0f, gate = 0.0f;
#pragma unroll 1
                for (int i = 0; i <= pairs; ++i, sums += tile_bytes) {
                    const float sum =
                        sum_of_chunks<kMost, 8 * S::kPartialRow, 8>(sums, factors_at + 4 * row, 1.0f, n_chunks);
                    const float bias = is_first ? (i == 0 ? first_bias[0] : first_bias[1]) : bias_of(i, o);
                    gate = v, v = __fmaf_rn(sum, weight_unit<Q>(p.m[i].w, p.scales_at, o), bias);
                }
                float* const to = p.out + row * p.out_stride + o;
                if (pairs)
                    v = glu_value(p.glu, gate, v);
                else if (p.mode == PRODUCT_ADD)
                    v = __fadd_rn(is_first ? first_before : __ldcg(to), v);
                *to = v;
            }
        };
        if constexpr (S::kEarly) {  // they are of the first batch
#pragma unroll
            for (int e = 0; e < S::kEarlyTiles; ++e) {
                const int tile = group + (p.n_staged + e) * p.n_groups;
                if (tile >= n_tiles) break;
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
#pragma unroll 1
            for (int e = 0; e < p.n_staged; ++e) {
                const int tile = group + e * p.n_groups;
                if (tile >= n_tiles) break;
                float acc[4] = {};
#pragma unroll
                for (int b = 0; b < S::kBlocks; ++b) {
                    uint32_t a[8];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const uint4 v = load_shared_uint4(staged_at + ((e * S::kBlocks + b) * 2 + j) * 512);
                        a[4 * j] = v.x, a[4 * j + 1] = v.y, a[4 * j + 2] = v.z, a[4 * j + 3] = v.w;
                    }
                    multiply(acc, a, S::kKeepX ? x[S::kKeepX ? b : 0] : x_of(b));
                }
                store_sums(acc, tile, chunk0);
            }
        }

#pragma unroll 1
        for (int tile0 = 0; tile0 < n_tiles; tile0 += p.batch) {
            const int n_here = S::kEarlyOnly ? n_tiles : min(p.batch, n_tiles - tile0);
            int tile = tile0 + group;
            if (S::kEarly && tile0 == 0) tile += (S::kEarlyTiles + p.n_staged) * p.n_groups;
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
            if (S::kBlocks > 0 && has_norm && converts && tile0 == 0) {  // while the products are on their way
                const float sum = unit_sum(square);
                if (group == 0 && lane % 16 == 0 && lane < 4 * S::kBlocks)
                    store_shared(squares_at + 4 * (chunk0 * (S::kBlocks / 4) + lane / 16), sum);
            }
            __syncthreads();

            if (one_row)
                finish_one_row(tile0, n_here);
            else
                finish_rows(tile0, n_here);
            if (S::kEarlyOnly) break;  // there is one batch
            set = set == 0 ? p.batch * tile_bytes : 0;
        }
    }
}

#define DEFINE_VARIANT(Type, name, suffix, ...)                                \
    extern "C" __global__ void __launch_bounds__(most_threads(__VA_ARGS__), 1) \
        decode_##name##_##suffix(const __grid_constant__ DecodeParams p) {     \
        decode<Type, DecodeShape<Type, __VA_ARGS__>>(p, blockIdx.x);           \
    }
#define DEFINE_SMALL(Type, name)          \
    DEFINE_VARIANT(Type, name, 128, 4, 0) \
    DEFINE_VARIANT(Type, name, 256, 8, 0) \
    DEFINE_VARIANT(Type, name, long, 0, 0)
#define DEFINE_EARLY_256(Type, name)       \
    DEFINE_VARIANT(Type, name, 256e, 8, 1) \
    DEFINE_VARIANT(Type, name, 256e1, 8, 1, true)
#define DEFINE_SMALL_EARLY(Type, name)                            \
    DEFINE_SMALL(Type, name)                                      \
    DEFINE_VARIANT(Type, name, 128e, 4, kEarlyTiles<Type>)        \
    DEFINE_VARIANT(Type, name, 128e1, 4, kEarlyTiles<Type>, true) \
    DEFINE_EARLY_256(Type, name)
#define DEFINE_K(Type, name)               \
    DEFINE_VARIANT(Type, name, 256, 8, 0)  \
    DEFINE_VARIANT(Type, name, long, 0, 0) \
    DEFINE_EARLY_256(Type, name)
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
#define DEFINE_PAIR(A, a, B, b, suffix, ...)                                            \
    extern "C" __global__ void __launch_bounds__(most_threads(__VA_ARGS__), 1)          \
        decode_##a##_##b##_##suffix(const __grid_constant__ DecodePairParams p) {       \
        decode_pair<A, DecodeShape<A, __VA_ARGS__>, B, DecodeShape<B, __VA_ARGS__>>(p); \
    }
DEFINE_PAIR(Q5_0, q5_0, Q8_0, q8_0, 128e, 4, 1)
DEFINE_PAIR(Q5_0, q5_0, Q8_0, q8_0, 128e1, 4, 1, true)
DEFINE_PAIR(Q5_0, q5_0, Q8_0, q8_0, 256e, 8, 1)
DEFINE_PAIR(Q5_0, q5_0, Q8_0, q8_0, 256e1, 8, 1, true)
DEFINE_PAIR(Q4_K, q4_k, Q6_K, q6_k, 256e, 8, 1)
DEFINE_PAIR(Q4_K, q4_k, Q6_K, q6_k, 256e1, 8, 1, true)
DEFINE_PAIR(Q4_K, q4_k, Q6_K, q6_k, 256, 8, 0)
