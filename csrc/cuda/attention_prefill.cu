// Attention of prefill rows over the paged cache: causal, windowed, with sinks, several sequences in one launch.
//
//   out[r, h] = sum_j p[j] v[j] / (sum_j p[j] + exp(sink[h])),  p[j] = exp(scale * q[r, h] . k[j]),
//   j <= position[r], position[r] - j < window
//
// Grid: y = query head, x = tile of up to 64 consecutive rows of one sequence; four warps of 16 rows each. The order of
// all sums is that of attention.cuh. The tile walks over the sequence's splits of two blocks of 64 positions; K and V
// of one split are in shared memory, copied by cp.async while the other of the two is worked on. A warp has the scores
// of its rows with a whole split in registers, then the sums of 32 dimensions after 32. A row's result depends on its
// position only, not on its tile: splits lie at absolute positions, and blocks that are masked for a row add exactly 0.
// Operations: 6 * head_dim per (row, key, head); K and V are read once per tile and head, mostly from L2.
#include "attention.cuh"

static constexpr int kThreads = 128;
static constexpr int kWarpRows = 16;
static constexpr int kBlockTiles = KV_BLOCK / 8;   // scores of a warp with a block: products of 8 keys
static constexpr int kBlockSteps = KV_BLOCK / 16;  // sums over the keys of a block: products of 16
static_assert(ATTENTION_SPLIT == 2 * KV_BLOCK);

