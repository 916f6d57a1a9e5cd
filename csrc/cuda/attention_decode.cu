// Attention of one query row per sequence over the paged cache, split over the keys; with k and v given also what comes
// before it: rotation of q and k, and k and v into the cache. The order of all sums is that of attention.cuh.
//
//   out[h] = sum_j p[j] v[j] / (sum_j p[j] + exp(sink[h])),   p[j] = exp(scale * q[h] . k[j]),   j in the row's window
//
// Grid: z = row, y = KV head (times tiles of 16 query heads), x = splits in turn. The query heads of a KV head are the
// rows of the matrix products (mma.sync m16n8k16) and share the K and V that were read. A block works on up to `stages`
// splits at once: in the scores each of its eight warps has 16 keys of every split, in the sums the 8-wide tiles of
// head_dim are dealt to the warps, and between the two the weights pass through shared memory. So a warp has its tiles
// of all splits of the block, and a row of few splits is added up in registers. Longer ones leave their splits in the
// workspace, and the block that finishes last adds them (attention_merge.cuh).
//
// The row's own k and v never come from the cache: they are read with q, after the wait for earlier kernels. All the
// rest is on its way before that. Bytes: 4 * head_dim per key and KV head.
#include "attention_merge.cuh"
#include "rope.cuh"

static constexpr int kThreads = DECODE_THREADS, kWarps = kThreads / 32;
static constexpr int kSplit = ATTENTION_SPLIT;
static constexpr int kKeyPitch = 2 * kSplit + 16;  // bytes between dimensions of V, between heads of the weights
static constexpr int kLocalSplits = 2;             // a row of no more has one block: no way through memory
static_assert(kWarps * 16 == kSplit && kSplit == 2 * KV_BLOCK);

// Beside the dynamic shared memory.
template <int kHeadDim>
struct DecodeShared {
    uint16_t own[2][kHeadDim];                        // k and v of the row's own position, as in the cache
    float tops[DECODE_STAGES][DECODE_HEADS][kWarps];  // largest score of a warp's keys
    float2 turn[kHeadDim / 2];                        // cos, sin
    float sinks[DECODE_HEADS];                        // in base 2
    bool is_last;
};

