// The loop over K of the prefill kernels (matmul.cu, experts_prefill.cu): one block's tile of outputs x rows of x.
//
//   sum[o, r] = sum over chunks c: factor[r, c] * sum_k in c fp16(w[o, k]) x16[r, k]      (see mma_tile.cuh)
//
// A block has S::kRowTiles row tiles of weights and S::kRows rows of x, a warp two row tiles and 8 * S::kTiles rows:
// warp w has row tiles 2 (w % kWarpsM) and the next, and the rows of part w / kWarpsM. Packed tiles of weights and
// 64-column slices of x come to shared memory by cp.async, S::kStages - 1 stages ahead. Both lie in fragment order
// there: a warp makes fp16 A fragments of its codes in registers, and a B fragment for 32 columns is one 16-byte load.
//
// Shared memory (S::kBytes, then 4 kRows bytes for each chunk):
//   [kStages][kRows][64] fp16 x; in odd rows the two halves of the 128 bytes are exchanged (no bank conflicts)
//   [kSlots][kRowTiles][kPackedTileBytes] weights
//   [n_chunks][kRows] float32 factors
#pragma once

#include "common/activations.cuh"
#include "common/mma_tile.cuh"
#include "matmul_shapes.cuh"

// A block's part of a matrix [n_row_tiles][n_k_tiles] of packed tiles of type Q, and the calling thread's part of that.
// S is a MatmulShape.
template <class Q, class S>
struct PrefillTile {
    int lane, warp, g, t;  // lane is 4g + t
    int warp_m, warp_n;    // the warp's pair of row tiles, its part of the rows
    int n_row_tiles, row_tile0, n_steps;
    int64_t row_tile_bytes;

    // The `index`-th block along n_out.
    DEVICE_MEMBER PrefillTile(int n_out, int n_k_tiles, int index) {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
        warp_m = S::kWarpsN == 1 ? warp : warp % S::kWarpsM, warp_n = S::kWarpsN == 1 ? 0 : warp / S::kWarpsM;
        n_row_tiles = (n_out + kTileRows - 1) / kTileRows, row_tile0 = index * S::kRowTiles;
        n_steps = n_k_tiles * Q::kSubs;
        row_tile_bytes = static_cast<int64_t>(n_k_tiles) * Q::kPackedTileBytes;
    }

    // sum[i][tile][2 * r + c] belongs to this output, and to this row of the block.
    DEVICE_MEMBER int output(int i, int r) const { return (row_tile0 + 2 * warp_m + i) * kTileRows + g + 8 * r; }
    DEVICE_MEMBER int row(int tile, int c) const { return (warp_n * S::kTiles + tile) * 8 + 2 * t + c; }

