// Attention of prefill rows over the paged cache by products of warpgroups: what attention_prefill.cu does, with its
// bits. For compute capability 9.0.
//
// Grid: y = query head, x = tile of up to 64 consecutive rows of one sequence; one warpgroup. The order of all sums is
// that of attention.cuh. The tile walks over the sequence's splits of two blocks of 64 positions. Both halves of q stay
// in shared memory; K and V of a split come there as they lie in the cache, which is how the tensor cores take them.
// Where the registers allow, the scores of the next split are made while the weights of this one are computed, and
// there are two places for K and for V. Else K of the next split comes while V is multiplied, V of the next one while
// its scores are made. A split of which no row of the tile looks at one block is worked on as a whole, with what is in
// that block's place, and no key that a row does not look at counts: weight 0. Several blocks share a multiprocessor,
// so that the products of one go on beside the exponentials of others.
// Operations: 6 * head_dim per (row, key, head); K and V are read once per tile and head, mostly from L2.
#include "attention.cuh"
#include "common/wgmma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

static constexpr int kThreads = 128;
static_assert(PREFILL_ROWS == 64 && KV_BLOCK == 64 && ATTENTION_SPLIT == 2 * KV_BLOCK);

template <int kHeadDim>
struct PromptTile {
    static constexpr bool kAhead = kHeadDim <= PREFILL_AHEAD_DIM;  // scores are made a split ahead
    static constexpr int kStages = kAhead ? 2 : 1;                 // places for K and for V of a split
    static constexpr int kTileBytes = 16 * kHeadDim, kBlockBytes = KV_BLOCK / 8 * kTileBytes;  // of q, K or V
    // V is followed by eight columns of ones in each tile: their sums are those of the weights.
    static constexpr int kValueTileBytes = kTileBytes + 128, kValuesBytes = ATTENTION_SPLIT / 8 * kValueTileBytes;
    static constexpr int kSteps = kHeadDim / 16, kPart = kHeadDim / 2 + 4;
    static constexpr int kKeysAt = 2 * kBlockBytes, kValuesAt = kKeysAt + kStages * 2 * kBlockBytes;
    static constexpr int kBarriersAt = kValuesAt + kStages * kValuesBytes;  // of K's places, then of V's
    // An operand's next 16 columns: of K and q 16 dimensions on, of V 16 keys.
    static constexpr int kNextDims = 2 * 128 / 16, kNextKeys = 2 * kValueTileBytes / 16;
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
        const int first_split = first_block / 2;
        const uint32_t smem_at = smem_address(smem), full = smem_at + kBarriersAt;
        const uint64_t q = wgmma_eights(smem_at, 128, kTileBytes);

        // A split's place, and the parity of its barriers' phase.
        const auto place = [&](int split) { return (split - first_split) % kStages; };
        const auto parity = [&](int split) { return (split - first_split) / kStages % 2; };
        const auto k_full = [&](int split) { return full + 8 * place(split); };
        const auto v_full = [&](int split) { return full + 8 * (kStages + place(split)); };

        // K and V of the blocks of a split that some row looks at come in quarters, of half a block, each by a thread
        // of a warp of its own, when all have read what is there; before, the first thread says how much will come.
        const int quarter = threadIdx.x / 32;
        const auto is_seen = [&](int block) { return block >= first_block && block <= last_block; };
        const auto expect = [&](uint32_t barrier, int split) {
            barrier_expect(barrier, (is_seen(2 * split) + is_seen(2 * split + 1)) * kBlockBytes);
        };
        const auto block_of = [&](int split) {
            const int block = 2 * split + quarter / 2;
            return is_seen(block) ? table[block] : -1;
        };
        const auto copy_quarter = [&](int split, int block, bool is_v) {
            if (block < 0) return;
            const uint16_t* from = p.kv + kv_offset(block, head_kv, p.n_head_kv, kHeadDim) +
                                   (2 * is_v + quarter % 2) * (KV_BLOCK / 2 * kHeadDim);
            if (!is_v) {
                const uint32_t to = smem_at + kKeysAt + (4 * place(split) + quarter) * (kBlockBytes / 2);
                copy_bytes(k_full(split), to, from, kBlockBytes / 2);
                return;
            }
            uint32_t to = smem_at + kValuesAt + place(split) * kValuesBytes + 4 * quarter * kValueTileBytes;
#pragma unroll
            for (int i = 0; i < 4; i++, from += 8 * kHeadDim, to += kValueTileBytes)
                copy_bytes(v_full(split), to, from, kTileBytes);
        };
        int next = -1, after = -1;  // blocks of the split whose V is copied next, and of the one behind it
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2 * kStages; i++) barrier_init(full + 8 * i, 1);
            copy_barrier_fence();
            expect(k_full(first_split), first_split);
            expect(v_full(first_split), first_split);
            if (kAhead && first_split < last_split) expect(k_full(first_split + 1), first_split + 1);
        }
        load_q();
        // 0 * NaN must not enter: where the first split of a place does not copy a block, there are zeros.
