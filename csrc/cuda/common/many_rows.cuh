// The loop of products with many rows on warpgroup products (wgmma.cu): a block's tiles of outputs x rows of x.
//
//   sum[o, r] = sum over chunks c: factor[r, c] * sum_k in c fp16(w[o, k]) x16[r, k]      (see mma_tile.cuh)
//
// A block has S::kM * S::kK warpgroups that multiply, and others that bring what these need. A tile is S::kM times 64
// outputs x S::kN rows; a warpgroup has 64 of the outputs and, of the chunks of the block's tiles in order, every
// S::kK-th: its part. Each warp makes fp16 A fragments of the codes of one row tile in registers, a step (64 columns)
// ahead of the product; x is in shared memory as the tensor cores take it. Which tiles there are, where their rows come
// from and where results go, a Job says.
//
// Rows of x in tiles (convert.cu): of each step 128 bytes of every row, eight rows 1,024 bytes with their 16-byte parts
// exchanged as wgmma.cuh says; factors are apart, [chunk][row]. Rows that are gathered lie by themselves, their parts
// in order, their factors behind.
//
// A tile need not have all S::kN rows. Where tiles often have fewer (S::kWidth < S::kN), products are of as many as a
// tile has, in steps of S::kWidth.
//
// Shared memory: [kK][kXDepth] steps of x, each with the factors of a chunk behind; [kK][kWDepth] units of weights of
// the row tiles; for kK > 1 the sums so far; results on their way out; barriers.
#pragma once

#include "common/activations.cuh"
#include "common/glu.cuh"
#include "common/mma_tile.cuh"
#include "common/wgmma.cuh"
#include "matmul_shapes.cuh"
#include "params/experts_params.h"
#include "params/matmul_params.h"

// A row tile: the index-th of a matrix.
struct RowTile {
    const uint8_t* w;   // the matrix
    const float* bias;  // or null
    float* out;         // of the tile's first row, or of the first pair
    int64_t out_stride;
    int n_out, index;
    bool exists;
};

// The chunks of a part, over the tiles of the block.
template <int kK>
struct PartChunks {
    int tile, chunk, n_chunks;
    DEVICE_MEMBER PartChunks(int part, int n) : tile(blockIdx.x), chunk(part), n_chunks(n) { settle(); }
    DEVICE_MEMBER void next() { chunk += kK, settle(); }
    DEVICE_MEMBER void settle() {
        if (kK == 1) {
            if (chunk == n_chunks) chunk = 0, tile += gridDim.x;
        } else {
            while (chunk >= n_chunks) chunk -= n_chunks, tile += gridDim.x;
        }
    }
};

// A place in a ring of kDepth slots and the parity of its barrier's phase.
template <int kDepth>
struct RingPlace {
    int slot = 0, parity = 0;
    DEVICE_MEMBER void next() {
        if (++slot == kDepth) slot = 0, parity ^= 1;
    }
    DEVICE_MEMBER int before() const { return slot ? slot - 1 : kDepth - 1; }
};

// Barriers of all parts, which are there when this returns. All threads.
template <class S>
DEVICE void begin_many_rows(const uint8_t* smem) {
    const int i = threadIdx.x, j = i % S::kPartBarriers;
    if (i < S::kK * S::kPartBarriers) {
        const bool is_x = j < 2 * S::kXDepth;
        const bool is_full = is_x ? j < S::kXDepth : j < 2 * S::kXDepth + S::kWDepth;
        barrier_init(smem_address(smem) + S::kBarriersAt + 8 * i, !is_full ? 4 * S::kM
                                                                  : is_x   ? S::kXArrivals
                                                                           : 32 * S::kWSuppliers);
        copy_barrier_fence();
    }
    __syncthreads();
}

// Tiles of matrices that share their rows of x.
template <class S>
struct DenseJob {
    const ManyRowsParams& p;
    int n_tiles;

    DEVICE_MEMBER explicit DenseJob(const ManyRowsParams& params) : p(params), n_tiles(p.n_tiles_m * p.n_tiles_n) {}

