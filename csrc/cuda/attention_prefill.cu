// Attention of prefill rows over the paged cache: causal, windowed, with sinks, several sequences in one launch.
//
//   out[r, h] = sum_j p[j] v[j] / (sum_j p[j] + exp(sink[h])),  p[j] = exp(scale * q[r, h] . k[j]),
//   j <= position[r], position[r] - j < window
//
// Grid: y = query head, x = tile of up to 64 consecutive rows of one sequence; four warps of 16 rows each. The tile
// walks over the sequence's blocks of 64 positions, K and V double-buffered in shared memory by cp.async, products by
// mma.sync (q as two halves, see attention.cuh), softmax online in registers.
// A row's result depends on its position only, not on its tile: key blocks lie at absolute positions, and a block that
// is masked for a row multiplies its sums by exactly 1 and adds exactly 0.
// Operations: 6 * head_dim per (row, key, head); K and V are read once per tile and head, mostly from L2.
#include "attention.cuh"

static constexpr int kThreads = 128;
static constexpr int kWarpRows = 16;
static constexpr int kVPitch = 2 * KV_BLOCK + 16;  // bytes between dimensions of V in shared memory

template <int kHeadDim>
struct Prefill {
    static constexpr int kKPitch = 2 * kHeadDim + 16;  // bytes between positions of K in shared memory
    static constexpr int kKBytes = KV_BLOCK * kKPitch;
    static constexpr int kStageBytes = kKBytes + kHeadDim * kVPitch;
    static constexpr int kSteps = kHeadDim / 16;
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128);

    // All 64 positions of a block, whatever they hold; not yet waited for.
    static DEVICE_MEMBER void copy_block(const uint16_t* from, uint32_t to) {
        constexpr int kKPieces = kHeadDim / 8, kVPieces = KV_BLOCK / 8;
#pragma unroll
        for (int i = 0; i < KV_BLOCK * kKPieces / kThreads; i++) {
            const int piece = i * kThreads + threadIdx.x;
            cp_async_16(to + piece / kKPieces * kKPitch + piece % kKPieces * 16, from + piece * 8);
        }
        from += KV_BLOCK * kHeadDim;
        to += kKBytes;
#pragma unroll
        for (int i = 0; i < kHeadDim * kVPieces / kThreads; i++) {
            const int piece = i * kThreads + threadIdx.x;
            cp_async_16(to + piece / kVPieces * kVPitch + piece % kVPieces * 16, from + piece * 8);
        }
    }

    // Positions from n_keys on hold values of other sequences, perhaps not finite: 0 * NaN must not enter.
    static DEVICE_MEMBER void clear_v(uint8_t* v, int n_keys) {
        for (int dim = threadIdx.x; dim < kHeadDim; dim += kThreads)
            for (int key = n_keys; key < KV_BLOCK; key++) *reinterpret_cast<uint16_t*>(v + dim * kVPitch + 2 * key) = 0;
    }

    static DEVICE_MEMBER void load_q(const AttentionPrefillParams& p, const AttentionTile& tile, int row,
                                     uint32_t (&hi)[kSteps][4], uint32_t (&lo)[kSteps][4]) {
        const float factor = p.scale * kLog2e;
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {  // operand register i: rows +0, +8, columns +0, +8
            const int r = row + i % 2 * 8;
            const float* from = p.q + (int64_t)(tile.row + r) * p.q_stride + blockIdx.y * kHeadDim + column + i / 2 * 8;
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                float2 x = make_float2(0.f, 0.f);
                if (r < tile.n_rows) x = *reinterpret_cast<const float2*>(from + step * 16);
                const SplitPair pair = split_f16(x.x * factor, x.y * factor);
                hi[step][i] = pair.hi;
                lo[step][i] = pair.lo;
            }
        }
    }

    static DEVICE_MEMBER void run(const AttentionPrefillParams& p, uint8_t* smem) {
        const AttentionTile tile = p.tiles[blockIdx.x];
        if (tile.n_rows <= 0) return;
        const int lane = threadIdx.x % 32;
        const int warp_row = threadIdx.x / 32 * kWarpRows, row = warp_row + lane / 4;  // of this lane: row, row + 8
        const int head_kv = blockIdx.y / (p.n_head / p.n_head_kv);
        const int32_t* table = p.block_table + (int64_t)tile.slot * p.max_blocks;
        const int window = p.window > 0 ? p.window : INT32_MAX;
        const int last = tile.position + tile.n_rows - 1;
        const int first_block = tile.position < window ? 0 : (tile.position - window + 1) / KV_BLOCK;
        const int last_block = last / KV_BLOCK;
        const int warp_first = tile.position + warp_row;
        const bool is_idle = warp_row >= tile.n_rows;
        const int warp_last = warp_first + kWarpRows - 1 < last ? warp_first + kWarpRows - 1 : last;
        // ldmatrix: lane's row of its 8x8 matrix: rows +8 from matrix 2 on, columns +8 in odd matrices
        const int matrix_row = lane % 8 + lane / 16 * 8, matrix_column = lane / 8 % 2 * 16;

        const auto block_of = [&](int block) { return p.kv + kv_offset(table[block], head_kv, p.n_head_kv, kHeadDim); };
        copy_block(block_of(first_block), smem_address(smem));
        cp_async_commit();
        uint32_t q_hi[kSteps][4], q_lo[kSteps][4];
        load_q(p, tile, row, q_hi, q_lo);
        float acc[kHeadDim / 8][4] = {};
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

        for (int block = first_block; block <= last_block; block++) {
            uint8_t* stage = smem + (block - first_block) % 2 * kStageBytes;
            cp_async_wait<0>();
            __syncthreads();  // this stage is complete, and nobody reads the other one any more
            if (block < last_block) {
                copy_block(block_of(block + 1), smem_address(smem + (block + 1 - first_block) % 2 * kStageBytes));
                cp_async_commit();
            } else if (last % KV_BLOCK != KV_BLOCK - 1) {
                clear_v(stage + kKBytes, last % KV_BLOCK + 1);
                __syncthreads();
            }
            const int key0 = block * KV_BLOCK;
            if (is_idle || key0 > warp_last || warp_first - (key0 + KV_BLOCK - 1) >= window) continue;

            float s[KV_BLOCK / 8][4] = {};
            const uint32_t k = smem_address(stage) + matrix_row * kKPitch + matrix_column;
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
#pragma unroll
                for (int j = 0; j < KV_BLOCK / 16; j++) {
                    uint32_t b[4];
                    ldmatrix_x4(b, k + j * 16 * kKPitch + step * 32);
                    mma_f16(s[2 * j], q_lo[step], b[0], b[1]);
                    mma_f16(s[2 * j + 1], q_lo[step], b[2], b[3]);
                    mma_f16(s[2 * j], q_hi[step], b[0], b[1]);
                    mma_f16(s[2 * j + 1], q_hi[step], b[2], b[3]);
                }
            }
            if (key0 + KV_BLOCK - 1 > warp_first || warp_last - key0 >= window) {
#pragma unroll
                for (int j = 0; j < KV_BLOCK / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int behind = tile.position + row + i / 2 * 8 - (key0 + j * 8 + lane % 4 * 2 + i % 2);
                        if (behind < 0 || behind >= window) s[j][i] = -INFINITY;
                    }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {  // rows +0, +8
                float most = top[half];
#pragma unroll
                for (int j = 0; j < KV_BLOCK / 8; j++) most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                // A row that has seen masked keys only must stay as it began.
                const float base = most == -INFINITY ? 0.f : most;
                const float fade = exp2f(top[half] - base);
                top[half] = most;
                sum[half] *= fade;
#pragma unroll
                for (int j = 0; j < KV_BLOCK / 8; j++) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        s[j][i] = exp2f(s[j][i] - base);
                        sum[half] += s[j][i];
                    }
                }
#pragma unroll
                for (int t = 0; t < kHeadDim / 8; t++) acc[t][2 * half] *= fade, acc[t][2 * half + 1] *= fade;
            }
            const uint32_t v = smem_address(stage + kKBytes) + matrix_row * kVPitch + matrix_column;
