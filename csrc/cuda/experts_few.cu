// Decode: out[r, s, o] = sum_k x[r(, s), k] W[e, o, k] (+ bias[e, o]) for every slot s of 1 to 8 rows, e = ids[r, s];
// or of two matrices act(first) * second. With PRODUCT_MIX also the sum of a row's slots, each times its gate, added to
// the residual stream: by the block whose results for a row tile come last, in order of the slots.
//
// expert_few_<type>_<variant>(ExpertFewParams); variants as in decode.cu. An item is an expert and its pairs, at most
// one of each row. The row tiles of all items are numbered through and shared out evenly, so that every block streams
// about as many bytes, whatever the experts: how many items there are is known on the device only. A block goes through
// its row tiles item by item, while its warps' rings run on across items. Variants 128 and 256 have the item's rows of
// x in shared memory, and convert rows of float32 on the way there; a warp may have several chunks.
//
// Of two launches in a row the first lets the second begin only once the list is there: a block of the second then
// comes where one of the first ends, and fills its rings while others still multiply.
//
// The numbers are those of all products (common/mma_tile.cuh): a pair's result has the same bits alone and in any
// company.
//
// Bytes: the chosen experts' weights once from memory; the converted rows once per block and item, from L2.
#include "common/activations.cuh"
#include "common/decode_unit.cuh"
#include "common/glu.cuh"
#include "params/experts_params.h"

// The block has stored the results of `n_pairs` pairs for n row tiles from `first` on: it adds up the rows' slots of
// those for which nothing is missing any more.
DEVICE void mix(const ExpertFewParams& p, int first, int n, int n_pairs, bool (&is_last)[EXPERT_FEW_BATCH]) {
    const uint32_t all = p.n_rows * p.n_used;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        is_last[i] = atomic_add_acq_rel(p.arrived + first + i, n_pairs) + n_pairs == all;
        if (is_last[i]) p.arrived[first + i] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < n * p.n_rows * kTileRows; i += blockDim.x) {
        const int tile = i / kTileRows % n, row = i / kTileRows / n, o = (first + tile) * kTileRows + i % kTileRows;
        if (!is_last[tile] || o >= p.n_out) continue;
        const float* const results = p.out + row * p.out_stride + o;
        float* const to = p.sum + row * p.sum_stride + o;
        const float before = __ldcg(to);
        float sum = 0.0f;
#pragma unroll 4
        for (int slot = 0; slot < p.n_used; ++slot)
            sum =
                __fmaf_rn(p.gates[row * p.n_used + slot], __ldcg(results + static_cast<int64_t>(slot) * p.n_out), sum);
        *to = __fadd_rn(before, sum);
    }
}

// The same for one row, by the 16 lanes `lanes` of a warp that have stored the results of a row tile.
DEVICE void mix_one(const ExpertFewParams& p, int row_tile, uint32_t lanes) {
    const int lane = threadIdx.x % 16, o = row_tile * kTileRows + lane;
    __syncwarp(lanes);
    int is_last = 0;
    if (lane == 0) {
        is_last = atomic_add_acq_rel(p.arrived + row_tile, 1) + 1 == static_cast<uint32_t>(p.n_used);
        if (is_last) p.arrived[row_tile] = 0;
    }
    is_last = __shfl_sync(lanes, is_last, threadIdx.x & 16);
    __syncwarp(lanes);
    if (!is_last || o >= p.n_out) return;
    const float before = __ldcg(p.sum + o);
    float sum = 0.0f;
#pragma unroll 4
    for (int slot = 0; slot < p.n_used; ++slot)
        sum = __fmaf_rn(p.gates[slot], __ldcg(p.out + static_cast<int64_t>(slot) * p.n_out + o), sum);
    p.sum[o] = __fadd_rn(before, sum);
}

