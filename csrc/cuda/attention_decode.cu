// Attention of one query row per sequence over the paged cache, split over the keys; with k and v given also what comes
// before it: rotation of q and k, and k and v into the cache. The order of all sums is that of attention.cuh.
//
//   out[h] = sum_j p[j] v[j] / (sum_j p[j] + exp(sink[h])),   p[j] = exp(scale * q[h] . k[j]),   j in the row's window
//
// Grid: z = row, y = KV head (times tiles of 16 query heads), x = splits in turn. The query heads of a KV head are the
// rows of the matrix products (mma.sync m16n8k16) and share the K and V that were read.
//
// A block is one or two groups of eight warps, which take its splits in turn, each with one or two stages of shared
// memory for K and V. In the scores a warp has 16 keys, in the sums the 8-wide tiles of head_dim are dealt to the
// warps, and between the two the weights pass through shared memory. A row of few splits is added up in registers; of
// longer ones every split is left in the workspace, and the block that finishes last adds them (attention_merge.cuh).
//
// The row's own k and v never come from the cache: they are read with q, after the wait for earlier kernels. All the
// rest is on its way before that, as it lies in the cache: each warp copies K of 16 positions, and V.
// Bytes: 4 * head_dim per key and KV head.
#include "attention_merge.cuh"
#include "rope.cuh"

static constexpr int kGroupThreads = DECODE_THREADS, kWarps = kGroupThreads / 32;  // warps of a group
static constexpr int kMaxThreads = DECODE_GROUPS * kGroupThreads;
static constexpr int kSplit = ATTENTION_SPLIT;
static constexpr int kWeightPitch = 2 * kSplit + 16;  // bytes between heads of the weights
static constexpr int kLocalSplits = 2;                // a row of no more has one block: no way through memory
static_assert(kWarps * 16 == kSplit && kSplit == 2 * KV_BLOCK);

// Beside the dynamic shared memory.
template <int kHeadDim>
struct DecodeShared {
    uint16_t own_k[kHeadDim / 8][8][8];  // of the row's own position in place 0 of eight
    uint16_t own_v[kHeadDim];
    float tops[DECODE_GROUPS][DECODE_HEADS][kWarps];  // largest score of a warp's keys
    float2 turn[kHeadDim / 2];                        // cos, sin
    float sinks[DECODE_HEADS];                        // in base 2
    bool is_last;
};

template <int kHeadDim>
struct Decode {
    static constexpr int kQPitch = 2 * kHeadDim + 16;  // bytes between heads of q
    static constexpr int kTileBytes = 16 * kHeadDim;   // of K or V of 8 positions
    static constexpr int kSplitBytes = kSplit / 8 * kTileBytes, kStageBytes = 2 * kSplitBytes;  // K, then V
    static constexpr int kWeightBytes = DECODE_HEADS * kWeightPitch;
    static constexpr int kQBytes = DECODE_HEADS * kQPitch;
    static constexpr int kHalf = kHeadDim / 2;
    static constexpr int kSteps = kHeadDim / 16;
    static constexpr int kDimTiles = kHeadDim / 8, kWarpTiles = (kDimTiles + kWarps - 1) / kWarps;
    static constexpr int kRowFloats = kPartialFloats<kHeadDim>;
    static_assert(kHeadDim % 16 == 0 && kHeadDim <= 128);
    using Merge = SplitMerge<kHeadDim>;
    static_assert(Merge::kBytes <= kStageBytes);

    const AttentionDecodeParams& p;
    uint8_t* smem;  // stages; weights of each group; upper and lower halves of q; barriers
    DecodeShared<kHeadDim>& shared;
    int group, thread, warp, lane;  // thread and warp in their group
    int row, tile, head_kv, head0, n_heads;
    int first, last;                      // positions attended to
    int first_split, n_splits, n_blocks;  // blocks: that share the row
    const int32_t* table;

    // What the tensor cores leave in a thread: rows (heads) lane / 4 and + 8, columns 2 * (lane % 4) and + 1.
    struct Sums {
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
        float acc[kWarpTiles][4] = {};
    };