    // Multiplies by rows of k columns of x; `w` is the matrix with, for types that have them, the row scales after it.
    // Leaves the sums, without the weights' unit, in sum[row tile of the warp][8 rows of x][4]. Row tiles past the end
    // are computed from the last one, to be dropped.
    //
    // `x` says where the rows are: thread i copies 16-byte part i % 8 of 64 columns of row i / 8 and of every
    // kRowStep-th row after it. x.at(i) is the address of the i-th of these parts, x.advance() goes on by 64 columns,
    // x.row(r) is converted row r of the block.
    template <class X>
    DEVICE_MEMBER void multiply(float (&sum)[2][S::kTiles][4], const uint8_t* w, int k, X x, uint8_t* smem) const {
        constexpr int kRowTilesPerWarp = S::kRowTiles / S::kWarps;
        static_assert(S::kRowTiles % S::kWarps == 0 && S::kRows % S::kRowStep == 0);
        static_assert(S::kRowStep % 2 == 0, "the rows of a thread are all even or all odd");
        uint8_t* const w_ring = smem + S::kStages * S::kXBytes;
        float* const factors = reinterpret_cast<float*>(smem + S::kBytes);
        const int chunk = chunk_columns(k), n_chunks = (k + chunk - 1) / chunk;
        for (int i = threadIdx.x; i < S::kRows * n_chunks; i += 32 * S::kWarps) {
            const int r = i % S::kRows, c = i / S::kRows;
            factors[i] = reinterpret_cast<const float*>(x.row(r) + converted_fragment_bytes(k))[c];
        }

        // Warp w copies row tiles w, w + kWarps, ...
        const int x_row = threadIdx.x / 8, x_chunk = threadIdx.x % 8;
        const uint8_t* w_from[kRowTilesPerWarp];
#pragma unroll
        for (int i = 0; i < kRowTilesPerWarp; ++i)
            w_from[i] = w + min(row_tile0 + warp + i * S::kWarps, n_row_tiles - 1) * row_tile_bytes + lane * 16;
        const uint32_t x_to = smem_address(smem) + x_row * 128 + (x_chunk ^ (x_row & 1) * 4) * 16;
        const uint32_t w_to = smem_address(w_ring) + warp * Q::kPackedTileBytes + lane * 16;
        int issued = 0, x_slot_in = 0, w_slot_in = 0;
        // Starts the copies of the next stage (none after the last) and commits one group either way.
        const auto issue = [&] {
            if (issued < n_steps) {
#pragma unroll
                for (int i = 0; i < S::kCopies; ++i)
                    cp_async_16(x_to + x_slot_in * S::kXBytes + i * S::kRowStep * 128, x.at(i));
                x.advance();
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
            row_inverse<Q>(inverse[i], w, n_row_tiles * row_tile_bytes,
                           min(row_tile0 + 2 * warp_m + i, n_row_tiles - 1), g);
        float acc[2][S::kTiles][4] = {};
        const float* chunk_factors = factors + warp_n * 8 * S::kTiles + 2 * t;
        int left = chunk / kSubK;  // steps of this chunk

        const uint8_t* const x_lane = smem + (warp_n * 8 * S::kTiles + g) * 128 + (t ^ (g & 1) * 4) * 16;
        const uint8_t* const w_warp = w_ring + 2 * warp_m * Q::kPackedTileBytes;
        const int x_half = (g & 1) ? -64 : 64;  // bytes from the chunk of block 0 to that of block 1
        int x_slot_out = 0, w_slot_out = 0, sub = 0;
#pragma unroll 1
        for (int step = 0; step < n_steps; ++step) {
            cp_async_wait<S::kStages - 2>();
            __syncthreads();  // the stage is complete, and nobody reads the slot that is filled next
            issue();
            const uint8_t* const x_stage = x_lane + x_slot_out * S::kXBytes;
            const uint8_t* const w_stage = w_warp + w_slot_out * S::kWBytes;
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                uint32_t a[2][8];
                f16_fragments<Q>(a[0], w_stage, sub, b, lane, inverse[0]);
                f16_fragments<Q>(a[1], w_stage + Q::kPackedTileBytes, sub, b, lane, inverse[1]);
#pragma unroll
                for (int tile = 0; tile < S::kTiles; ++tile) {
                    const uint4 v = *reinterpret_cast<const uint4*>(x_stage + tile * 1024 + b * x_half);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        mma_f16(acc[i][tile], a[i], v.x, v.y);
                        mma_f16(acc[i][tile], a[i] + 4, v.z, v.w);
                    }
                }
            }
            x_slot_out = x_slot_out + 1 == S::kStages ? 0 : x_slot_out + 1;
            if (--left == 0 || step + 1 == n_steps) {
#pragma unroll
                for (int tile = 0; tile < S::kTiles; ++tile) {
                    const float2 f = *reinterpret_cast<const float2*>(chunk_factors + 8 * tile);
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            sum[i][tile][j] = __fmaf_rn(acc[i][tile][j], j & 1 ? f.y : f.x, sum[i][tile][j]);
                            acc[i][tile][j] = 0.0f;
                        }
                }
                chunk_factors += S::kRows;
                left = chunk / kSubK;
            }
            if (++sub == Q::kSubs) {
                sub = 0;
                w_slot_out = w_slot_out + 1 == S::kSlots ? 0 : w_slot_out + 1;
            }
        }
        cp_async_wait<0>();
    }
};