#pragma unroll
        for (int i = 0; i < kStages; i++) {
            const int split = first_split + i;
            uint8_t* const values = smem + kValuesAt + i * kValuesBytes;
            reinterpret_cast<uint4*>(values + (threadIdx.x / 8 + 1) * kValueTileBytes - 128)[threadIdx.x % 8] =
                make_uint4(kOnes, kOnes, kOnes, kOnes);
            if (split > last_split || (is_seen(2 * split) && is_seen(2 * split + 1))) continue;
            for (int j = threadIdx.x; j < ATTENTION_SPLIT / 8 * kHeadDim; j += kThreads)
                reinterpret_cast<uint4*>(values + j / kHeadDim * kValueTileBytes)[j % kHeadDim] =
                    make_uint4(0, 0, 0, 0);
        }
        static_assert(kThreads / 8 == ATTENTION_SPLIT / 8);
        fence_async();
        __syncthreads();
        if (lane == 0) {
            next = block_of(first_split);
            copy_quarter(first_split, next, false);
            copy_quarter(first_split, next, true);
            next = block_of(first_split + 1);
            if (kAhead) copy_quarter(first_split + 1, next, false);
            if (kAhead) after = block_of(first_split + 2);
        }

        float acc[kPart] = {}, part[kPart] = {};  // of all dimensions, then of the weights
        float top[2] = {-INFINITY, -INFINITY};
        uint32_t weight[8][4];                    // operands of 16 keys each
        Fade fade[2] = {{1.f, 0.f}, {1.f, 0.f}};  // of the sums in `part`

        // 4 j + 2 half + e: of row + 8 half and key 8 j + 2 (lane % 4) + e
        const auto start_scores = [&](float (&s)[64], int split) {
            const uint64_t keys = wgmma_eights(smem_at + kKeysAt + place(split) * 2 * kBlockBytes, 128, kTileBytes);
            copy_wait(k_full(split), parity(split));
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                const uint64_t k = keys + step * kNextDims, high = q + step * kNextDims;
                wgmma_f16(s, high + kBlockBytes / 16, k, step > 0);
                wgmma_f16(s, high, k, 1);
            }
            wgmma_commit();
        };
        const auto start_sums = [&](int split) {
            const uint32_t at = kValuesAt + place(split) * kValuesBytes;
            const uint64_t values = wgmma_eights(smem_at + at, kValueTileBytes, 128);
            copy_wait(v_full(split), parity(split));
            if (split == last_split && last % KV_BLOCK != KV_BLOCK - 1) {
                clear_values(smem + at + last_block % 2 * (kValuesBytes / 2), last % KV_BLOCK + 1);
                fence_async();
                __syncthreads();
            }
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 8; j++) wgmma_f16(part, weight[j], values + j * kNextKeys, j > 0);
            wgmma_commit();
        };
        const auto weigh = [&](float (&s)[64], int split) {
            const int key0 = split * ATTENTION_SPLIT;
            if (key0 + ATTENTION_SPLIT - 1 > tile.position + warp_row || last - key0 >= window) {
                const int behind0 = tile.position + row - key0 - lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < 64; i++) {
                    const int behind = behind0 + i / 2 % 2 * 8 - i / 4 * 8 - i % 2;
                    if (behind < 0 || behind >= window) s[i] = -INFINITY;
                }
            }
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
        };
        const auto add_sums = [&] {
#pragma unroll
            for (int i = 0; i < kPart; i++) acc[i] = add_split(acc[i], part[i], fade[i / 2 % 2]);
        };

        if constexpr (kAhead) {
            // Two arrays by turns would spare the copy, but ptxas then makes the products of both wait for each other.
            float s[64], then[64];
            start_scores(s, first_split);
            wgmma_wait<0>();
#pragma unroll 1
            for (int split = first_split; split < last_split; split++) {
                add_sums();
                if (threadIdx.x == 0) {
                    if (split + 2 <= last_split) expect(k_full(split + 2), split + 2);
                    expect(v_full(split + 1), split + 1);
                }
                __syncthreads();  // nobody reads K of this split or V of the one before any more
                start_scores(then, split + 1);
                if (lane == 0) {
                    copy_quarter(split + 2, after, false);
                    copy_quarter(split + 1, next, true);
                    next = after, after = block_of(split + 3);
                }
                weigh(s, split);
                start_sums(split);
                wgmma_wait<0>();
#pragma unroll
                for (int i = 0; i < 64; i++) s[i] = then[i];
            }
            add_sums();
            weigh(s, last_split);
            start_sums(last_split);
            wgmma_wait<0>();
            add_sums();
        } else {
#pragma unroll 1
            for (int split = first_split; split <= last_split; split++) {
                float s[64];
                start_scores(s, split);
                wgmma_wait<0>();
                if (threadIdx.x == 0 && split < last_split) expect(k_full(split + 1), split + 1);
                __syncthreads();  // nobody reads K any more
                if (lane == 0) copy_quarter(split + 1, next, false);
                weigh(s, split);
                start_sums(split);
                wgmma_wait<0>();
                add_sums();
                if (split == last_split) break;
                if (threadIdx.x == 0) expect(v_full(split + 1), split + 1);
                __syncthreads();  // nobody reads V any more
                if (lane == 0) {
                    copy_quarter(split + 1, next, true);
                    next = block_of(split + 2);
                }
            }
        }

#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + 8 * half;
            if (r >= tile.n_rows) continue;
            const float factor = softmax_factor(top[half], acc[kPart - 4 + 2 * half], sink_of(p.sinks, blockIdx.y));
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
                reinterpret_cast<uint16_t*>(v + key / 8 * kValueTileBytes + 16 * dim)[key % 8] = 0;
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

DEFINE(32, 2)
DEFINE(64, 2)
DEFINE(80, 2)
DEFINE(96, 3)
DEFINE(128, 2)

#endif