    DEVICE_MEMBER uint8_t* stage(int s) const { return smem + (group * p.depth + s) * kStageBytes; }
    DEVICE_MEMBER uint8_t* weights() const { return smem + p.groups * p.depth * kStageBytes + group * kWeightBytes; }
    DEVICE_MEMBER uint8_t* queries() const { return smem + p.groups * (p.depth * kStageBytes + kWeightBytes); }
    DEVICE_MEMBER uint32_t barrier(int s, bool is_v) const {
        return smem_address(queries() + 2 * kQBytes) + 8 * (2 * (group * p.depth + s) + is_v);
    }
    DEVICE_MEMBER int n_threads() const { return p.groups * kGroupThreads; }
    DEVICE_MEMBER void group_wait() const { group_sync(1 + group, kGroupThreads); }
    // Tile `t` of this warp, past the end for some.
    DEVICE_MEMBER int dim_tile(int t) const { return warp + t * kWarps; }
    DEVICE_MEMBER bool has_own() const { return (n_splits - 1) % n_blocks == (int)blockIdx.x; }

    // ---- splits: round i of the group

    DEVICE_MEMBER int split_of(int i) const { return first_split + blockIdx.x + (group + i * p.groups) * n_blocks; }
    DEVICE_MEMBER bool has_round(int i) const { return split_of(i) < first_split + n_splits; }

    // ---- copies

    // This warp's part of a split: K of its 16 positions in the cache, in tiles of 8, as far as they are attended to.
    // A block that is not may not exist.
    struct Part {
        const uint16_t* k;
        int n_tiles;
    };
    DEVICE_MEMBER Part part_of(int split) const {
        const int position = split * kSplit + warp * 16;
        const int n_tiles = min((last - position + 8) / 8, 2);
        if (position > last || position + 16 <= first) return {nullptr, 0};  // as in accumulate()
        const int block = table[position / KV_BLOCK], tile = position % KV_BLOCK / 8;
        return {p.kv + kv_offset(block, head_kv, p.n_head_kv, kHeadDim) + tile * (kTileBytes / 2), n_tiles};
    }
    DEVICE_MEMBER void copy(const Part& part, int s, bool is_v) const {
        const uint32_t to = smem_address(stage(s)) + is_v * kSplitBytes + warp * 2 * kTileBytes;
        if (part.n_tiles > 0)
            copy_to_smem<L2::KEPT>(barrier(s, is_v), to, part.k + is_v * KV_BLOCK * kHeadDim, part.n_tiles * kTileBytes,
                                   lane);
        else
            copy_nothing(barrier(s, is_v), lane);
    }

    // The row's own position in V of its split: a thread has a dimension of its tile. What lies behind it there are
    // values of other sequences, perhaps not finite, and 0 * NaN must not enter.
    struct Own {
        uint32_t at;         // from V of the stage
        uint32_t before[4];  // masks of the positions before it
        bool has_next;       // the tile that is multiplied together with its own follows, and was not copied
    };
    DEVICE_MEMBER Own own_place() const {
        const int own = last % kSplit, n = own % 8;
        Own place = {own / 8 * kTileBytes + thread * 16u, {}, own / 8 % 2 == 0};
#pragma unroll
        for (int i = 0; i < 4; i++) place.before[i] = n >= 2 * i + 2 ? 0xffffffffu : n == 2 * i + 1 ? 0xffffu : 0u;
        return place;
    }
    DEVICE_MEMBER void mend_v(const Own& own, int s) const {
        if (thread >= kHeadDim) return;
        const uint32_t at = smem_address(stage(s)) + kSplitBytes + own.at;
        uint4 x = load_shared_uint4(at);
        x.x &= own.before[0], x.y &= own.before[1], x.z &= own.before[2], x.w &= own.before[3];
        store_shared(at, x);
        *reinterpret_cast<uint16_t*>(stage(s) + kSplitBytes + own.at + last % 8 * 2) = shared.own_v[thread];
        if (own.has_next) store_shared(at + kTileBytes, make_uint4(0u, 0u, 0u, 0u));
    }