template <int kHeadDim>
struct Decode {
    static constexpr int kDimPitch = 2 * kHeadDim + 16;  // bytes between keys of K, between heads of q
    static constexpr int kKBytes = kSplit * kDimPitch, kVBytes = kHeadDim * kKeyPitch;
    static constexpr int kStageBytes = kKBytes + kVBytes + DECODE_HEADS * kKeyPitch;
    static constexpr int kQBytes = DECODE_HEADS * kDimPitch;
    static constexpr int kHalf = kHeadDim / 2;
    static constexpr int kSteps = kHeadDim / 16;
    static constexpr int kDimTiles = kHeadDim / 8, kWarpTiles = (kDimTiles + kWarps - 1) / kWarps;
    static constexpr int kCopies = kSplit * kHeadDim / 8 / kThreads;  // 16 bytes each, of K or V of a split
    static constexpr int kRowFloats = kPartialFloats<kHeadDim>;
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128 && kThreads % 16 == 0);
    using Merge = SplitMerge<kHeadDim>;
    static_assert(Merge::kBytes <= kStageBytes);

    const AttentionDecodeParams& p;
    uint8_t* smem;  // [stages] K, V, weights; then q, upper and lower halves
    DecodeShared<kHeadDim>& shared;
    int warp, lane;
    int row, tile, head_kv, head0, n_heads;
    int first, last;                      // positions attended to
    int first_split, n_splits, n_blocks;  // blocks: that share the row
    const int32_t* table;

    // What the tensor cores leave in a thread: rows (heads) lane / 4 and + 8, columns 2 * (lane % 4) and + 1.
    struct Sums {
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
        float acc[kWarpTiles][4] = {};
    };

    DEVICE_MEMBER uint8_t* stage(int r) const { return smem + r * kStageBytes; }
    DEVICE_MEMBER uint8_t* weights(int r) const { return stage(r) + kKBytes + kVBytes; }
    DEVICE_MEMBER uint8_t* queries() const { return smem + p.stages * kStageBytes; }
    // Tile `t` of this warp, past the end for some.
    DEVICE_MEMBER int dim_tile(int t) const { return warp + t * kWarps; }
    DEVICE_MEMBER bool has_own() const { return (n_splits - 1) % n_blocks == (int)blockIdx.x; }

    // ---- copies

    // K of the two blocks of a split; a block that is not attended to may not exist.
    struct Blocks {
        const uint16_t *lower, *upper;
    };
    DEVICE_MEMBER const uint16_t* block_at(int index) const {
        const bool is_seen = index * KV_BLOCK <= last && index * KV_BLOCK + KV_BLOCK > first;
        return is_seen ? p.kv + kv_offset(table[index], head_kv, p.n_head_kv, kHeadDim) : p.kv;
    }
    DEVICE_MEMBER Blocks blocks_of(int split) const { return {block_at(2 * split), block_at(2 * split + 1)}; }

    // Earlier positions of the split; what lies at others in shared memory is masked.
    DEVICE_MEMBER void copy_k(int r, int split, const Blocks& blocks) const {
        constexpr int kParts = kHeadDim / 8, kBlockParts = KV_BLOCK * kParts;
        const uint32_t to = smem_address(stage(r));
#pragma unroll 1
        for (int i = 0; i < kCopies; i++) {
            const int at = i * kThreads + threadIdx.x, key = at / kParts;
            const uint16_t* from = at < kBlockParts ? blocks.lower : blocks.upper - kBlockParts * 8;
            const int position = split * kSplit + key;
            if (position >= first && position < last)
                cp_async_16(to + key * kDimPitch + at % kParts * 16, from + at * 8);
        }
    }

    // All of the split, zeros where eight positions are not attended to.
    DEVICE_MEMBER void copy_v(int r, int split, const Blocks& blocks) const {
        const uint32_t to = smem_address(stage(r) + kKBytes);
        const int key = threadIdx.x % 16 * 8, position = split * kSplit + key;
        const bool is_seen = position <= last && position + 7 >= first;
        const uint16_t* from = (key < KV_BLOCK ? blocks.lower : blocks.upper) + KV_BLOCK * kHeadDim + key % KV_BLOCK;
#pragma unroll 1
        for (int i = 0; i < kCopies; i++) {
            const int dim = i * (kThreads / 16) + threadIdx.x / 16;
            cp_async_16_zfill(to + dim * kKeyPitch + key * 2, is_seen ? from + dim * KV_BLOCK : p.kv, is_seen ? 16 : 0);
        }
    }

    // The thread that copied the eight positions around the row's own puts this one in, and zeros behind it: there lie
    // values of other sequences, perhaps not finite, and 0 * NaN must not enter.
    DEVICE_MEMBER void mend_v(int r, int split) const {
        const int own = last - split * kSplit;  // the row's last split is the last of its round
        if (own >= kSplit || (int)threadIdx.x % 16 != own / 8) return;
        const int keep = own % 8;
        uint32_t mask[4];
#pragma unroll
        for (int i = 0; i < 4; i++) mask[i] = keep >= 2 * i + 2 ? 0xffffffffu : keep == 2 * i + 1 ? 0xffffu : 0u;
#pragma unroll
        for (int i = 0; i < kCopies; i++) {
            const int dim = i * (kThreads / 16) + threadIdx.x / 16;
            uint4* at = reinterpret_cast<uint4*>(stage(r) + kKBytes + dim * kKeyPitch + own / 8 * 16);
            const uint32_t value = static_cast<uint32_t>(shared.own[1][dim]) << keep % 2 * 16;
            uint4 v = *at;
            v.x = (v.x & mask[0]) | (keep / 2 == 0 ? value : 0u);
            v.y = (v.y & mask[1]) | (keep / 2 == 1 ? value : 0u);
            v.z = (v.z & mask[2]) | (keep / 2 == 2 ? value : 0u);
            v.w = (v.w & mask[3]) | (keep / 2 == 3 ? value : 0u);
            *at = v;
        }
    }

    // ---- q, and k and v of the row's own position

    DEVICE_MEMBER void compute_turns(int slot) const {
        const int half_rot = p.k ? p.n_rot / 2 : 0;
        if ((int)threadIdx.x >= half_rot) return;
        const int from = p.rope_tables ? p.rope_tables[slot] * half_rot : 0;
        shared.turn[threadIdx.x] = rope_turn(last, p.inv_freq[from + threadIdx.x], p.mscale);
    }

    DEVICE_MEMBER void clear_queries() const {  // rows of the products that stand for no head
        for (int i = threadIdx.x; i < 2 * kQBytes / 16; i += kThreads)
            reinterpret_cast<uint4*>(queries())[i] = make_uint4(0u, 0u, 0u, 0u);
    }

    // A thread has the same pair of dimensions of several heads of q; some threads also have it of k, others of v.
    DEVICE_MEMBER void load_row() const {
        constexpr int kPairs = kHalf <= 16 ? 16 : kHalf <= 32 ? 32 : 64;
        constexpr int kPassHeads = kThreads / kPairs, kPasses = DECODE_HEADS / kPassHeads;
        const int pair = threadIdx.x % kPairs, head = threadIdx.x / kPairs;
        const bool is_v = head == kPassHeads - 1;
        const bool is_own = pair < kHalf && head >= kPassHeads - 2 && has_own();
        const int n = pair < kHalf ? n_heads - head : 0;  // heads from this one on
        const RopePair at = rope_pair(pair, p.k ? p.n_rot / 2 : 0, p.rope_type);
        const float2 turn = shared.turn[pair < kHalf ? pair : 0];
        const float factor = query_factor(p.scale);
        const float* q = p.q + (int64_t)row * p.q_stride + (head0 + head) * kHeadDim;
        const float* own = is_v ? p.v + (int64_t)row * p.v_stride : p.k + (int64_t)row * p.k_stride;
        own += head_kv * kHeadDim;
        uint8_t* to_q = queries() + head * kDimPitch;
        // Where k and v lie in the cache: the first element, and from one dimension to the next.
        uint16_t* cache = nullptr;
        if (is_own) {
            const int block = table[last / KV_BLOCK], in_block = last % KV_BLOCK;
            if (block >= 0)
                cache = p.kv + kv_offset(block, head_kv, p.n_head_kv, kHeadDim) +
                        (is_v ? KV_BLOCK * kHeadDim + in_block : in_block * kHeadDim);
        }
        const int step = is_v ? KV_BLOCK : 1;
        pdl_wait();

        float2 x[kPasses], y = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < kPasses; i++) {  // all loads first
            if (i * kPassHeads >= n) break;
            const float* from = q + i * kPassHeads * kHeadDim;
            x[i] = make_float2(from[at.first], from[at.second]);
        }
        uint32_t stored[2] = {};
        if (is_own && p.k)
            y = make_float2(own[at.first], own[at.second]);
        else if (cache)
            stored[0] = cache[at.first * step], stored[1] = cache[at.second * step];