#pragma unroll
            for (int j = 0; j < KV_BLOCK / 16; j++) {
                const uint32_t weight[4] = {pack_f16(s[2 * j][0], s[2 * j][1]), pack_f16(s[2 * j][2], s[2 * j][3]),
                                            pack_f16(s[2 * j + 1][0], s[2 * j + 1][1]),
                                            pack_f16(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
                for (int t = 0; t < kHeadDim / 16; t++) {
                    uint32_t b[4];
                    ldmatrix_x4(b, v + t * 16 * kVPitch + j * 32);
                    mma_f16(acc[2 * t], weight, b[0], b[1]);
                    mma_f16(acc[2 * t + 1], weight, b[2], b[3]);
                }
            }
        }

#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
            const int r = row + 8 * half;
            if (r >= tile.n_rows) continue;
            const float factor = softmax_factor(top[half], sum[half], p.sinks, blockIdx.y);
            float* out = p.out + (int64_t)(tile.row + r) * p.out_stride + blockIdx.y * kHeadDim + lane % 4 * 2;
#pragma unroll
            for (int t = 0; t < kHeadDim / 8; t++)
                *reinterpret_cast<float2*>(out + t * 8) =
                    make_float2(acc[t][2 * half] * factor, acc[t][2 * half + 1] * factor);
        }
    }
};

template <int kHeadDim>
DEVICE void attention_prefill(const AttentionPrefillParams& p) {
    extern __shared__ __align__(16) uint8_t smem[];
    pdl_launch_dependents();
    pdl_wait();
    Prefill<kHeadDim>::run(p, smem);
}

#define INSTANTIATE(head_dim)                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                            \
        attention_prefill_##head_dim(const __grid_constant__ AttentionPrefillParams p) { \
        attention_prefill<head_dim>(p);                                                  \
    }

INSTANTIATE(32)
INSTANTIATE(64)
INSTANTIATE(80)
INSTANTIATE(96)
INSTANTIATE(128)