template <class Q, class S>
DEVICE void expert_few(const ExpertFewParams& p) {
    // rings, x, [2][batch][n_chunks] sums of chunks, [n_chunks][8] factors, barriers
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ int item_pairs[8];
    __shared__ bool is_last[EXPERT_FEW_BATCH];
    if (!p.holds_next) pdl_launch_dependents();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    int chunk0 = warp, group = 0;
    while (chunk0 >= p.n_warps) chunk0 -= p.n_warps, ++group;
    const int chunk = S::kBlocks ? 32 * S::kBlocks : chunk_columns(p.k), n_chunks = p.n_chunks;
    const int chunk_tiles = chunk / Q::kTileK, n_row_tiles = (p.n_out + kTileRows - 1) / kTileRows;
    const int pairs = p.mode == PRODUCT_GLU;  // row tiles of two matrices in turn
    const uint32_t smem_at = smem_address(smem), barriers = smem_at + p.barriers + 8 * warp * p.depth;
    const uint8_t* const ring = smem + warp * p.depth * S::kUnitBytes;
    const uint32_t factors_at = smem_at + p.factors;
    const uint32_t x_smem_at = smem_at + p.ring_bytes;  // rows of an item, of 128 and 256
    const int x_row = converted_fragment_bytes(p.k) + 64, n_block_warps = p.n_warps * p.n_groups;  // no bank conflicts
    if (lane == 0) {
#pragma unroll 1
        for (int i = 0; i < p.depth; ++i) copy_barrier_init(barriers + 8 * i);
        copy_barrier_fence();
    }
    __syncwarp();
    // A job is a row tile of an item; a tile is that of one matrix. The experts of one row are as many as it uses.
    const bool one_row = p.n_rows == 1, mixes_one = one_row && p.mode == PRODUCT_MIX;
    int first_job = 0, n_tiles = 0, item_index = 0;
    const auto share_jobs = [&](int n_items) {
        const int total = n_items * n_row_tiles;
        first_job = static_cast<int>(static_cast<int64_t>(blockIdx.x) * total / gridDim.x);
        n_tiles = (static_cast<int>(static_cast<int64_t>(blockIdx.x + 1) * total / gridDim.x) - first_job) << pairs;
        item_index = first_job / n_row_tiles;
    };
    if (one_row) share_jobs(p.n_used);
    if (!p.has_list) pdl_wait();
    if (p.holds_next) pdl_launch_dependents();

    // One converted row for all pairs is on its way before anything else.
    const bool converts = S::kBlocks > 0 && p.x != nullptr, one_input = one_row && p.x_slot_rows == 0 && !converts;
    if (S::kBlocks > 0 && one_input && !p.has_list) {
        for (int i = threadIdx.x; i < converted_fragment_bytes(p.k) / 16; i += blockDim.x)
            cp_async_16(x_smem_at + 16 * i, p.rows + 16 * i);
        cp_async_commit();
    }
    // The list is read past L1, which may hold lines of the list before: without the wait nothing has dropped them.
    if (!one_row) share_jobs(__ldcg(p.list.n_items));
    if (n_tiles == 0) {
        cp_async_wait<0>();
        if (p.has_list) pdl_wait();
        return;
    }

    // What is read of the list, of row scales and biases is on its way before the weights, behind which it would wait.
    int tile = group;
    int begin = 0, end = min(n_tiles, ((item_index + 1) * n_row_tiles - first_job) << pairs);  // the item's tiles
    int at0 = first_job - item_index * n_row_tiles;                                            // row tile of `begin`
    ExpertItem item = {};
    int pair;                // that lane r has of row r of the item
    uint32_t scale_bits[2];  // of rows g and g + 8 of `tile`
    float first_bias[2], first_unit[2];
    const int item_shift = one_row ? 4 : 7;
    const auto row_of = [&](int i) { return one_row ? 0 : i >> 4 & 7; };
    const auto output_of = [&](int i, int tile0) {
        return (at0 + ((tile0 - begin) >> pairs) + (i >> item_shift)) * kTileRows + (i & 15);
    };
    const auto load_scale_bits = [&](int of_tile) {
        if constexpr (kRowScaled<Q>) {
            const int in = min(of_tile, end - 1);
            const auto* scales =
                reinterpret_cast<const uint32_t*>(p.m[in & pairs].w + item.expert * p.matrix_bytes + p.scales_at) +
                (at0 + ((in - begin) >> pairs)) * kTileRows + g;
            scale_bits[0] = scales[0], scale_bits[1] = scales[8];
        }
    };
    const auto load_result = [&](float (&bias)[2], float (&unit)[2], int o) {  // what output o needs beside its sums
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (m > pairs) break;
            unit[m] = weight_unit<Q>(p.m[m].w + item.expert * p.matrix_bytes, p.scales_at, o);
            bias[m] = p.m[m].bias != nullptr ? p.m[m].bias[static_cast<int64_t>(item.expert) * p.n_out + o] : 0.0f;
        }
    };
    const auto load_item = [&] {
        const int4 v = __ldcg(reinterpret_cast<const int4*>(p.list.items + item_index));
        item = {v.x, v.y, v.z, 0};
        pair = __ldcg(p.list.pairs + (one_row ? item_index : item.first + min(lane, item.n - 1)));
        load_scale_bits(tile);
        load_result(first_bias, first_unit, min(output_of(threadIdx.x, begin), p.n_out - 1));
    };
    load_item();

    // The units of this warp in the order in which it multiplies them, from the next to be copied on.
    int in_tile = group, in_chunk = chunk0, in_unit = chunk0 * chunk_tiles;
    // Of the item that the next unit is of: its place in the list, the first tile behind it.
    int in_item = item_index, in_end = ((item_index + 1) * n_row_tiles - first_job) << pairs;
    const uint8_t* src = nullptr;
    const auto source = [&](int expert) {
        const int row_tile = first_job + (in_tile >> pairs) - in_item * n_row_tiles;
        src = p.m[in_tile & pairs].w + expert * p.matrix_bytes + static_cast<int64_t>(row_tile) * p.tile_bytes;
    };
    // From a row tile to the warp's next one of the same item, where that is of the same matrix.
    const int src_step = pairs & p.n_groups ? 0 : p.tile_bytes * (p.n_groups >> pairs);
    const auto find = [&] {
        if (in_tile < in_end && src_step != 0) {
            src += src_step;
            return;
        }
        if (in_tile >= n_tiles) return;
        while (in_tile >= in_end) ++in_item, in_end += n_row_tiles << pairs;
        source(__ldcg(&p.list.items[in_item].expert));
    };
    if (in_tile < in_end)
        source(item.expert);
    else
        find();
    const auto issue = [&](int slot) {  // starts the copy of the next unit into `slot`; nothing after the last
        if (in_tile >= n_tiles) return;
        const int n = S::kUnitTiles == 1 ? 1 : min(S::kUnitTiles, p.n_k_tiles - in_unit);
        copy_to_smem(barriers + 8 * slot, smem_at + (warp * p.depth + slot) * S::kUnitBytes,
                     src + in_unit * Q::kPackedTileBytes, n * Q::kPackedTileBytes, lane);
        in_unit += S::kUnitTiles;
        if (in_unit < min(p.n_k_tiles, (in_chunk + 1) * chunk_tiles)) return;
        in_chunk += p.n_warps;
        if (in_chunk >= n_chunks) {
            in_chunk = chunk0, in_tile += p.n_groups;
            find();
        }
        in_unit = in_chunk * chunk_tiles;
    };