#pragma unroll
        for (int i = 0; i < kPasses; i++) {
            if (i * kPassHeads >= n) break;
            const float2 turned = at.is_rotated ? rotate(x[i].x, x[i].y, turn) : x[i];
            const SplitPair halves = split_query(turned.x, turned.y, factor);
            uint16_t* to = reinterpret_cast<uint16_t*>(to_q + i * kPassHeads * kDimPitch);
            to[at.first] = static_cast<uint16_t>(halves.hi), to[at.second] = halves.hi >> 16;
            to += kQBytes / 2;
            to[at.first] = static_cast<uint16_t>(halves.lo), to[at.second] = halves.lo >> 16;
        }
        if (!is_own) return;
        if (p.k) {
            if (at.is_rotated && !is_v) y = rotate(y.x, y.y, turn);
            stored[0] = to_cache(y.x), stored[1] = to_cache(y.y);
            if (tile == 0 && cache) cache[at.first * step] = stored[0], cache[at.second * step] = stored[1];
        }
        shared.own[is_v][at.first] = stored[0], shared.own[is_v][at.second] = stored[1];
    }

    // ---- splits index, index + n_blocks, ... (n of them, in stages 0, 1, ...)

    DEVICE_MEMBER int split_at(int index, int r) const { return first_split + index + r * n_blocks; }

    // Scores of this warp's 16 keys of each split, masked; their maxima go to shared memory.
    DEVICE_MEMBER void score(float (&s)[DECODE_STAGES][2][4], int index, int n) const {
        // ldmatrix: the lane's row of its 8x8 matrix of keys; rows +8 from matrix 2 on, columns +8 in odd matrices
        const int key = warp * 16 + lane % 8 + lane / 16 * 8;
        uint32_t k[DECODE_STAGES];
#pragma unroll
        for (int r = 0; r < DECODE_STAGES; r++) {
            const bool is_own = split_at(index, r) * kSplit + key == last;
            const uint8_t* from = stage(r) + key * kDimPitch;
            if (is_own) from = reinterpret_cast<const uint8_t*>(shared.own[0]);
            k[r] = smem_address(from) + lane / 8 % 2 * 16;
        }
        const uint32_t q = smem_address(queries()) + operand_row() * kDimPitch + lane / 16 * 16;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            uint32_t hi[4], lo[4];
            ldmatrix_x4(lo, q + kQBytes + step * 32);
            ldmatrix_x4(hi, q + step * 32);
#pragma unroll
            for (int r = 0; r < DECODE_STAGES; r++) {
                if (r >= n) break;
                uint32_t b[4];
                ldmatrix_x4(b, k[r] + step * 32);
                mma_f16(s[r][0], lo, b[0], b[1]);
                mma_f16(s[r][1], lo, b[2], b[3]);
                mma_f16(s[r][0], hi, b[0], b[1]);
                mma_f16(s[r][1], hi, b[2], b[3]);
            }
        }