    // Row tile i of a tile; past the end the last one, to be dropped.
    DEVICE_MEMBER RowTile row_tile(int tile, int i) const {
        const int number = tile % p.n_tiles_m * S::kRowTiles + i, at = min(number, p.n_row_tiles - 1);
        int matrix = 0, to = 0, index = at;
        if (p.mode == PRODUCT_GLU) {  // those of both matrices in turn, whose results are one
            matrix = at & 1, index = at >> 1;
        } else {
#pragma unroll
            for (int m = 1; m < MATVEC_MAX_MATRICES; ++m)
                if (m < p.n_matrices && at >= p.m[m].row_tile0) matrix = m;
            to = matrix, index -= p.m[matrix].row_tile0;
        }
        const ProductMatrix& m = p.m[matrix];
        float* const out = p.m[to].out + first_row(tile) * p.m[to].out_stride;
        return {m.w, m.bias, out, p.m[to].out_stride, m.n_out, index, number < p.n_row_tiles};
    }
    DEVICE_MEMBER int first_row(int tile) const { return tile / p.n_tiles_m * S::kN; }
    DEVICE_MEMBER int n_rows(int tile) const { return min(S::kN, p.n_rows - first_row(tile)); }
    // What says where a row of a tile has its results, and where they begin.
    DEVICE_MEMBER int place(int, int row) const { return row; }
    DEVICE_MEMBER float* result(const RowTile& at, int place) const { return at.out + place * at.out_stride; }
};

// Tiles of one or two matrices of the experts, each with an item of the list as its rows.
template <class S>
struct ExpertJob {
    const ManyExpertRowsParams& p;
    int n_tiles, n_row_tiles;  // of one matrix

    // The list must be there.
    DEVICE_MEMBER explicit ExpertJob(const ManyExpertRowsParams& params)
        : p(params), n_tiles(p.n_tiles_m * *p.list.n_items), n_row_tiles((p.n_out + kTileRows - 1) / kTileRows) {}

    DEVICE_MEMBER RowTile row_tile(int tile, int i) const {
        const int number = tile % p.n_tiles_m * S::kRowTiles + i, at = min(number, p.n_matrices * n_row_tiles - 1);
        const int matrix = p.mode == PRODUCT_GLU ? at & 1 : at >= n_row_tiles;
        const int index = p.mode == PRODUCT_GLU ? at >> 1 : at - matrix * n_row_tiles;
        const int expert = item(tile).expert;
        const ExpertMatrix &m = p.m[matrix], &to = p.m[p.mode == PRODUCT_GLU ? 0 : matrix];
        const float* const bias = m.bias != nullptr ? m.bias + static_cast<int64_t>(expert) * p.n_out : nullptr;
        return {m.w + expert * p.matrix_bytes,      bias, to.out, to.out_stride, p.n_out, index,
                number < p.n_matrices * n_row_tiles};
    }
    DEVICE_MEMBER const ExpertItem& item(int tile) const { return p.list.items[tile / p.n_tiles_m]; }
    DEVICE_MEMBER int first_row(int tile) const { return item(tile).first; }
    DEVICE_MEMBER int n_rows(int tile) const { return item(tile).n; }
    DEVICE_MEMBER int pair(int tile, int row) const { return p.list.pairs[item(tile).first + row]; }
    // Where a row of a tile is that is gathered, in bytes from x on.
    DEVICE_MEMBER uint32_t row_at(int tile, int row) const {
        const int pair_ = pair(tile, row);
        return static_cast<uint32_t>(pair_ / p.n_used + pair_ % p.n_used * p.x_slot_rows) * p.x_bytes;
    }
    DEVICE_MEMBER int place(int tile, int row) const { return pair(tile, row); }
    DEVICE_MEMBER float* result(const RowTile& at, int place) const {
        return at.out + place / p.n_used * at.out_stride + static_cast<int64_t>(place % p.n_used) * p.n_out;
    }
};