#pragma unroll 1
    for (int i = 0; i < p.depth; ++i) issue(i);
    if (p.has_list) pdl_wait();

    int slot = 0, parity = 0;
    const auto take_unit = [&](const float (&inverse)[2], int n, auto f) {
        copy_wait(barriers + 8 * slot, parity);
        unit_fragments<Q, S>(ring + slot * S::kUnitBytes, n, inverse, lane, f);
        __syncwarp();
        issue(slot);
        if (++slot == p.depth) slot = 0, parity ^= 1;
    };
    // Where the sums of this batch are: two sets take turns, so that one barrier a batch suffices.
    const int set_bytes = 4 * p.batch * n_chunks * (one_row ? kTileRows : 8 * S::kPartialRow);
    const uint32_t sets_at = smem_at + p.ring_bytes + p.x_smem;
    int set = 0;  // from there

#pragma unroll 1
    for (;;) {  // items
        if (threadIdx.x < 8) item_pairs[threadIdx.x] = pair;
        if (!converts && !one_input) __syncthreads();
        const auto converted = [&](int r) {
            if (one_input) return p.rows;
            const int of = item_pairs[r];
            return p.rows + static_cast<int64_t>(of / p.n_used + of % p.n_used * p.x_slot_rows) * p.x_bytes;
        };
        // Columns of rows that do not exist are those of the last one and dropped: they touch no other column.
        const int last = min(g, item.n - 1);
        if (converts) {
            const int column_end = S::kBlocks == 4 && lane >= 16 ? 0 : p.k;
#pragma unroll 1
            for (int i = warp; i < item.n * n_chunks; i += n_block_warps) {
                float v[8];
                const int r = i / n_chunks, c = i - r * n_chunks, of = __shfl_sync(0xffffffffu, pair, r);
                load_columns(v, p.x + of / p.n_used * p.x_stride + of % p.n_used * p.x_slot_stride,
                             c * chunk + 32 * g + 4 * t, column_end);
                const float scale = chunk_scale(largest_bits(v));
                if (lane < 4 * S::kBlocks)
                    store_shared(x_smem_at + r * x_row + c * S::kBlocks * 64 + lane * 16, pack_columns(v, scale));
                if (lane == 0) store_shared(factors_at + 4 * (one_row ? c : 8 * c + r), scale);
            }
        } else {
            if (S::kBlocks > 0 && (!one_input || p.has_list)) {
                const int n = converted_fragment_bytes(p.k) / 16;
                for (int i = threadIdx.x; i < item.n * n; i += blockDim.x)
                    cp_async_16(x_smem_at + i / n * x_row + i % n * 16, converted(i / n) + i % n * 16);
                cp_async_commit();
            }
            for (int i = threadIdx.x; i < (one_row ? 1 : 8) * n_chunks; i += blockDim.x) {
                const int row = one_row ? 0 : i & 7, c = one_row ? i : i >> 3;
                const uint8_t* const of = converted(min(row, item.n - 1)) + converted_fragment_bytes(p.k);
                store_shared(factors_at + 4 * i, __ldcg(reinterpret_cast<const float*>(of) + c));
            }
            cp_async_wait<0>();
        }
        __syncthreads();
        const uint8_t* const long_x = S::kBlocks ? nullptr : converted(last) + t * 16;
        // The lane's part of 32-column block `block` of the row.
        const auto x_of = [&](int block) {
            if constexpr (S::kBlocks > 0)
                return load_shared_uint4(x_smem_at + last * x_row + t * 16 + block * 64);
            else
                return *reinterpret_cast<const uint4*>(long_x + block * 64);
        };
        // Of few pairs there is room for the sums of more row tiles.
        const int chunk_bytes = 4 * (one_row ? kTileRows : item.n * S::kPartialRow),
                  tile_bytes = n_chunks * chunk_bytes;
        const int batch = one_row ? p.batch : 8 / item.n * p.batch;

#pragma unroll 1
        for (int tile0 = begin; tile0 < end; tile0 += batch) {
            const int n_here = min(batch, end - tile0);
#pragma unroll 1
            for (; tile < tile0 + n_here; tile += p.n_groups) {
                const float inverse[2] = {__uint_as_float(inverse_bits(scale_bits[0])),
                                          __uint_as_float(inverse_bits(scale_bits[1]))};
                load_scale_bits(tile + p.n_groups);
#pragma unroll 1
                for (int c = chunk0; c < n_chunks; c += p.n_warps) {
                    float acc[4] = {};
                    const auto multiply = [&](const uint32_t (&a)[8], const uint4& v) {
                        mma_f16(acc, a, v.x, v.y);
                        mma_f16(acc, a + 4, v.z, v.w);
                    };
                    const int k_tile0 = c * chunk_tiles, k_tile_end = min(p.n_k_tiles, k_tile0 + chunk_tiles);
                    if constexpr (S::kBlocks > 0) {
#pragma unroll
                        for (int u = 0; u < S::kChunkUnits; ++u) {
                            const int n = k_tile_end - k_tile0 - u * S::kUnitTiles;
                            if (n <= 0) break;
                            take_unit(inverse, n, [&](int b, const uint32_t (&a)[8]) {
                                multiply(a, x_of(c * S::kBlocks + u * S::kUnitBlocks + b));
                            });
                        }
                    } else {
#pragma unroll 1
                        for (int k_tile = k_tile0; k_tile < k_tile_end; k_tile += S::kUnitTiles)
                            take_unit(inverse, p.n_k_tiles - k_tile, [&](int b, const uint32_t (&a)[8]) {
                                multiply(a, x_of(k_tile * S::kTileBlocks + b));
                            });
                    }
                    const uint32_t to = sets_at + set + (tile - tile0) * tile_bytes + c * chunk_bytes + 4 * g;
                    if (one_row) {
                        if (t == 0) store_shared(to, acc[0]), store_shared(to + 32, acc[2]);
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            if (2 * t + (i & 1) < item.n)
                                store_shared(to + 4 * ((2 * t + (i & 1)) * S::kPartialRow + 8 * (i >> 1)), acc[i]);
                    }
                }
            }
            __syncthreads();

#pragma unroll 1
            for (int i = threadIdx.x; (i >> item_shift << pairs) < n_here; i += blockDim.x) {
                const int row = row_of(i), o = output_of(i, tile0);
                if (row >= item.n || (o >= p.n_out && !mixes_one)) continue;
                uint32_t from = sets_at + set + (i >> item_shift << pairs) * tile_bytes;
                from += 4 * (row * S::kPartialRow + (i & 15));
                float v[2], bias[2] = {first_bias[0], first_bias[1]}, unit[2] = {first_unit[0], first_unit[1]};
                if (tile0 != begin || i != static_cast<int>(threadIdx.x)) load_result(bias, unit, min(o, p.n_out - 1));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (m > pairs) break;
                    float sum = 0.0f;
                    if (one_row) {
                        sum = sum_of_chunks<4, kTileRows, 1>(from + m * tile_bytes, factors_at, 1.0f, n_chunks);
                    } else {
#pragma unroll 4
                        for (int c = 0; c < n_chunks; ++c)
                            sum = __fmaf_rn(load_shared(from + m * tile_bytes + c * chunk_bytes),
                                            load_shared(factors_at + 4 * (8 * c + row)), sum);
                    }
                    v[m] = __fmaf_rn(sum, unit[m], bias[m]);
                }
                const int of = item_pairs[row];
                if (o < p.n_out)
                    p.out[of / p.n_used * p.out_stride + static_cast<int64_t>(of % p.n_used) * p.n_out + o] =
                        pairs ? glu_value(p.glu, v[0], v[1]) : v[0];
                if (mixes_one) mix_one(p, at0 + tile0 - begin + (i >> 4), 0xffffu << (lane & 16));
            }
            set = set == 0 ? set_bytes : 0;
            if (p.mode == PRODUCT_MIX && !mixes_one) mix(p, at0 + tile0 - begin, n_here, item.n, is_last);
        }
        if (end == n_tiles) break;
        begin = end, ++item_index, at0 = 0;
        end = min(n_tiles, begin + (n_row_tiles << pairs));
        load_item();
        __syncthreads();  // nobody needs what this item leaves
    }
}

#define DEFINE_VARIANT(Type, name, blocks, suffix)                                                     \
    extern "C" __global__ void __launch_bounds__(blocks ? EXPERT_FEW_THREADS : EXPERT_LONG_THREADS, 1) \
        expert_few_##name##_##suffix(const __grid_constant__ ExpertFewParams p) {                      \
        expert_few<Type, DecodeShape<Type, blocks, 0>>(p);                                             \
    }
#define DEFINE_SMALL(Type, name)       \
    DEFINE_VARIANT(Type, name, 4, 128) \
    DEFINE_K(Type, name)
#define DEFINE_K(Type, name)           \
    DEFINE_VARIANT(Type, name, 8, 256) \
    DEFINE_VARIANT(Type, name, 0, long)
DENSE_TYPES(DEFINE_SMALL)
Q4_0_TYPES(DEFINE_SMALL)
Q5_0_TYPES(DEFINE_SMALL)
Q8_0_TYPES(DEFINE_SMALL)
MXFP4_TYPES(DEFINE_SMALL)
Q2_K_TYPES(DEFINE_K)
Q3_K_TYPES(DEFINE_K)
Q4_K_TYPES(DEFINE_K)
Q6_K_TYPES(DEFINE_K)