    // ---- q, and k and v of the row's own position

    DEVICE_MEMBER int half_rot() const { return p.k ? p.n_rot / 2 : 0; }
    // Of the thread's pair, where all sequences turn alike.
    DEVICE_MEMBER float common_frequency() const {
        return (int)threadIdx.x < half_rot() && !p.rope_tables ? p.inv_freq[threadIdx.x] : 0.f;
    }
    DEVICE_MEMBER void compute_turns(int slot, float frequency) const {
        if ((int)threadIdx.x >= half_rot()) return;
        if (p.rope_tables) frequency = p.inv_freq[p.rope_tables[slot] * half_rot() + threadIdx.x];
        shared.turn[threadIdx.x] = rope_turn(last, frequency, p.mscale);
    }

    DEVICE_MEMBER void clear_queries() const {  // rows of the products that stand for no head
        for (int i = threadIdx.x; i < 2 * kQBytes / 16; i += n_threads())
            reinterpret_cast<uint4*>(queries())[i] = make_uint4(0u, 0u, 0u, 0u);
    }

    // A thread has the same pair of dimensions of several heads of q; some threads also have it of k, others of v.
    DEVICE_MEMBER void load_row(int own_block) const {
        constexpr int kPairs = kHalf <= 16 ? 16 : kHalf <= 32 ? 32 : 64;
        constexpr int kMostPasses = DECODE_HEADS / (kGroupThreads / kPairs);
        const int pass_heads = p.groups * (kGroupThreads / kPairs);
        const int pair = threadIdx.x % kPairs, head = threadIdx.x / kPairs;
        const bool is_v = head == pass_heads - 1;
        const bool is_own = pair < kHalf && head >= pass_heads - 2 && has_own();
        const int n = pair < kHalf ? n_heads - head : 0;  // heads from this one on
        const RopePair at = rope_pair(pair, half_rot(), p.rope_type);
        const float2 turn = shared.turn[pair < kHalf ? pair : 0];
        const float factor = query_factor(p.scale);
        const float* q = p.q + (int64_t)row * p.q_stride + (head0 + head) * kHeadDim;
        const float* own = is_v ? p.v + (int64_t)row * p.v_stride : p.k + (int64_t)row * p.k_stride;
        own += head_kv * kHeadDim;
        uint8_t* to_q = queries() + head * kQPitch;
        // where k and v lie in the cache
        uint16_t *first_at = nullptr, *second_at = nullptr;
        if (is_own) {
            const int in_block = last % KV_BLOCK;
            if (own_block >= 0) {
                uint16_t* cache = p.kv + kv_offset(own_block, head_kv, p.n_head_kv, kHeadDim);
                first_at =
                    cache + (is_v ? kv_v_at(in_block, at.first, kHeadDim) : kv_k_at(in_block, at.first, kHeadDim));
                second_at =
                    cache + (is_v ? kv_v_at(in_block, at.second, kHeadDim) : kv_k_at(in_block, at.second, kHeadDim));
            }
        }
        pdl_wait();

        float2 x[kMostPasses], y = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < kMostPasses; i++) {  // all loads first
            if (i * pass_heads >= n) break;
            const float* from = q + i * pass_heads * kHeadDim;
            x[i] = make_float2(from[at.first], from[at.second]);
        }
        uint32_t stored[2] = {};
        if (is_own && p.k)
            y = make_float2(own[at.first], own[at.second]);
        else if (first_at)
            stored[0] = *first_at, stored[1] = *second_at;
#pragma unroll
        for (int i = 0; i < kMostPasses; i++) {
            if (i * pass_heads >= n) break;
            const float2 turned = at.is_rotated ? rotate(x[i].x, x[i].y, turn) : x[i];
            const SplitPair halves = split_query(turned.x, turned.y, factor);
            uint16_t* to = reinterpret_cast<uint16_t*>(to_q + i * pass_heads * kQPitch);
            to[at.first] = static_cast<uint16_t>(halves.hi), to[at.second] = halves.hi >> 16;
            to += kQBytes / 2;
            to[at.first] = static_cast<uint16_t>(halves.lo), to[at.second] = halves.lo >> 16;
        }
        if (!is_own) return;
        if (p.k) {
            if (at.is_rotated && !is_v) y = rotate(y.x, y.y, turn);
            stored[0] = to_cache(y.x), stored[1] = to_cache(y.y);
            if (tile == 0 && first_at) *first_at = stored[0], *second_at = stored[1];
        }
        if (is_v)
            shared.own_v[at.first] = stored[0], shared.own_v[at.second] = stored[1];
        else
            own_k(at.first) = stored[0], own_k(at.second) = stored[1];
    }

    DEVICE_MEMBER uint16_t& own_k(int dim) const { return shared.own_k[dim / 8][0][dim % 8]; }

    // ---- one split

    // Scores of this warp's 16 keys, masked; their maxima go to shared memory.
    DEVICE_MEMBER void score(float (&s)[2][4], int st, int split) const {
        // ldmatrix: the lane's row of its 8x8 matrix of keys; rows +8 from matrix 2 on, columns +8 in odd matrices
        const int key = warp * 16 + lane % 8 + lane / 16 * 8;
        uint32_t k = smem_address(stage(st)) + key / 8 * kTileBytes + lane % 8 * 16;
        if (split * kSplit + key == last) k = smem_address(shared.own_k);
        k += lane / 8 % 2 * 128;
        const uint32_t q = smem_address(queries()) + operand_row() * kQPitch + lane / 16 * 16;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            uint32_t hi[4], lo[4], b[4];
            ldmatrix_x4(lo, q + kQBytes + step * 32);
            ldmatrix_x4(hi, q + step * 32);
            ldmatrix_x4(b, k + step * 256);
            mma_f16(s[0], lo, b[0], b[1]);
            mma_f16(s[1], lo, b[2], b[3]);
            mma_f16(s[0], hi, b[0], b[1]);
            mma_f16(s[1], hi, b[2], b[3]);
        }
        const int position = split * kSplit + warp * 16 + lane % 4 * 2;
        float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int at = position + i / 4 * 8 + i % 2;
            float& x = s[i / 4][i % 4];
            if (at < first || at > last) x = -INFINITY;
            most[i / 2 % 2] = fmaxf(most[i / 2 % 2], x);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 1));
            most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 2));
            if (lane % 4 == 0) shared.tops[group][lane / 4 + 8 * half][warp] = most[half];
        }
    }

    // Scores to weights in shared memory; `part` gets the maxima.
    DEVICE_MEMBER void weigh(const float (&s)[2][4], Sums& part) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int head = lane / 4 + 8 * half;
            float top = -INFINITY;