template <class Q, class S, class Job>
struct ManyRows {
    const Job job;
    uint8_t* const smem;
    const int k, n_k_tiles, chunk, n_chunks, n_tiles, row_bytes;
    const int lane, warp, part;
    const uint32_t smem_at, x_full, x_empty, w_full, w_empty;

    template <class P>
    DEVICE_MEMBER ManyRows(const P& p, uint8_t* shared)
        : job(p),
          smem(shared),
          k(p.k),
          n_k_tiles(p.n_k_tiles),
          chunk(chunk_columns(k)),
          n_chunks((k + chunk - 1) / chunk),
          n_tiles(job.n_tiles),
          row_bytes(n_k_tiles * Q::kPackedTileBytes),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          part(warp < S::kWarps ? warp / 4 % S::kK : (warp - S::kWarps) % S::kK),
          smem_at(smem_address(shared)),
          x_full(smem_at + S::kBarriersAt + 8 * part * S::kPartBarriers),
          x_empty(x_full + 8 * S::kXDepth),
          w_full(x_empty + 8 * S::kXDepth),
          w_empty(w_full + 8 * S::kWDepth) {}

    // Bytes of the packed tiles of the matrix of a row tile.
    DEVICE_MEMBER int64_t matrix_bytes(const RowTile& at) const {
        return static_cast<int64_t>((at.n_out + kTileRows - 1) / kTileRows) * row_bytes;
    }
    DEVICE_MEMBER uint32_t x_slot(int slot) const { return (part * S::kXDepth + slot) * S::kXSlotBytes; }
    DEVICE_MEMBER uint32_t w_slot(int slot, int i) const {
        return S::kWAt + ((part * S::kWDepth + slot) * S::kRowTiles + i) * S::kUnitBytes;
    }

    // Brings x of the part, of rows in tiles. One thread.
    DEVICE_MEMBER void supply_x() const {
        const auto& p = job.p;
        const int64_t step_bytes = static_cast<int64_t>(p.factor_stride) * 128;
        const int chunk_steps = chunk / kSubK, n_steps = n_k_tiles * Q::kSubs;
        int row0 = 0, n_eights = 0, of = -1;
        RingPlace<S::kXDepth> at;
        at.parity = 1;
        for (PartChunks<S::kK> c(part, n_chunks); c.tile < n_tiles; c.next()) {
            if (c.tile != of) of = c.tile, row0 = job.first_row(of), n_eights = (job.n_rows(of) + 7) / 8;
            const int first = c.chunk * chunk_steps, n = min(chunk_steps, n_steps - first);
            const uint8_t* from = p.x + first * step_bytes + row0 * 128;
            for (int i = 0; i < n; ++i, from += step_bytes, at.next()) {
                copy_wait(x_empty + 8 * at.slot, at.parity);
                const uint32_t full = x_full + 8 * at.slot, to = smem_at + x_slot(at.slot);
                const bool with_factors = i + 1 == n;
                barrier_expect(full, n_eights * (with_factors ? 1024 + 32 : 1024));
                copy_bytes(full, to, from, n_eights * 1024);
                if (with_factors)
                    copy_bytes(full, to + S::kXBytes,
                               p.factors + static_cast<int64_t>(c.chunk) * p.factor_stride + row0, n_eights * 32);
            }
        }
    }