#pragma unroll
        for (int r = 0; r < DECODE_STAGES; r++) {
            if (r >= n) break;
            const int position = split_at(index, r) * kSplit + warp * 16 + lane % 4 * 2;
            float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int at = position + i / 4 * 8 + i % 2;
                float& x = s[r][i / 4][i % 4];
                if (at < first || at > last) x = -INFINITY;
                most[i / 2 % 2] = fmaxf(most[i / 2 % 2], x);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 1));
                most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 2));
                if (lane % 4 == 0) shared.tops[r][lane / 4 + 8 * half][warp] = most[half];
            }
        }
    }

    // Scores to weights in shared memory; `parts` get the maxima.
    DEVICE_MEMBER void weigh(const float (&s)[DECODE_STAGES][2][4], Sums (&parts)[DECODE_STAGES], int n) const {
#pragma unroll
        for (int r = 0; r < DECODE_STAGES; r++) {
            if (r >= n) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int head = lane / 4 + 8 * half;
                float top = -INFINITY;
#pragma unroll
                for (int w = 0; w < kWarps; w += 4) {
                    const float4 x = *reinterpret_cast<const float4*>(&shared.tops[r][head][w]);
                    top = fmaxf(top, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
                }
                parts[r].top[half] = top;
                const float base = exponent_base(top);
                uint8_t* to = weights(r) + head * kKeyPitch + warp * 32 + lane % 4 * 4;
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    const float* x = s[r][t] + 2 * half;
                    *reinterpret_cast<uint32_t*>(to + t * 16) = pack_f16(weight_of(x[0], base), weight_of(x[1], base));
                }
            }
        }
    }

    // The splits' sums of weights and of V, this warp's tiles of head_dim.
    DEVICE_MEMBER void accumulate(Sums (&parts)[DECODE_STAGES], int n) const {
        float total[DECODE_STAGES][4] = {};
        const uint32_t to_weights = operand_row() * kKeyPitch + lane / 16 * 16;
        const uint32_t to_v = lane % 8 * kKeyPitch + lane / 8 * 16;
#pragma unroll
        for (int j = 0; j < kSplit / 32; j++) {
#pragma unroll
            for (int r = 0; r < DECODE_STAGES; r++) {
                if (r >= n) break;
                uint32_t a[2][4];
                ldmatrix_x4(a[0], smem_address(weights(r)) + to_weights + j * 64);
                ldmatrix_x4(a[1], smem_address(weights(r)) + to_weights + j * 64 + 32);
#pragma unroll
                for (int t = 0; t < kWarpTiles; t++) {
                    if (kDimTiles % kWarps != 0 && dim_tile(t) >= kDimTiles) break;
                    uint32_t b[4];
                    ldmatrix_x4(b, smem_address(stage(r) + kKBytes) + dim_tile(t) * 8 * kKeyPitch + to_v + j * 64);
                    mma_f16(parts[r].acc[t], a[0], b[0], b[1]);
                    mma_f16(parts[r].acc[t], a[1], b[2], b[3]);
                }
                mma_f16(total[r], a[0], kOnes, kOnes);
                mma_f16(total[r], a[1], kOnes, kOnes);
            }
        }
#pragma unroll
        for (int r = 0; r < DECODE_STAGES; r++) parts[r].sum[0] = total[r][0], parts[r].sum[1] = total[r][2];
    }

    DEVICE_MEMBER int operand_row() const { return lane % 8 + lane / 8 % 2 * 8; }  // ldmatrix of an A operand

    static DEVICE_MEMBER void add(Sums& to, const Sums& part) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Fade f = fade_of(to.top[half], part.top[half]);
            to.sum[half] = add_split(to.sum[half], part.sum[half], f);
