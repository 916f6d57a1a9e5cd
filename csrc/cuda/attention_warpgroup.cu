// Attention of prefill rows over the paged cache by products of warpgroups: what attention_prefill.cu does, with its
// bits. For compute capability 9.0.
//
// Grid: y = query head, x = tile of up to 64 consecutive rows of one sequence; one warpgroup. The order of all sums is
// that of attention.cuh. The tile walks over the sequence's splits of two blocks of 64 positions. Both halves of q stay
// in shared memory; K and V of one split come there as they lie in the cache, which is how the tensor cores take them:
// K of the next split while V is multiplied, V of the next one while its scores are made. The scores of a split with
// their weights, and then its sums of all dimensions, are in registers. A split of which no row of the tile looks at
// one block is worked on as a whole, with what is in that block's place, and no key that a row does not look at counts:
// weight 0. Several blocks share a multiprocessor, so that the products of one
// go on beside the exponentials of others.
// Operations: 6 * head_dim per (row, key, head); K and V are read once per tile and head, mostly from L2.
#include "attention.cuh"
#include "common/wgmma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

static constexpr int kThreads = 128;
static_assert(PREFILL_ROWS == 64 && KV_BLOCK == 64 && ATTENTION_SPLIT == 2 * KV_BLOCK);

template <int kHeadDim>
struct PromptTile {
    static constexpr int kTileBytes = 16 * kHeadDim, kBlockBytes = KV_BLOCK / 8 * kTileBytes;  // of q, K or V
    static constexpr int kSteps = kHeadDim / 16, kPart = kHeadDim / 2;
    static constexpr int kKeysAt = 2 * kBlockBytes, kValuesAt = 4 * kBlockBytes, kBarriersAt = 6 * kBlockBytes;
    static constexpr int kOnesAt = kBarriersAt + 16;  // eight columns of sixteen ones
    // An operand's next 16 columns: of K and q 16 dimensions on, of V 16 keys.
    static constexpr int kNextDims = 2 * 128 / 16, kNextKeys = 2 * kTileBytes / 16;
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128);

    const AttentionPrefillParams& p;
    uint8_t* const smem;
    const AttentionTile tile;

    // Both halves of q, rows past the tile's end zeros: eights of rows as K has eights of keys.
    DEVICE_MEMBER void load_q() const {
        const float factor = query_factor(p.scale);
        const float* const q = p.q + static_cast<int64_t>(tile.row) * p.q_stride + blockIdx.y * kHeadDim;
#pragma unroll 4
        for (int i = threadIdx.x; i < kBlockBytes / 16; i += kThreads) {
            const int row = i / kHeadDim * 8 + i % 8, dim = i % kHeadDim / 8 * 8;
            float4 a = make_float4(0.f, 0.f, 0.f, 0.f), b = a;
            if (row < tile.n_rows) {
                const float4* const from = reinterpret_cast<const float4*>(q + row * p.q_stride + dim);
                a = from[0], b = from[1];
            }
            const SplitPair pairs[4] = {split_query(a.x, a.y, factor), split_query(a.z, a.w, factor),
                                        split_query(b.x, b.y, factor), split_query(b.z, b.w, factor)};
            uint4* const to = reinterpret_cast<uint4*>(smem + 16 * i);
            to[0] = make_uint4(pairs[0].hi, pairs[1].hi, pairs[2].hi, pairs[3].hi);
            to[kBlockBytes / 16] = make_uint4(pairs[0].lo, pairs[1].lo, pairs[2].lo, pairs[3].lo);
        }
    }

    DEVICE_MEMBER void run() const {
        const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, row = warp_row + lane / 4;  // and row + 8
        const int head_kv = blockIdx.y / (p.n_head / p.n_head_kv);
        const int32_t* const table = p.block_table + static_cast<int64_t>(tile.slot) * p.max_blocks;
        const int window = p.window > 0 ? p.window : INT32_MAX;
        const int last = tile.position + tile.n_rows - 1, last_block = last / KV_BLOCK, last_split = last_block / 2;
        const int first_block = tile.position < window ? 0 : (tile.position - window + 1) / KV_BLOCK;
        const uint32_t smem_at = smem_address(smem), k_full = smem_at + kBarriersAt, v_full = k_full + 8;
        const uint64_t q = wgmma_eights(smem_at, 128, kTileBytes),
                       keys = wgmma_eights(smem_at + kKeysAt, 128, kTileBytes),
                       values = wgmma_eights(smem_at + kValuesAt, kTileBytes, 128),
                       ones = wgmma_eights(smem_at + kOnesAt, 128, 256);

        // Starts copying K or V of the blocks of a split that some row looks at. One thread, when all have read what is
        // there.
        const auto copy_split = [&](int split, int at, uint32_t full) {
            const int begin = max(2 * split, first_block), end = min(2 * split + 1, last_block);
            barrier_expect(full, (end - begin + 1) * kBlockBytes);
            for (int block = begin; block <= end; block++) {
                const uint16_t* from = p.kv + kv_offset(table[block], head_kv, p.n_head_kv, kHeadDim);
                copy_bytes(full, smem_at + at + block % 2 * kBlockBytes,
                           at == kValuesAt ? from + KV_BLOCK * kHeadDim : from, kBlockBytes);
            }
        };
        if (threadIdx.x == 0) {
            barrier_init(k_full, 1);
            barrier_init(v_full, 1);
            copy_barrier_fence();
            copy_split(first_block / 2, kKeysAt, k_full);
        }
        load_q();
        if (threadIdx.x < 64) reinterpret_cast<uint32_t*>(smem + kOnesAt)[threadIdx.x] = kOnes;
        // 0 * NaN must not enter: blocks that the first split does not copy are there as zeros.
        if (first_block % 2 == 1 || last_block == first_block)
            for (int i = threadIdx.x; i < 2 * kBlockBytes / 16; i += kThreads)
                reinterpret_cast<uint4*>(smem + kValuesAt)[i] = make_uint4(0, 0, 0, 0);
        fence_async();
        __syncthreads();
        if (threadIdx.x == 0) copy_split(first_block / 2, kValuesAt, v_full);
        float acc[kPart] = {};
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

#pragma unroll 1
        for (int split = first_block / 2, parity = 0; split <= last_split; split++, parity ^= 1) {
            const int key0 = split * ATTENTION_SPLIT;
            float s[64];  // 4 j + 2 half + e: of row + 8 half and key 8 j + 2 (lane % 4) + e
            copy_wait(k_full, parity);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                const uint64_t k = keys + step * kNextDims, high = q + step * kNextDims;
                wgmma_f16(s, high + kBlockBytes / 16, k, step > 0);
                wgmma_f16(s, high, k, 1);
            }
            wgmma_commit();
            wgmma_wait<0>();
            __syncthreads();  // nobody reads K any more
            if (threadIdx.x == 0 && split < last_split) copy_split(split + 1, kKeysAt, k_full);
            if (key0 + ATTENTION_SPLIT - 1 > tile.position + warp_row || last - key0 >= window) {
                const int behind0 = tile.position + row - key0 - lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < 64; i++) {
                    const int behind = behind0 + i / 2 % 2 * 8 - i / 4 * 8 - i % 2;
                    if (behind < 0 || behind >= window) s[i] = -INFINITY;
                }
            }
            uint32_t weight[8][4];  // operands of 16 keys each
            Fade fade[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = -INFINITY;
#pragma unroll
                for (int j = 0; j < 16; j++) most = fmaxf(most, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                fade[half] = fade_of(top[half], most);
                const float base = exponent_base(most);
#pragma unroll
                for (int j = 0; j < 16; j++)
                    weight[j / 2][j % 2 * 2 + half] =
                        pack_f16(weight_of(s[4 * j + 2 * half], base), weight_of(s[4 * j + 2 * half + 1], base));
            }
            copy_wait(v_full, parity);
            if (split == last_split && last % KV_BLOCK != KV_BLOCK - 1) {
                clear_values(smem + kValuesAt + last_block % 2 * kBlockBytes, last % KV_BLOCK + 1);
                fence_async();
                __syncthreads();
            }
            float part[kPart], total[4];
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 8; j++) {
                wgmma_f16(part, weight[j], values + j * kNextKeys, j > 0);
                wgmma_f16(total, weight[j], ones, j > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            sum[0] = add_split(sum[0], total[0], fade[0]);
            sum[1] = add_split(sum[1], total[2], fade[1]);
#pragma unroll
            for (int i = 0; i < kPart; i++) acc[i] = add_split(acc[i], part[i], fade[i / 2 % 2]);
            if (split < last_split) {
                __syncthreads();  // nobody reads V any more
                if (threadIdx.x == 0) copy_split(split + 1, kValuesAt, v_full);
            }
        }

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + 8 * half;
            if (r >= tile.n_rows) continue;
            const float factor = softmax_factor(top[half], sum[half], sink_of(p.sinks, blockIdx.y));
            float* const out =
                p.out + static_cast<int64_t>(tile.row + r) * p.out_stride + blockIdx.y * kHeadDim + lane % 4 * 2;
#pragma unroll
            for (int t = 0; t < kHeadDim / 8; t++)
                *reinterpret_cast<float2*>(out + t * 8) =
                    make_float2(__fmul_rn(acc[4 * t + 2 * half], factor), __fmul_rn(acc[4 * t + 2 * half + 1], factor));
        }
    }

    // Positions from n_keys on hold values of other sequences, perhaps not finite.
    static DEVICE_MEMBER void clear_values(uint8_t* v, int n_keys) {
        for (int dim = threadIdx.x; dim < kHeadDim; dim += kThreads)
            for (int key = n_keys; key < KV_BLOCK; key++)
                reinterpret_cast<uint16_t*>(v)[kv_v_at(key, dim, kHeadDim) - KV_BLOCK * kHeadDim] = 0;
    }
};

template <int kHeadDim>
DEVICE void attention_warpgroup(const AttentionPrefillParams& p) {
    extern __shared__ __align__(128) uint8_t smem[];
    pdl_launch_dependents();
    pdl_wait();
    const AttentionTile tile = p.tiles[blockIdx.x];
    if (tile.n_rows > 0) PromptTile<kHeadDim>{p, smem, tile}.run();
}

#define DEFINE(head_dim, n_resident)                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads, n_resident)                     \
        attention_warpgroup_##head_dim(const __grid_constant__ AttentionPrefillParams p) { \
        attention_warpgroup<head_dim>(p);                                                  \
    }

DEFINE(32, 3)
DEFINE(64, 4)
DEFINE(80, 3)
DEFINE(96, 3)
DEFINE(128, 2)

#endif