    // Gathers x of the tiles: warp `mine` of S::kXSuppliers, whose lanes have a 16-byte part of four neighbouring rows
    // of every 4 * S::kXSuppliers.
    DEVICE_MEMBER void gather_x(int mine) const {
        constexpr int kRowStep = 4 * S::kXSuppliers, kRows = S::kN / kRowStep, kLag = S::kXDepth > 6 ? 5 : 2;
        static_assert(S::kN % kRowStep == 0 && kRowStep % 8 == 0 && S::kXDepth > kLag + 1);
        const int row = 4 * mine + lane / 8, x_part = lane % 8;
        const uint32_t to_row = smem_at + row * 128 + (x_part ^ (row & 7)) * 16;
        const int chunk_steps = chunk / kSubK, n_steps = n_k_tiles * Q::kSubs;
        const uint8_t* const x = job.p.x + 16 * x_part;
        const int factors_at = converted_fragment_bytes(k) - 16 * x_part;
        RingPlace<S::kXDepth> at;
        at.parity = 1;
        int under_way = 0, told = 0;  // steps that nobody was told of yet; the slot of the first
        const auto tell = [&] {
            fence_async();
            barrier_arrive(x_full + 8 * told);
            if (++told == S::kXDepth) told = 0;
        };
        for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
            uint32_t from[kRows];  // rows past the item's end are its last one again, computed and dropped
#pragma unroll
            for (int i = 0; i < kRows; ++i) from[i] = job.row_at(tile, min(row + i * kRowStep, job.n_rows(tile) - 1));
            int left = chunk_steps, c = 0;
            for (int step = 0; step < n_steps; ++step, at.next()) {
                copy_wait(x_empty + 8 * at.slot, at.parity);
                const uint32_t to = to_row + x_slot(at.slot);
#pragma unroll
                for (int i = 0; i < kRows; ++i) cp_async_16(to + i * (kRowStep * 128), x + from[i] + step * 128);
                if (--left == 0 || step + 1 == n_steps) {
                    if (x_part == 0) {
                        const uint32_t factors = smem_at + x_slot(at.slot) + S::kXBytes + 4 * row;
#pragma unroll
                        for (int i = 0; i < kRows; ++i)
                            cp_async_4(factors + i * (kRowStep * 4), x + from[i] + factors_at + 4 * c);
                    }
                    left = chunk_steps, ++c;
                }
                cp_async_commit();
                if (under_way == kLag) {
                    cp_async_wait<kLag>();
                    tell();
                } else {
                    ++under_way;
                }
            }
        }
        cp_async_wait<0>();
        for (; under_way > 0; --under_way) tell();
    }

    // Brings the weights of the part, of every kWSuppliers-th row tile from `mine` on. A warp.
    DEVICE_MEMBER void supply_weights(int mine) const {
        constexpr int kMine = (S::kRowTiles + S::kWSuppliers - 1) / S::kWSuppliers;
        const int chunk_bytes = chunk / Q::kTileK * Q::kPackedTileBytes;
        const int unit_bytes = min(S::kUnitBytes, chunk_bytes);
        const uint8_t* src[kMine];
        int of = -1;
        RingPlace<S::kWDepth> to;
        to.parity = 1;
        for (PartChunks<S::kK> c(part, n_chunks); c.tile < n_tiles; c.next()) {
            if (c.tile != of) {
                of = c.tile;
#pragma unroll
                for (int i = 0; i < kMine; ++i) {
                    const RowTile tile = job.row_tile(of, min(mine + i * S::kWSuppliers, S::kRowTiles - 1));
                    src[i] = tile.w + static_cast<int64_t>(tile.index) * row_bytes + 16 * lane;
                }
            }
            const int end = min(row_bytes, (c.chunk + 1) * chunk_bytes);
            for (int at = c.chunk * chunk_bytes; at < end; at += unit_bytes, to.next()) {
                copy_wait(w_empty + 8 * to.slot, to.parity);
                const int n = min(unit_bytes, end - at) - 16 * lane;
#pragma unroll
                for (int i = 0; i < kMine; ++i) {
                    if (S::kRowTiles % S::kWSuppliers && mine + i * S::kWSuppliers >= S::kRowTiles) break;
                    const uint32_t slot = smem_at + w_slot(to.slot, mine + i * S::kWSuppliers) + 16 * lane;
#pragma unroll
                    for (int b = 0; b < S::kUnitBytes; b += 512)
                        if (b < n) cp_async_16(slot + b, src[i] + at + b);
                }
                barrier_arrive_after_copies(w_full + 8 * to.slot);
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
    }

    // What a warpgroup has of its way through the tiles.
    struct Progress {
        PartChunks<S::kK> here;  // the chunk that comes next
        RingPlace<S::kXDepth> x;
        RingPlace<S::kWDepth> w;
        const uint8_t* unit;  // which the next step is of
        decltype(kept_inverse<Q>(std::declval<const float (&)[2]>())) inverse;
        uint32_t a[S::kSets][2][8];  // fragments of a step; a unit begins with the first set
    };

    DEVICE_MEMBER int own_row_tile() const { return warp / 4 / S::kK * 4 + warp % 4; }
    DEVICE_MEMBER void load_inverse(Progress& at, int tile) const {
        float inverse[2] = {1.0f, 1.0f};
        if constexpr (kRowScaled<Q>) {
            const RowTile own = job.row_tile(tile, own_row_tile());
            row_inverse<Q>(inverse, own.w, matrix_bytes(own), own.index, lane >> 2);
        }
        at.inverse = kept_inverse<Q>(inverse);
    }

    // Multiplies the part's chunks, and stores the results of tiles whose last chunk it has. A warpgroup.
    DEVICE_MEMBER void multiply() const {
        const int own = own_row_tile();
        Progress at{PartChunks<S::kK>(part, n_chunks), {}, {}, smem + w_slot(0, own)};
        if (at.here.tile < n_tiles) {
            load_inverse(at, at.here.tile);
            copy_wait(w_full, 0);
            f16_fragments<Q>(at.a[0][0], at.unit, 0, 0, lane, at.inverse);
            f16_fragments<Q>(at.a[0][1], at.unit, 0, 1, lane, at.inverse);
            keep_here(at.a[0]);
        }
        pdl_wait();

        float acc[S::kN / 2], sum[S::kN / 2];
        int n = 0;  // rows of the tile
#pragma unroll 1
        for (int of = -1; at.here.tile < n_tiles;) {
            const int tile = at.here.tile;
            if (tile != of) of = tile, n = __shfl_sync(0xffffffffu, job.n_rows(tile), 0);
            const bool is_last = at.here.chunk + 1 == n_chunks;
            multiply_chunk<S::kN>(at, acc, sum, tile, n);
            if (is_last) {
                store(sum, tile, n);
#pragma unroll
                for (int i = 0; i < S::kN / 2; ++i) acc[i] = 0.0f;  // so that `store` has their registers
            }
        }
    }

    // The next n_steps steps, which are a unit of weights; kSteps of them where that is not 0. `is_last`: of the chunk.
    template <int kColumns, int kSteps>
    DEVICE_MEMBER void multiply_unit(Progress& at, float (&acc)[kColumns / 2], const int tile, const int n_steps,
                                     const bool is_last, int adds) const {
        constexpr bool kTwo = S::kSets == 2 && kColumns <= 128;
        auto& x = at.x;
        auto& w = at.w;
#pragma unroll
        for (int s = 0; s < (kSteps ? kSteps : S::kUnitTiles); ++s) {
            if (kSteps == 0 && s >= n_steps) break;
            const bool unit_ends = s + 1 == (kSteps ? kSteps : n_steps), ends = unit_ends && is_last;
            uint32_t (&now)[2][8] = at.a[kTwo ? s & 1 : 0];
            copy_wait(x_full + 8 * x.slot, x.parity);
            const uint64_t b = wgmma_matrix(smem_at + x_slot(x.slot));
            wgmma_fence();
            wgmma_f16(acc, now[0], b, adds);
            wgmma_f16(acc, now[0] + 4, b + 2, 1);
            if (!kTwo) wgmma_commit();
            wgmma_f16(acc, now[1], b + 4, 1);
            wgmma_f16(acc, now[1] + 4, b + 6, 1);
            wgmma_commit();

            const uint8_t* packed_tile = at.unit + (Q::kSubs > 1 ? 0 : (s + 1) * Q::kPackedTileBytes);
            if (unit_ends) {
                __syncwarp();
                if (lane == 0) barrier_arrive(w_empty + 8 * w.slot);
                w.next();
                packed_tile = at.unit = smem + w_slot(w.slot, own_row_tile());
                if (!ends || at.here.tile < n_tiles) copy_wait(w_full + 8 * w.slot, w.parity);
                if (kRowScaled<Q> && ends && at.here.tile != tile && at.here.tile < n_tiles)
                    load_inverse(at, at.here.tile);
            }
            const int sub = Q::kSubs > 1 ? (s + 1) % Q::kSubs : 0;
            if (kDense<Q>) wgmma_wait<0>();  // what is loaded is the fragments
            const auto codes = load_codes<Q>(packed_tile, sub, lane);
            const auto scales = tile_scales<Q>(packed_tile, lane);
            if constexpr (kTwo) {
                wgmma_wait<1>();  // the step before is over: its fragments and its x are free
                if (adds && lane == 0) barrier_arrive(x_empty + 8 * x.before());
                if ((s & 1) == 0 && unit_ends) {
                    wgmma_wait<0>();
                    f16_fragments<Q>(at.a[0][0], codes, scales, 2 * sub, at.inverse);
                    f16_fragments<Q>(at.a[0][1], codes, scales, 2 * sub + 1, at.inverse);
                    keep_here(at.a[0]);
                } else {
                    uint32_t (&then)[2][8] = at.a[s & 1 ? 0 : S::kSets - 1];
                    f16_fragments<Q>(then[0], codes, scales, 2 * sub, at.inverse);
                    f16_fragments<Q>(then[1], codes, scales, 2 * sub + 1, at.inverse);
                    keep_here(then);
                }
                if (!ends) x.next();
            } else {
                wgmma_wait<1>();
                f16_fragments<Q>(at.a[0][0], codes, scales, 2 * sub, at.inverse);
                wgmma_wait<0>();
                if (!ends) {
                    if (lane == 0) barrier_arrive(x_empty + 8 * x.slot);
                    x.next();
                }
                f16_fragments<Q>(at.a[0][1], codes, scales, 2 * sub + 1, at.inverse);
                keep_here(at.a[0]);
            }
            adds = 1;
        }
    }

    // The part's next chunk, by products of as few columns as the n rows of its tile allow, kColumns at most. Of
    // several parts the sums so far are in shared memory, and with the last chunk in `sum`.
    template <int kColumns>
    DEVICE_MEMBER void multiply_chunk(Progress& at, float (&all)[S::kN / 2], float (&sum)[S::kN / 2], const int tile,
                                      const int n) const {
        if constexpr (kColumns - S::kWidth >= 64)
            if (n <= kColumns - S::kWidth) return multiply_chunk<kColumns - S::kWidth>(at, all, sum, tile, n);
        const int c = at.here.chunk;
        auto& acc = reinterpret_cast<float (&)[kColumns / 2]>(all);
        constexpr int kK = S::kK, kJ = kColumns / 8;
        const int t = lane & 3, chunk_tiles = chunk / Q::kTileK, unit_tiles = min(S::kUnitTiles, chunk_tiles);
        int left = min(chunk_tiles, n_k_tiles - c * chunk_tiles);  // packed tiles of the chunk
        auto& x = at.x;
        at.here.next();
        int adds = 0;
#pragma unroll 1
        for (; left > 0; left -= unit_tiles, adds = 1) {
            if (Q::kSubs > 1 || S::kUnitTiles == 1 || (left >= S::kUnitTiles && unit_tiles == S::kUnitTiles))
                multiply_unit<kColumns, S::kUnitTiles * Q::kSubs>(at, acc, tile, S::kUnitTiles * Q::kSubs,
                                                                  left <= unit_tiles, adds);
            else
                multiply_unit<kColumns, 0>(at, acc, tile, min(left, unit_tiles), left <= unit_tiles, adds);
        }
        wgmma_wait<0>();
        const float* const factors = reinterpret_cast<const float*>(smem + x_slot(x.slot) + S::kXBytes) + 2 * t;
        if constexpr (kK == 1) {
            if (c == 0) {
#pragma unroll
                for (int i = 0; i < kColumns / 2; ++i) sum[i] = 0.0f;
            }
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const float2 f = *reinterpret_cast<const float2*>(factors + 8 * j);
#pragma unroll
                for (int i = 4 * j; i < 4 * j + 4; ++i) sum[i] = __fmaf_rn(acc[i], i & 1 ? f.y : f.x, sum[i]);
            }
        } else {
            // Each part adds its chunk when the one before has added its own.
            float4* const so_far =
                reinterpret_cast<float4*>(smem + S::kSumsAt) + warp / 4 / kK * kJ * 128 + threadIdx.x % 128;
            const int turn = 1 + warp / 4 / kK * kK;
            const bool is_last = c + 1 == n_chunks;
            if (c > 0 || tile != static_cast<int>(blockIdx.x)) group_sync(turn + part, 256);
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const float2 f = *reinterpret_cast<const float2*>(factors + 8 * j);
                float4 s = c == 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : so_far[j * 128];
                s.x = __fmaf_rn(acc[4 * j], f.x, s.x), s.y = __fmaf_rn(acc[4 * j + 1], f.y, s.y);
                s.z = __fmaf_rn(acc[4 * j + 2], f.x, s.z), s.w = __fmaf_rn(acc[4 * j + 3], f.y, s.w);
                sum[4 * j] = s.x, sum[4 * j + 1] = s.y, sum[4 * j + 2] = s.z, sum[4 * j + 3] = s.w;
                if (!is_last) so_far[j * 128] = s;
            }
            if (!is_last || tile + static_cast<int>(gridDim.x) < n_tiles) group_arrive(turn + (part + 1) % kK, 256);
        }
        __syncwarp();  // all have read the factors
        if (lane == 0) barrier_arrive(x_empty + 8 * x.slot);
        x.next();
    }

    // ---- results: through shared memory, so that a thread stores four outputs of a row at once

    // Eight rows of a row tile are 512 bytes: where four outputs of a row are, so that neither who puts sums there nor
    // who gets fours meets another in a bank.
    static DEVICE_MEMBER uint32_t four_at(int row, int four) { return 16 * ((4 * row + four) ^ 2 * (row >> 1)); }
    DEVICE_MEMBER uint32_t put_at() const { return four_at(2 * (lane & 3), lane >> 4) + 4 * (lane >> 2 & 3); }
    DEVICE_MEMBER uint32_t get_at() const { return four_at(lane >> 2, lane & 3); }
    static DEVICE_MEMBER void put_eight(uint32_t to, const float (&sum)[S::kN / 2], int j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)  // of the thread's row i & 1 and output 8 (i / 2): four_at is linear in their bits
            store_shared(to ^ 16 * (4 * (i & 1) + (i & 2)), sum[4 * j + i]);
    }
    // The first n of them.
    static DEVICE_MEMBER void store_four(float* to, const float4& v, int n) {
        if (n == 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
            *reinterpret_cast<float4*>(to) = v;
        } else {
            if (n > 0) to[0] = v.x;
            if (n > 1) to[1] = v.y;
            if (n > 2) to[2] = v.z;
            if (n > 3) to[3] = v.w;
        }
    }

    // The results of a warp's row tile.
    DEVICE_MEMBER void store(float (&sum)[S::kN / 2], int tile, int n_rows) const {
        constexpr int kJ = S::kN / 8, kHalf = kJ / 2, kAtOnce = kJ < 4 ? kJ : 4;
        const int g = lane >> 2, t = lane & 3;
        const RowTile at = job.row_tile(tile, own_row_tile());
        const int o = at.index * kTileRows + g;
        int end[2];  // rows of output o + 8r, from the thread's first on
        float bias[2], unit[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool exists = at.exists && o + 8 * r < at.n_out;
            bias[r] = exists && at.bias != nullptr ? at.bias[o + 8 * r] : 0.0f;
            unit[r] = exists ? weight_unit<Q>(at.w, matrix_bytes(at), o + 8 * r) : 0.0f;
            end[r] = exists ? n_rows - 2 * t : 0;
        }
#pragma unroll
        for (int i = 0; i < S::kN / 2; ++i) sum[i] = __fmaf_rn(sum[i], unit[i >> 1 & 1], bias[i >> 1 & 1]);
        if (job.p.mode == PRODUCT_GLU) {
            store_gated(sum, at, tile, n_rows);
            return;
        }
        if (job.p.mode == PRODUCT_ADD) {  // (no product of experts, whose kernels spill without this branch)
#pragma unroll
            for (int j0 = 0; j0 < kJ; j0 += kHalf) {
                float before[4 * kHalf];  // all on their way at once
#pragma unroll
                for (int i = 0; i < 4 * kHalf; ++i) {
                    const int row = 8 * (j0 + i / 4) + (i & 1), r = i >> 1 & 1;
                    before[i] = row < end[r] ? job.result(at, job.place(tile, row + 2 * t))[o + 8 * r] : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < 4 * kHalf; ++i) sum[4 * j0 + i] = __fadd_rn(before[i], sum[4 * j0 + i]);
            }
        }
        const int o4 = at.index * kTileRows + 4 * t, n_mine = at.exists ? min(at.n_out - o4, 4) : 0;
        const uint32_t own = smem_at + S::kExchangeAt + warp * 2048;
        int places[kJ];  // found out before they are waited for
#pragma unroll
        for (int j = 0; j < kJ; ++j) places[j] = job.place(tile, min(8 * j + g, n_rows - 1));
#pragma unroll
        for (int j0 = 0; j0 < kJ; j0 += kAtOnce) {
            if (8 * j0 >= n_rows) break;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) put_eight(own + 512 * j + put_at(), sum, j0 + j);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const float4 v = load_shared_float4(own + 512 * j + get_at());
                if (8 * (j0 + j) + g < n_rows) store_four(job.result(at, places[j0 + j]) + o4, v, n_mine);
            }
            __syncwarp();
        }
    }

    // The gated activation of a pair of warps' row tiles, `at` and the one of the other matrix: each warp has every
    // second eight of the rows. Two buffers take turns.
    DEVICE_MEMBER void store_gated(const float (&sum)[S::kN / 2], const RowTile& at, int tile, int n_rows) const {
        constexpr int kJ = S::kN / 8;
        const int which = warp & 1, row = 8 * which + (lane >> 2), barrier = S::kFirstPairBarrier + warp / 2;
        const int o4 = at.index * kTileRows + 4 * (lane & 3), n_mine = at.exists ? min(at.n_out - o4, 4) : 0;
        const uint32_t pair = smem_at + S::kExchangeAt + warp / 2 * 4096;
        int places[kJ / 2];
#pragma unroll
        for (int j = 0; j < kJ; j += 2) places[j / 2] = job.place(tile, min(8 * j + row, n_rows - 1));
#pragma unroll
        for (int j = 0; j < kJ; j += 2) {
            if (8 * j >= n_rows) break;
            const uint32_t both = pair + (j & 2) * 1024;
            put_eight(both + 512 * which + put_at(), sum, j);
            put_eight(both + 1024 + 512 * which + put_at(), sum, j + 1);
            group_sync(barrier, 64);
            if (8 * j + row >= n_rows) continue;
            const float4 gate = load_shared_float4(both + 1024 * which + get_at());
            const float4 up = load_shared_float4(both + 1024 * which + 512 + get_at());
            store_four(job.result(at, places[j / 2]) + o4, glu_values(job.p.glu, gate, up), n_mine);
        }
        group_sync(barrier, 64);  // both warps have read
    }

    // Now, not where they are used.
    static DEVICE_MEMBER void keep_here(uint32_t (&a)[2][8]) {
#pragma unroll
        for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i / 8][i % 8]));
    }
};