#pragma unroll
            for (int t = 0; t < kWarpTiles; t++) {
                to.acc[t][2 * half] = add_split(to.acc[t][2 * half], part.acc[t][2 * half], f);
                to.acc[t][2 * half + 1] = add_split(to.acc[t][2 * half + 1], part.acc[t][2 * half + 1], f);
            }
        }
    }

    // ---- results

    DEVICE_MEMBER float* partial_row(int head, int split) const {
        return p.partial + (((int64_t)row * p.n_head + head0 + head) * p.max_splits + split) * kRowFloats;
    }
    DEVICE_MEMBER float* out_row(int head) const {
        return p.out + (int64_t)row * p.out_stride + (head0 + head) * kHeadDim;
    }

    // sums * factor to the rows that `row_of(head)` gives.
    template <class RowOf>
    DEVICE_MEMBER void store(const Sums& x, const float (&factor)[2], RowOf row_of) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int head = lane / 4 + 8 * half;
            if (head >= n_heads) continue;
            float* to = row_of(head) + lane % 4 * 2;
#pragma unroll
            for (int t = 0; t < kWarpTiles; t++) {
                if (kDimTiles % kWarps != 0 && dim_tile(t) >= kDimTiles) break;
                *reinterpret_cast<float2*>(to + dim_tile(t) * 8) = make_float2(
                    __fmul_rn(x.acc[t][2 * half], factor[half]), __fmul_rn(x.acc[t][2 * half + 1], factor[half]));
            }
        }
    }

    DEVICE_MEMBER void store_part(const Sums& x, int split) const {
        const float one[2] = {1.f, 1.f};
        store(x, one, [&](int head) { return partial_row(head, split); });
        if (warp != 0 || lane % 4 != 0) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int head = lane / 4 + 8 * half;
            if (head < n_heads)
                *reinterpret_cast<float4*>(partial_row(head, split) + kHeadDim) =
                    make_float4(x.top[half], x.sum[half], 0.f, 0.f);
        }
    }

    DEVICE_MEMBER void store_out(const Sums& x) const {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++)
            factor[half] = softmax_factor(x.top[half], x.sum[half], shared.sinks[lane / 4 + 8 * half]);
        store(x, factor, [&](int head) { return out_row(head); });
    }

    // Whether this block is the last of `n_blocks` to come here for its row and heads; leaves the counter zero.
    DEVICE_MEMBER bool is_last_block() const {
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t* counter = p.counters + (int64_t)row * gridDim.y + blockIdx.y;
            shared.is_last = atomic_add_acq_rel(counter, 1) == n_blocks - 1u;
            if (shared.is_last) *counter = 0u;
        }
        __syncthreads();
        return shared.is_last;
    }

    // ---- the whole

    // f(r) for the first n stages; r is known at compile time.
    template <class F>
    static DEVICE_MEMBER void for_stages(int n, F f) {
#pragma unroll
        for (int r = 0; r < DECODE_STAGES; r++)
            if (r < n) f(r);
    }

    DEVICE_MEMBER int round_size(int index) const {
        const int left = (n_splits - index + n_blocks - 1) / n_blocks;
        return left < p.stages ? left : p.stages;
    }

    DEVICE_MEMBER void run() {
        const int tiles = decode_head_tiles(p.n_head, p.n_head_kv), group = p.n_head / p.n_head_kv;
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        row = blockIdx.z, tile = blockIdx.y % tiles, head_kv = blockIdx.y / tiles;
        head0 = head_kv * group + tile * DECODE_HEADS;
        n_heads = group - tile * DECODE_HEADS < DECODE_HEADS ? group - tile * DECODE_HEADS : DECODE_HEADS;
        const int slot = p.slots[row];
        last = p.positions[row];
        if (slot < 0) {
            pdl_wait();
            for (int i = threadIdx.x; blockIdx.x == 0 && i < n_heads * kHeadDim; i += kThreads) out_row(0)[i] = 0.f;
            return;
        }
        table = p.block_table + (int64_t)slot * p.max_blocks;
        first = p.window > 0 && last >= p.window ? last - p.window + 1 : 0;
        first_split = first / kSplit, n_splits = last / kSplit - first_split + 1;
        n_blocks = n_splits <= kLocalSplits ? 1 : n_splits < (int)gridDim.x ? n_splits : gridDim.x;
        if ((int)blockIdx.x >= n_blocks) {
            pdl_wait();
            return;
        }
        int index = blockIdx.x, n = round_size(index);
        Blocks blocks[DECODE_STAGES];  // of all stages at once: one way to memory
#pragma unroll
        for (int r = 0; r < DECODE_STAGES; r++)
            if (r < n) blocks[r] = blocks_of(split_at(index, r));
        for_stages(n, [&](int r) { copy_k(r, split_at(index, r), blocks[r]); });
        cp_async_commit();
        for_stages(n, [&](int r) { copy_v(r, split_at(index, r), blocks[r]); });
        cp_async_commit();
        clear_queries();
        compute_turns(slot);
        if ((int)threadIdx.x < n_heads) shared.sinks[threadIdx.x] = sink_of(p.sinks, head0 + threadIdx.x);
        __syncthreads();
        load_row();

        Sums all;
        while (true) {
            const int next = index + n * n_blocks, n_next = next < n_splits ? round_size(next) : 0;
            float s[DECODE_STAGES][2][4] = {};
            Sums parts[DECODE_STAGES];
            cp_async_wait<1>();
            __syncthreads();  // K is complete, and q
            score(s, index, n);
            __syncthreads();  // the maxima are there, and nobody reads K any more
            for_stages(n_next, [&](int r) {
                blocks[r] = blocks_of(split_at(next, r));
                copy_k(r, split_at(next, r), blocks[r]);
            });
            cp_async_commit();
            weigh(s, parts, n);
            cp_async_wait<1>();
            mend_v(n - 1, split_at(index, n - 1));
            __syncthreads();  // V is complete, and the weights
            accumulate(parts, n);
#pragma unroll
            for (int r = 0; r < DECODE_STAGES; r++) {
                if (r >= n) break;
                if (n_blocks == 1)
                    add(all, parts[r]);
                else
                    store_part(parts[r], split_at(index, r) - first_split);
            }
            if (n_next == 0) break;
            __syncthreads();  // nobody reads V and the weights any more
            for_stages(n_next, [&](int r) { copy_v(r, split_at(next, r), blocks[r]); });
            cp_async_commit();
            index = next, n = n_next;
        }
        if (n_blocks == 1)
            store_out(all);
        else if (is_last_block())
            Merge{partial_row(0, 0), out_row(0), shared.sinks, p.max_splits, n_heads, n_splits}.run(smem);
    }
};

template <int kHeadDim>
DEVICE void attention_decode(const AttentionDecodeParams& p) {
    extern __shared__ __align__(16) uint8_t smem[];
    __shared__ __align__(16) DecodeShared<kHeadDim> shared;
    pdl_launch_dependents();
    Decode<kHeadDim> decode{p, smem, shared};
    decode.run();
}

#define INSTANTIATE(head_dim)                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)                          \
        attention_decode_##head_dim(const __grid_constant__ AttentionDecodeParams p) { \
        attention_decode<head_dim>(p);                                                 \
    }

INSTANTIATE(32)
INSTANTIATE(64)
INSTANTIATE(80)
INSTANTIATE(96)
INSTANTIATE(128)