template <int kHeadDim>
struct Prefill {
    static constexpr int kTileBytes = 16 * kHeadDim,
                         kBlockBytes = KV_BLOCK / 8 * kTileBytes;  // of K or V, in tiles of 8
    static constexpr int kSteps = kHeadDim / 16;
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128);

    // K [2] and V [2] of the blocks of a split in shared memory, as they lie in the cache.
    static DEVICE_MEMBER uint8_t* k_of(uint8_t* smem, int i) { return smem + i * kBlockBytes; }
    static DEVICE_MEMBER uint8_t* v_of(uint8_t* smem, int i) { return smem + (2 + i) * kBlockBytes; }

    // The thread's number where it is asked for: addresses made of it are not worth registers over the whole loop.
    static DEVICE_MEMBER int thread_here() {
        int thread = threadIdx.x;
        asm volatile("" : "+r"(thread));
        return thread;
    }

    // K or V of all 64 positions of a block, whatever they hold; not yet waited for.
    static DEVICE_MEMBER void copy(const uint16_t* from, uint32_t to) {
        const int thread = thread_here();
#pragma unroll
        for (int i = 0; i < kBlockBytes / 16 / kThreads; i++) {
            const int piece = i * kThreads + thread;
            cp_async_16(to + piece * 16, from + piece * 8);
        }
    }

    // Positions from n_keys on hold values of other sequences, perhaps not finite: 0 * NaN must not enter.
    static DEVICE_MEMBER void clear_v(uint8_t* v, int n_keys) {
        for (int dim = threadIdx.x; dim < kHeadDim; dim += kThreads)
            for (int key = n_keys; key < KV_BLOCK; key++)
                reinterpret_cast<uint16_t*>(v)[kv_v_at(key, dim, kHeadDim) - KV_BLOCK * kHeadDim] = 0;
    }

    static DEVICE_MEMBER void load_q(const AttentionPrefillParams& p, const AttentionTile& tile, int row,
                                     uint32_t (&hi)[kSteps][4], uint32_t (&lo)[kSteps][4]) {
        const float factor = query_factor(p.scale);
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {  // operand register i: rows +0, +8, columns +0, +8
            const int r = row + i % 2 * 8;
            const float* from = p.q + (int64_t)(tile.row + r) * p.q_stride + blockIdx.y * kHeadDim + column + i / 2 * 8;
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                float2 x = make_float2(0.f, 0.f);
                if (r < tile.n_rows) x = *reinterpret_cast<const float2*>(from + step * 16);
                const SplitPair pair = split_query(x.x, x.y, factor);
                hi[step][i] = pair.hi;
                lo[step][i] = pair.lo;
            }
        }
    }

    // Scores of 16 rows with the 64 keys of a block.
    static DEVICE_MEMBER void score(float (&s)[kBlockTiles][4], const uint32_t (&hi)[kSteps][4],
                                    const uint32_t (&lo)[kSteps][4], uint32_t k) {
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
#pragma unroll
            for (int j = 0; j < kBlockTiles / 2; j++) {
                uint32_t b[4];
                ldmatrix_x4(b, k + j * 2 * kTileBytes + step * 256);
                mma_f16(s[2 * j], lo[step], b[0], b[1]);
                mma_f16(s[2 * j + 1], lo[step], b[2], b[3]);
                mma_f16(s[2 * j], hi[step], b[0], b[1]);
                mma_f16(s[2 * j + 1], hi[step], b[2], b[3]);
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
        const int last_block = last / KV_BLOCK, last_split = last_block / 2;
        const int warp_first = tile.position + warp_row;
        const bool is_idle = warp_row >= tile.n_rows;
        const int warp_last = warp_first + kWarpRows - 1 < last ? warp_first + kWarpRows - 1 : last;
        // ldmatrix: the lane's row of its 8x8 matrix, of K (keys +8 from matrix 2 on, dimensions +8 in odd matrices)
        // and of V (dimensions +8 from matrix 2 on, keys +8 in odd matrices)
        const int k_lane = lane / 16 * kTileBytes + lane / 8 % 2 * 128 + lane % 8 * 16;
        const int v_lane = lane / 8 % 2 * kTileBytes + lane / 16 * 128 + lane % 8 * 16;

        // Copies of the split's blocks that some row looks at.
        const auto copy_split = [&](int split, bool is_v) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int block = 2 * split + i;
                if (block >= first_block && block <= last_block) {
                    const uint16_t* from = p.kv + kv_offset(table[block], head_kv, p.n_head_kv, kHeadDim);
                    copy(is_v ? from + KV_BLOCK * kHeadDim : from, smem_address(is_v ? v_of(smem, i) : k_of(smem, i)));
                }
            }
            cp_async_commit();
        };
        copy_split(first_block / 2, false);
        copy_split(first_block / 2, true);
        uint32_t q_hi[kSteps][4], q_lo[kSteps][4];
        load_q(p, tile, row, q_hi, q_lo);
        float acc[kHeadDim / 8][4] = {};
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

        for (int split = first_block / 2; split <= last_split; split++) {
            // Whether this warp has rows that look at a block.
            bool is_seen[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key0 = (2 * split + i) * KV_BLOCK;
                is_seen[i] = !is_idle && key0 <= warp_last && warp_first - (key0 + KV_BLOCK - 1) < window;
            }
            uint32_t weight[2][kBlockSteps][4];
            Fade fade[2];
            cp_async_wait<1>();
            __syncthreads();  // K is complete
            if (is_seen[0] || is_seen[1]) {
                float s[2][kBlockTiles][4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key0 = (2 * split + i) * KV_BLOCK;
#pragma unroll
                    for (int j = 0; j < kBlockTiles; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++) s[i][j][e] = is_seen[i] ? 0.f : -INFINITY;
                    if (!is_seen[i]) continue;
                    score(s[i], q_hi, q_lo, smem_address(k_of(smem, i)) + k_lane);
                    if (key0 + KV_BLOCK - 1 > warp_first || warp_last - key0 >= window) {
#pragma unroll
                        for (int j = 0; j < kBlockTiles; j++) {
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                const int behind =
                                    tile.position + row + e / 2 * 8 - (key0 + j * 8 + lane % 4 * 2 + e % 2);
                                if (behind < 0 || behind >= window) s[i][j][e] = -INFINITY;
                            }
                        }
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {  // rows +0, +8
                    float most = -INFINITY;
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int j = 0; j < kBlockTiles; j++)
                            most = fmaxf(most, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                    fade[half] = fade_of(top[half], most);
                    const float base = exponent_base(most);
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int j = 0; j < kBlockTiles; j++)
                            weight[i][j / 2][j % 2 * 2 + half] =
                                pack_f16(weight_of(s[i][j][2 * half], base), weight_of(s[i][j][2 * half + 1], base));
                }
            }
            cp_async_wait<0>();
            __syncthreads();  // V is complete, and nobody reads K any more
            if (split < last_split) {
                copy_split(split + 1, false);
            } else if (last % KV_BLOCK != KV_BLOCK - 1) {
                clear_v(v_of(smem, last_block % 2), last % KV_BLOCK + 1);
                __syncthreads();
            }
            if (is_seen[0] || is_seen[1]) {
                float total[4] = {};
#pragma unroll
                for (int t0 = 0; t0 < kSteps; t0 += 2) {  // 16 dimensions at t0, and at t0 + 1 where there are
                    float part[2][2][4] = {};
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (!is_seen[i]) continue;
                        const uint32_t v = smem_address(v_of(smem, i)) + v_lane;
#pragma unroll
                        for (int j = 0; j < kBlockSteps; j++) {
#pragma unroll
                            for (int t = t0; t < t0 + 2 && t < kSteps; t++) {
                                uint32_t b[4];
                                ldmatrix_x4(b, v + t * 256 + j * 2 * kTileBytes);
                                mma_f16(part[t - t0][0], weight[i][j], b[0], b[1]);
                                mma_f16(part[t - t0][1], weight[i][j], b[2], b[3]);
                            }
                            if (t0 == 0) mma_f16(total, weight[i][j], kOnes, kOnes);
                        }
                    }
#pragma unroll
                    for (int t = t0; t < t0 + 2 && t < kSteps; t++)
#pragma unroll
                        for (int e = 0; e < 8; e++) {
                            float& to = acc[2 * t + e / 4][e % 4];
                            to = add_split(to, part[t - t0][e / 4][e % 4], fade[e / 2 % 2]);
                        }
                }
                sum[0] = add_split(sum[0], total[0], fade[0]);
                sum[1] = add_split(sum[1], total[2], fade[1]);
            }
            if (split < last_split) {
                __syncthreads();  // nobody reads V any more
                copy_split(split + 1, true);
            }
        }

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + 8 * half;
            if (r >= tile.n_rows) continue;
            const float factor = softmax_factor(top[half], sum[half], sink_of(p.sinks, blockIdx.y));
            float* out = p.out + (int64_t)(tile.row + r) * p.out_stride + blockIdx.y * kHeadDim + lane % 4 * 2;
#pragma unroll
            for (int t = 0; t < kHeadDim / 8; t++)
                *reinterpret_cast<float2*>(out + t * 8) =
                    make_float2(__fmul_rn(acc[t][2 * half], factor), __fmul_rn(acc[t][2 * half + 1], factor));
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