#pragma unroll
            for (int w = 0; w < kWarps; w += 4) {
                const float4 x = *reinterpret_cast<const float4*>(&shared.tops[group][head][w]);
                top = fmaxf(top, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
            }
            part.top[half] = top;
            const float base = exponent_base(top);
            uint8_t* to = weights() + head * kWeightPitch + warp * 32 + lane % 4 * 4;
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const float* x = s[t] + 2 * half;
                *reinterpret_cast<uint32_t*>(to + t * 16) = pack_f16(weight_of(x[0], base), weight_of(x[1], base));
            }
        }
    }

    // The split's sums of weights and of V, this warp's tiles of head_dim. Products of 16 keys that are all masked are
    // left out: their V was not copied.
    DEVICE_MEMBER void accumulate(Sums& part, int st, int split) const {
        float total[4] = {};
        const int key0 = split * kSplit;
        const auto is_seen = [&](int key) { return key <= last && key + 16 > first; };  // some of 16 keys
        const uint32_t from_weights = smem_address(weights()) + operand_row() * kWeightPitch + lane / 16 * 16;
        // ldmatrix: the lane's row is a dimension of eight keys
        const uint32_t v = smem_address(stage(st)) + kSplitBytes + lane / 8 * kTileBytes + (warp * 8 + lane % 8) * 16;
#pragma unroll
        for (int j = 0; j < kSplit / 32; j++) {
            const bool seen[2] = {is_seen(key0 + j * 32), is_seen(key0 + j * 32 + 16)};
            if (!seen[0] && !seen[1]) continue;
            uint32_t a[2][4];
            ldmatrix_x4(a[0], from_weights + j * 64);
            ldmatrix_x4(a[1], from_weights + j * 64 + 32);
#pragma unroll
            for (int t = 0; t < kWarpTiles; t++) {
                if (kDimTiles % kWarps != 0 && dim_tile(t) >= kDimTiles) break;
                uint32_t b[4];
                ldmatrix_x4(b, v + j * 4 * kTileBytes + t * kWarps * 128);
                if (seen[0]) mma_f16(part.acc[t], a[0], b[0], b[1]);
                if (seen[1]) mma_f16(part.acc[t], a[1], b[2], b[3]);
            }
            if (seen[0]) mma_f16(total, a[0], kOnes, kOnes);
            if (seen[1]) mma_f16(total, a[1], kOnes, kOnes);
        }
        part.sum[0] = total[0], part.sum[1] = total[2];
    }

    DEVICE_MEMBER int operand_row() const { return lane % 8 + lane / 8 % 2 * 8; }  // ldmatrix of an A operand

    // What `add` makes of nothing and `part`.
    static DEVICE_MEMBER Sums first_of(Sums part) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            part.sum[half] = __fadd_rn(part.sum[half], 0.f);
