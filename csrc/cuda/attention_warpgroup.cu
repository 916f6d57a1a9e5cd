// Attention of prefill rows over the paged cache by products of warpgroups: what attention_prefill.cu does, with its
// bits. For compute capability 9.0.
//
// Grid: y = query head, x = tile of consecutive rows of one sequence; a warpgroup for each 64 of them. The order of all
// sums is that of attention.cuh. The tile walks over the sequence's splits of two blocks of 64 positions. Both halves
// of q stay in shared memory; K and V of a split come there as they lie in the cache, which is how the tensor cores
// take them. A place is filled anew by the last warp that has read it. Nothing else holds warpgroups together: products
// of one go on beside the exponentials of others. The scores of a split with their weights, and then its sums of all
// dimensions, are in registers. A split of which no row looks at one block is worked on as a whole, with what is in
// that block's place, and no key that a row does not look at counts: weight 0. Operations: 6 * head_dim per (row, key,
// head); K and V are read once per tile and head, mostly from L2.
#include "attention.cuh"
#include "common/wgmma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

static_assert(PREFILL_ROWS == 64 && KV_BLOCK == 64 && ATTENTION_SPLIT == 2 * KV_BLOCK);

template <int kHeadDim>
struct PromptTile {
    static constexpr int kGroups = kHeadDim <= 64 ? 2 : 1, kStages = kGroups;  // prefill_groups; splits in memory
    static constexpr int kThreads = 128 * kGroups;
    static constexpr int kTileBytes = 16 * kHeadDim, kBlockBytes = KV_BLOCK / 8 * kTileBytes;  // of q, K or V
    static constexpr int kSplitBytes = 2 * kBlockBytes;                                        // of K or V
    static constexpr int kSteps = kHeadDim / 16, kPart = kHeadDim / 2;
    static constexpr int kKeysAt = kGroups * 2 * kBlockBytes, kValuesAt = kKeysAt + kStages * kSplitBytes,
                         kOnesAt = kValuesAt + kStages * kSplitBytes,  // eight columns of sixteen
        kBarriersAt = kOnesAt + 256, kCountersAt = kBarriersAt + 16 * kStages, kRareAt = kCountersAt + 8 * kStages;
    // An operand's next 16 columns: of K and q 16 dimensions on, of V 16 keys.
    static constexpr int kNextDims = 2 * 128 / 16, kNextKeys = 2 * kTileBytes / 16;
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128);
    enum Operand { KEYS, VALUES };

    // What is seldom needed, in shared memory.
    struct Rare {
        const int32_t* table;
        int32_t head_kv, first_block, last_block, n_keys, n_warps;  // n_keys: of the last block
    };

    const AttentionPrefillParams& p;
    uint8_t* const smem;
    const uint32_t smem_at;
    const int lane;

    DEVICE_MEMBER PromptTile(const AttentionPrefillParams& params, uint8_t* shared)
        : p(params), smem(shared), smem_at(smem_address(shared)), lane(threadIdx.x % 32) {}

    DEVICE_MEMBER volatile Rare& rare() const { return *reinterpret_cast<volatile Rare*>(smem + kRareAt); }
    DEVICE_MEMBER uint32_t barrier(Operand which, int stage) const {
        return smem_at + kBarriersAt + 8 * (2 * stage + which);
    }

    // Both halves of q, rows past the tile's end zeros: eights of rows as K has eights of keys.
    DEVICE_MEMBER void load_q(const AttentionTile& tile) const {
        const float factor = query_factor(p.scale);
        const float* const q = p.q + static_cast<int64_t>(tile.row) * p.q_stride + blockIdx.y * kHeadDim;
#pragma unroll 4
        for (int i = threadIdx.x; i < kGroups * kBlockBytes / 16; i += kThreads) {
            const int row = i / kHeadDim * 8 + i % 8, dim = i % kHeadDim / 8 * 8;
            float4 a = make_float4(0.f, 0.f, 0.f, 0.f), b = a;
            if (row < tile.n_rows) {
                const float4* const from = reinterpret_cast<const float4*>(q + row * p.q_stride + dim);
                a = from[0], b = from[1];
            }
            const SplitPair pairs[4] = {split_query(a.x, a.y, factor), split_query(a.z, a.w, factor),
                                        split_query(b.x, b.y, factor), split_query(b.z, b.w, factor)};
            uint4* const to = reinterpret_cast<uint4*>(smem + row / PREFILL_ROWS * kBlockBytes + 16 * i);
            to[0] = make_uint4(pairs[0].hi, pairs[1].hi, pairs[2].hi, pairs[3].hi);
            to[kBlockBytes / 16] = make_uint4(pairs[0].lo, pairs[1].lo, pairs[2].lo, pairs[3].lo);
        }
    }

    // The ones; and 0 * NaN must not enter: where a block that belongs to a split is not copied, it is there as zeros.
    DEVICE_MEMBER void prepare_values(int first_block, int last_block) const {
        if (threadIdx.x < 64) reinterpret_cast<uint32_t*>(smem + kOnesAt)[threadIdx.x] = kOnes;
        if (first_block % 2 == 1 || last_block % 2 == 0)
            for (int i = threadIdx.x; i < kStages * kSplitBytes / 16; i += kThreads)
                reinterpret_cast<uint4*>(smem + kValuesAt)[i] = make_uint4(0, 0, 0, 0);
    }

    // Starts copying K or V of the blocks of a split that some row looks at, when all have read what is there. A warp.
    DEVICE_MEMBER void copy_split(Operand which, int split, int stage) const {
        const volatile Rare& of = rare();
        const int begin = max(2 * split, of.first_block), n = min(2 * split + 1, of.last_block) - begin + 1;
        const uint32_t full = barrier(which, stage);
        if (lane == 0) barrier_expect(full, n * kBlockBytes);
        __syncwarp();
        if (lane >= n) return;
        const int block = begin + lane;
        const uint16_t* const from = p.kv + kv_offset(of.table[block], of.head_kv, p.n_head_kv, kHeadDim);
        copy_bytes(full,
                   smem_at + (which == KEYS ? kKeysAt : kValuesAt) + stage * kSplitBytes + block % 2 * kBlockBytes,
                   which == KEYS ? from : from + KV_BLOCK * kHeadDim, kBlockBytes);
    }

    // This warp has read K or V of a split; the last one starts copying what comes in its place.
    DEVICE_MEMBER void give_back(Operand which, int split, int last_split, int stage) const {
        if (split + kStages > last_split) return;
        uint32_t before = 0;
        if (lane == 0) before = count_in_block(smem_at + kCountersAt + 4 * (2 * stage + which));
        before = __shfl_sync(0xffffffffu, before, 0);
        const int n = kGroups == 1 ? 4 : rare().n_warps;
        if (before % n == n - 1) copy_split(which, split + kStages, stage);
    }

    DEVICE_MEMBER void run(const AttentionTile& tile) const {
        const int window = p.window > 0 ? p.window : INT32_MAX;
        const int first_block = tile.position < window ? 0 : (tile.position - window + 1) / KV_BLOCK;
        const int last = tile.position + tile.n_rows - 1, last_block = last / KV_BLOCK;
        if (threadIdx.x == 0) {
            volatile Rare& of = rare();
            of.table = p.block_table + static_cast<int64_t>(tile.slot) * p.max_blocks;
            of.head_kv = blockIdx.y / (p.n_head / p.n_head_kv);
            of.first_block = first_block, of.last_block = last_block;
            of.n_keys = last % KV_BLOCK + 1, of.n_warps = (tile.n_rows + PREFILL_ROWS - 1) / PREFILL_ROWS * 4;
            for (int i = 0; i < 2 * kStages; i++) {
                barrier_init(smem_at + kBarriersAt + 8 * i, 1);
                reinterpret_cast<uint32_t*>(smem + kCountersAt)[i] = 0;
            }
            copy_barrier_fence();
        }
        const int first_split = first_block / 2, last_split = last_block / 2;
        if (threadIdx.x < 32) {
            __syncwarp();
            for (int i = 0; i < kStages && first_split + i <= last_split; i++) copy_split(KEYS, first_split + i, i);
        }
        load_q(tile);
        prepare_values(first_block, last_block);
        fence_async();
        __syncthreads();
        if (threadIdx.x < 32)
            for (int i = 0; i < kStages && first_split + i <= last_split; i++) copy_split(VALUES, first_split + i, i);

        const int group = threadIdx.x / 128, row0 = group * PREFILL_ROWS, position = tile.position + row0;
        const int warp_row = threadIdx.x % 128 / 32 * 16, row = warp_row + lane / 4;  // and row + 8
        if (row0 >= tile.n_rows) return;
        const uint64_t q = wgmma_eights(smem_at + group * 2 * kBlockBytes, 128, kTileBytes),
                       keys = wgmma_eights(smem_at + kKeysAt, 128, kTileBytes),
                       values = wgmma_eights(smem_at + kValuesAt, kTileBytes, 128),
                       ones = wgmma_eights(smem_at + kOnesAt, 128, 256);
        float acc[kPart] = {};
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
#pragma unroll 1
        for (int split = first_split, stage = 0, parity = 0; split <= last_split; split++) {
            const int key0 = split * ATTENTION_SPLIT;
            float s[64];  // 4 j + 2 half + e: of row + 8 half and key 8 j + 2 (lane % 4) + e
            copy_wait(barrier(KEYS, stage), parity);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                const uint64_t k = keys + stage * (kSplitBytes / 16) + step * kNextDims, high = q + step * kNextDims;
                wgmma_f16(s, high + kBlockBytes / 16, k, step > 0);
                wgmma_f16(s, high, k, 1);
            }
            wgmma_commit();
            wgmma_wait<0>();
            give_back(KEYS, split, last_split, stage);
            if (key0 + ATTENTION_SPLIT - 1 > position + warp_row || position + warp_row + 15 - key0 >= window) {
                const int behind0 = position + row - key0 - lane % 4 * 2;
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
            copy_wait(barrier(VALUES, stage), parity);
            if (split == last_split && rare().n_keys < KV_BLOCK) {
                clear_values(smem + kValuesAt + stage * kSplitBytes);
                fence_async();
                group_sync(1, 32 * rare().n_warps);
            }
            float part[kPart], total[4];
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 8; j++) {
                wgmma_f16(part, weight[j], values + stage * (kSplitBytes / 16) + j * kNextKeys, j > 0);
                wgmma_f16(total, weight[j], ones, j > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            give_back(VALUES, split, last_split, stage);
            sum[0] = add_split(sum[0], total[0], fade[0]);
            sum[1] = add_split(sum[1], total[2], fade[1]);
#pragma unroll
            for (int i = 0; i < kPart; i++) acc[i] = add_split(acc[i], part[i], fade[i / 2 % 2]);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row0 + row + 8 * half;
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

    // Positions behind the last hold values of other sequences, perhaps not finite. All that multiply.
    DEVICE_MEMBER void clear_values(uint8_t* split) const {
        const volatile Rare& of = rare();
        uint16_t* const v = reinterpret_cast<uint16_t*>(split + of.last_block % 2 * kBlockBytes) - KV_BLOCK * kHeadDim;
        for (int dim = threadIdx.x; dim < kHeadDim; dim += 32 * of.n_warps)
            for (int key = of.n_keys; key < KV_BLOCK; key++) v[kv_v_at(key, dim, kHeadDim)] = 0;
    }
};

template <int kHeadDim>
DEVICE void attention_warpgroup(const AttentionPrefillParams& p) {
    extern __shared__ __align__(128) uint8_t smem[];
    pdl_launch_dependents();
    pdl_wait();
    const AttentionTile tile = p.tiles[blockIdx.x];
    if (tile.n_rows > 0) PromptTile<kHeadDim>(p, smem).run(tile);
}

#define DEFINE(head_dim, n_resident)                                                         \
    extern "C" __global__ void __launch_bounds__(PromptTile<head_dim>::kThreads, n_resident) \
        attention_warpgroup_##head_dim(const __grid_constant__ AttentionPrefillParams p) {   \
        attention_warpgroup<head_dim>(p);                                                    \
    }

DEFINE(32, 2)
DEFINE(64, 2)
DEFINE(80, 3)
DEFINE(96, 3)
DEFINE(128, 2)

#endif