#pragma unroll
            for (int t = 0; t < kWarpTiles; t++) {
                part.acc[t][2 * half] = __fadd_rn(part.acc[t][2 * half], 0.f);
                part.acc[t][2 * half + 1] = __fadd_rn(part.acc[t][2 * half + 1], 0.f);
            }
        }
        return part;
    }
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

    // The second group's sums to the same threads of the first, through K of its stage, which nobody reads any more.
    DEVICE_MEMBER float4* handed() const { return reinterpret_cast<float4*>(smem + p.depth * kStageBytes) + thread; }
    DEVICE_MEMBER void hand_over(const Sums& x) const {
        static_assert((1 + kWarpTiles) * 16 * kGroupThreads <= kSplitBytes);
        handed()[0] = make_float4(x.top[0], x.top[1], x.sum[0], x.sum[1]);
#pragma unroll
        for (int t = 0; t < kWarpTiles; t++)
            handed()[(1 + t) * kGroupThreads] = make_float4(x.acc[t][0], x.acc[t][1], x.acc[t][2], x.acc[t][3]);
    }
    DEVICE_MEMBER Sums take_over() const {
        Sums x;
        const float4 head = handed()[0];
        x.top[0] = head.x, x.top[1] = head.y, x.sum[0] = head.z, x.sum[1] = head.w;
#pragma unroll
        for (int t = 0; t < kWarpTiles; t++) {
            const float4 acc = handed()[(1 + t) * kGroupThreads];
            x.acc[t][0] = acc.x, x.acc[t][1] = acc.y, x.acc[t][2] = acc.z, x.acc[t][3] = acc.w;
        }
        return x;
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

    DEVICE_MEMBER void run() {
        group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
        warp = thread / 32, lane = threadIdx.x % 32;
        row = blockIdx.z, tile = 0, head_kv = blockIdx.y;
        if (p.head_tiles > 1) tile = blockIdx.y % p.head_tiles, head_kv = blockIdx.y / p.head_tiles;
        head0 = head_kv * p.kv_group + tile * DECODE_HEADS;
        n_heads = min(p.kv_group - tile * DECODE_HEADS, DECODE_HEADS);
        // one way to memory
        const int slot = p.slots[row];
        last = p.positions[row];
        const float frequency = common_frequency();
        const float sink = (int)threadIdx.x < n_heads ? sink_of(p.sinks, head0 + threadIdx.x) : 0.f;
        if (thread == 0) {
            for (int s = 0; s < p.depth; s++)
                copy_barrier_init<kWarps>(barrier(s, false)), copy_barrier_init<kWarps>(barrier(s, true));
            copy_barrier_fence();
        }
        __syncthreads();
        if (slot < 0) {
            pdl_wait();
            for (int i = threadIdx.x; blockIdx.x == 0 && i < n_heads * kHeadDim; i += n_threads()) out_row(0)[i] = 0.f;
            return;
        }
        table = p.block_table + (int64_t)slot * p.max_blocks;
        first = p.window > 0 && last >= p.window ? last - p.window + 1 : 0;
        first_split = first / kSplit, n_splits = last / kSplit - first_split + 1;
        n_blocks = n_splits <= kLocalSplits ? 1 : min(n_splits, (int)gridDim.x);
        // Room for the others: those that have work wait, and with them the launch.
        if ((int)blockIdx.x >= n_blocks) return;
        const bool is_local = n_blocks == 1 && (p.groups == 1 || n_splits <= kLocalSplits);
        const int own_block = has_own() ? table[last / KV_BLOCK] : -1;
        Part parts[DECODE_DEPTH];  // of all stages at once: one way to memory, and meanwhile what does not need it
#pragma unroll
        for (int s = 0; s < DECODE_DEPTH; s++)
            if (s < p.depth && has_round(s)) parts[s] = part_of(split_of(s));
        clear_queries();
        compute_turns(slot, frequency);
#pragma unroll
        for (int s = 0; s < DECODE_DEPTH; s++)
            if (s < p.depth && has_round(s)) copy(parts[s], s, false), copy(parts[s], s, true);
        const Own own = own_place();
        if ((int)threadIdx.x < n_heads) shared.sinks[threadIdx.x] = sink;
        __syncthreads();
        load_row(own_block);
        __syncthreads();  // q is complete, and k and v of the row's own position

        Sums all;
        int s = 0;
        uint32_t parity = 0;
#pragma unroll 1
        for (int i = 0; has_round(i); i++) {
            const int split = split_of(i);
            const bool has_next = has_round(i + p.depth);  // that needs this stage
            Part next = {};
            if (has_next) next = part_of(split_of(i + p.depth));
            float scores[2][4] = {};
            Sums part;
            copy_wait(barrier(s, false), parity);
            score(scores, s, split);
            group_wait();  // the maxima are there, and nobody reads K any more
            if (has_next) copy(next, s, false);
            weigh(scores, part);
            copy_wait(barrier(s, true), parity);
            if (split == last / kSplit) mend_v(own, s);
            group_wait();  // the weights are there, and V is mended
            accumulate(part, s, split);
            if (is_local && i == 0)
                all = first_of(part);
            else if (is_local)
                add(all, part);
            else
                store_part(part, split - first_split);
            if (has_next) {
                group_wait();  // nobody reads V any more
                copy(next, s, true);
            }
            if (++s == p.depth) s = 0, parity ^= 1;
        }
        if (is_local) {
            if (p.groups > 1 && n_splits > 1) {
                if (group == 1) hand_over(all);
                __syncthreads();
                if (group == 0) add(all, take_over());
            }
            if (group == 0) store_out(all);
        } else if (is_last_block()) {
            Merge{partial_row(0, 0), out_row(0), shared.sinks, p.max_splits, n_heads, n_splits}.run(smem);
        }
    }
};

template <int kHeadDim>
DEVICE void attention_decode(const AttentionDecodeParams& p) {
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ __align__(16) DecodeShared<kHeadDim> shared;
    pdl_launch_dependents();
    Decode<kHeadDim> decode{p, smem, shared};
    decode.run();
}

#define INSTANTIATE(head_dim)                                                          \
    extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)                       \
        attention_decode_##head_dim(const __grid_constant__ AttentionDecodeParams p) { \
        attention_decode<head_dim>(p);                                                 \
    }

INSTANTIATE(32)
INSTANTIATE(64)
INSTANTIATE(80)
INSTANTIATE(96)
INSTANTIATE(128)
