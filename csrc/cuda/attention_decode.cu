// Attention of one query row per sequence over the paged cache, split over the keys.
//
//   out[h] = sum_j p[j] v[j] / (sum_j p[j] + exp(sink[h])),   p[j] = exp(scale * q[h] . k[j]),   j in the row's window
//
// Grid: z = row, y = KV head (times tiles of 8 query heads), x = splits in turn. A split is a fixed range of absolute
// positions, so a row's sums are grouped by its own position only. The block's four warps take chunks of 32 positions
// in turn; the query heads of the KV head share the K and V that were read. Matrix product per warp: rows 0-7 are the
// heads' upper halves (float16), rows 8-15 the lower ones; adding both rows gives float32 accuracy in one instruction.
// Every lane copies with cp.async exactly the 16-byte pieces it multiplies later: no barrier, and copies of the next
// chunk run under the arithmetic. Operand order: a lane's piece of 8 dimensions (K) or 8 positions (V, transposed in
// the cache) is dealt to the product's index k in an order that is the same for both operands, so nothing is shuffled.
// The block that finishes a row's last split adds the splits in order. Bytes: 4 * head_dim per key and KV head.
#include "attention.cuh"

static constexpr int kWarps = 4;
static constexpr int kChunk = 32;            // positions of a warp's step
static constexpr int kPieceBytes = 32 * 16;  // one cp.async of a warp
static constexpr int kMetaFloats = 4;        // after a partial row: maximum, sum, padding to 16 bytes

template <int kHeadDim>
struct Decode {
    static constexpr int kDimChunks = (kHeadDim + 31) / 32;  // K: 32 dimensions an instruction
    static constexpr int kDimTiles = kHeadDim / 8;           // V: 8 dimensions an instruction
    static constexpr int kKBytes = 4 * kDimChunks * kPieceBytes;
    static constexpr int kWarpBytes = kKBytes + kDimTiles * kPieceBytes;
    static constexpr int kRowFloats = kHeadDim + kMetaFloats;
    static_assert(kHeadDim % 8 == 0 && kHeadDim <= 128);

    const AttentionDecodeParams& p;
    uint8_t* smem;
    int warp, lane, key_lane, piece;  // key_lane: head, key or dimension within 8; piece: which 16 bytes of four
    int head_kv, head0, n_heads, row;
    const int32_t* table;
    int first, last;  // positions attended to

    DEVICE_MEMBER const uint16_t* chunk_base(int chunk) const {
        const int block = table[chunk * kChunk / KV_BLOCK];
        return p.kv + kv_offset(block, head_kv, p.n_head_kv, kHeadDim);
    }

    // Column n of score tile j is position (n / 2) * 8 + 2 j + n % 2 of the chunk: lane's scores are then neighbours.
    DEVICE_MEMBER void copy_k(int chunk) const {
        const uint16_t* k = chunk_base(chunk) + chunk * kChunk % KV_BLOCK * kHeadDim;
        const uint32_t to = smem_address(smem + warp * kWarpBytes) + lane * 16;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint16_t* key = k + ((key_lane >> 1) * 8 + 2 * j + (key_lane & 1)) * kHeadDim;
#pragma unroll
            for (int d = 0; d < kDimChunks; d++) {
                const int dim = d * 32 + piece * 8;
                const bool inside = kHeadDim % 32 == 0 || dim < kHeadDim;
                cp_async_16_zfill(to + (j * kDimChunks + d) * kPieceBytes, inside ? key + dim : key, inside ? 16 : 0);
            }
        }
    }

    DEVICE_MEMBER void copy_v(int chunk) const {
        const uint16_t* v = chunk_base(chunk) + KV_BLOCK * kHeadDim + chunk * kChunk % KV_BLOCK + piece * 8;
        const uint32_t to = smem_address(smem + warp * kWarpBytes + kKBytes) + lane * 16;
#pragma unroll
        for (int t = 0; t < kDimTiles; t++) cp_async_16(to + t * kPieceBytes, v + (t * 8 + key_lane) * KV_BLOCK);
    }

    // This warp's chunks of positions begin .. end; leaves maximum, sum and head rows in shared memory.
    DEVICE_MEMBER void run_split(int begin, int end) {
        uint32_t q[kDimChunks][8];
        load_q(q);
        float acc[kDimTiles][4] = {};
        float top = -INFINITY, sum = 0.f;
        const int last_chunk = end / kChunk;
        int chunk = begin / kChunk;
        chunk += (warp - chunk) & (kWarps - 1);
        if (chunk <= last_chunk) {
            copy_k(chunk);
            cp_async_commit();
            copy_v(chunk);
            cp_async_commit();
        }
        const uint8_t* own_k = smem + warp * kWarpBytes + lane * 16;
        for (; chunk <= last_chunk; chunk += kWarps) {
            const bool more = chunk + kWarps <= last_chunk;
            float s[4][4] = {};
            cp_async_wait<1>();
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int d = 0; d < kDimChunks; d++) {
                    const uint4 k = *reinterpret_cast<const uint4*>(own_k + (j * kDimChunks + d) * kPieceBytes);
                    mma_f16(s[j], q[d], k.x, k.y);
                    mma_f16(s[j], q[d] + 4, k.z, k.w);
                }
            }
            if (more) copy_k(chunk + kWarps);
            cp_async_commit();

            float score[8];
            const int key0 = chunk * kChunk + piece * 8;
            float most = top;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const bool inside = key0 + i >= first && key0 + i <= last;
                score[i] = inside ? s[i / 2][i % 2] + s[i / 2][2 + i % 2] : -INFINITY;
                most = fmaxf(most, score[i]);
            }
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            const float fade = exp2f(top - most);
            top = most;
            sum *= fade;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                score[i] = exp2f(score[i] - most);
                sum += score[i];
            }
            uint32_t weight[8];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const SplitPair pair = split_f16(score[2 * i], score[2 * i + 1]);
                weight[2 * i] = pair.hi;
                weight[2 * i + 1] = pair.lo;
            }
            cp_async_wait<1>();
            // Beyond the row's position lie values of other sequences, perhaps not finite: 0 * NaN must not enter.
            const bool tail = chunk * kChunk + kChunk - 1 > last;
#pragma unroll
            for (int t = 0; t < kDimTiles; t++) {
                uint4 v = *reinterpret_cast<const uint4*>(own_k + kKBytes + t * kPieceBytes);
                if (tail) {
                    v.x &= pair_mask(key0), v.y &= pair_mask(key0 + 2);
                    v.z &= pair_mask(key0 + 4), v.w &= pair_mask(key0 + 6);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) acc[t][i] *= fade;
                mma_f16(acc[t], weight, v.x, v.y);
                mma_f16(acc[t], weight + 4, v.z, v.w);
            }
            if (more) copy_v(chunk + kWarps);
            cp_async_commit();
        }
        cp_async_wait<0>();
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        __syncthreads();  // all copies have been used; the memory now takes the warps' results
        float* mine = warp_row(warp, key_lane);
#pragma unroll
        for (int t = 0; t < kDimTiles; t++) {
            *reinterpret_cast<float2*>(mine + t * 8 + 2 * piece) =
                make_float2(acc[t][0] + acc[t][2], acc[t][1] + acc[t][3]);
        }
        if (piece == 0) mine[kHeadDim] = top, mine[kHeadDim + 1] = sum;
        __syncthreads();
    }

    DEVICE_MEMBER uint32_t pair_mask(int key) const {
        return (key <= last ? 0xffffu : 0u) | (key + 1 <= last ? 0xffff0000u : 0u);
    }

    DEVICE_MEMBER float* warp_row(int w, int head) const {
        return reinterpret_cast<float*>(smem) + (w * DECODE_HEADS + head) * kRowFloats;
    }

    DEVICE_MEMBER void load_q(uint32_t (&q)[kDimChunks][8]) const {
        const float factor = p.scale * kLog2e;
        const float* from = p.q + (int64_t)row * p.q_stride + (head0 + key_lane) * kHeadDim;
#pragma unroll
        for (int d = 0; d < kDimChunks; d++) {
            const int dim = d * 32 + piece * 8;
            const bool inside = key_lane < n_heads && dim < kHeadDim;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
                if (inside) x = *reinterpret_cast<const float4*>(from + dim + 4 * i);
                const SplitPair a = split_f16(x.x * factor, x.y * factor), b = split_f16(x.z * factor, x.w * factor);
                q[d][4 * i] = a.hi, q[d][4 * i + 1] = a.lo, q[d][4 * i + 2] = b.hi, q[d][4 * i + 3] = b.lo;
            }
        }
    }

    DEVICE_MEMBER float* partial_row(int head, int split) const {
        return p.partial + (((int64_t)row * p.n_head + head0 + head) * p.max_splits + split) * kRowFloats;
    }

    DEVICE_MEMBER void store_out(int head, int dim, float4 x, float factor) const {
        *reinterpret_cast<float4*>(p.out + (int64_t)row * p.out_stride + (head0 + head) * kHeadDim + dim) =
            make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
    }

    // Adds the warps of the split in order; `split` < 0: it is the row's only one, and this is the result.
    DEVICE_MEMBER void merge_warps(int split) const {
        for (int i = threadIdx.x; i < n_heads * (kHeadDim / 4); i += 32 * kWarps) {
            const int head = i / (kHeadDim / 4), dim = i % (kHeadDim / 4) * 4;
            float most = -INFINITY, total = 0.f;
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < kWarps; w++) most = fmaxf(most, warp_row(w, head)[kHeadDim]);
#pragma unroll
            for (int w = 0; w < kWarps; w++) {
                const float* from = warp_row(w, head);
                const float share = exp2f(from[kHeadDim] - most);
                const float4 y = *reinterpret_cast<const float4*>(from + dim);
                total += share * from[kHeadDim + 1];
                x.x += share * y.x, x.y += share * y.y, x.z += share * y.z, x.w += share * y.w;
            }
            if (split < 0) {
                store_out(head, dim, x, softmax_factor(most, total, p.sinks, head0 + head));
            } else {
                float* to = partial_row(head, split);
                *reinterpret_cast<float4*>(to + dim) = x;
                if (dim == 0) *reinterpret_cast<float2*>(to + kHeadDim) = make_float2(most, total);
            }
        }
    }

    // Whether this block is the last of `n_blocks` to come here for its row and heads; leaves the counter zero.
    DEVICE_MEMBER bool is_last_block(int n_blocks) const {
        __shared__ bool last_one;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t* counter = p.counters + (int64_t)row * gridDim.y + blockIdx.y;
            last_one = atomicAdd(counter, 1u) == n_blocks - 1u;
            if (last_one) *counter = 0u;
        }
        __syncthreads();
        __threadfence();
        return last_one;
    }

    // Adds the row's splits in order. Reads past L1, which may hold older bytes of the lines.
    DEVICE_MEMBER void merge_splits(int n_splits) const {
        float* share = reinterpret_cast<float*>(smem);  // [DECODE_HEADS, n_splits], then [DECODE_HEADS] factors
        float* factor = share + DECODE_HEADS * n_splits;
        for (int head = warp; head < n_heads; head += kWarps) {
            float most = -INFINITY, total = 0.f;
            for (int s = lane; s < n_splits; s += 32) most = fmaxf(most, __ldcg(partial_row(head, s) + kHeadDim));
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
            for (int s = lane; s < n_splits; s += 32) {
                const float2 meta = __ldcg(reinterpret_cast<const float2*>(partial_row(head, s) + kHeadDim));
                const float own = exp2f(meta.x - most);
                share[head * n_splits + s] = own;
                total += own * meta.y;
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
            if (lane == 0) factor[head] = softmax_factor(most, total, p.sinks, head0 + head);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < n_heads * (kHeadDim / 4); i += 32 * kWarps) {
            const int head = i / (kHeadDim / 4), dim = i % (kHeadDim / 4) * 4;
            const float* from = partial_row(head, 0) + dim;
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
            for (int s = 0; s < n_splits; s++) {
                const float4 y = __ldcg(reinterpret_cast<const float4*>(from + (int64_t)s * kRowFloats));
                const float own = share[head * n_splits + s];
                x.x += own * y.x, x.y += own * y.y, x.z += own * y.z, x.w += own * y.w;
            }
            store_out(head, dim, x, factor[head]);
        }
    }

    DEVICE_MEMBER void run() {
        const int tiles = decode_head_tiles(p.n_head, p.n_head_kv), group = p.n_head / p.n_head_kv;
        const int tile = blockIdx.y % tiles;
        head_kv = blockIdx.y / tiles;
        head0 = head_kv * group + tile * DECODE_HEADS;
        n_heads = group - tile * DECODE_HEADS < DECODE_HEADS ? group - tile * DECODE_HEADS : DECODE_HEADS;
        row = blockIdx.z;
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        key_lane = lane / 4, piece = lane % 4;
        const int slot = p.slots[row];
        if (slot < 0) {
            for (int i = threadIdx.x; blockIdx.x == 0 && i < n_heads * (kHeadDim / 4); i += 32 * kWarps)
                store_out(0, 4 * i, make_float4(0.f, 0.f, 0.f, 0.f), 0.f);
            return;
        }
        table = p.block_table + (int64_t)slot * p.max_blocks;
        last = p.positions[row];
        first = p.window > 0 && last >= p.window ? last - p.window + 1 : 0;
        const int split_size = decode_split(last - first + 1);
        const int n_blocks = gridDim.x;
        const int first_split = first / split_size, n_splits = last / split_size - first_split + 1;
        for (int split = blockIdx.x; split < n_splits; split += n_blocks) {
            const int start = (first_split + split) * split_size;
            const int begin = start > first ? start : first;
            const int end = start + split_size - 1 < last ? start + split_size - 1 : last;
            run_split(begin, end);
            merge_warps(n_splits > 1 ? split : -1);
            __syncthreads();
        }
        if (n_splits == 1 || (int)blockIdx.x >= n_splits) return;
        if (is_last_block(n_splits < n_blocks ? n_splits : n_blocks)) merge_splits(n_splits);
    }
};

template <int kHeadDim>
DEVICE void attention_decode(const AttentionDecodeParams& p) {
    extern __shared__ __align__(16) uint8_t smem[];
    pdl_launch_dependents();
    pdl_wait();
    Decode<kHeadDim> decode{p, smem};
    decode.run();
}

#define INSTANTIATE(head_dim)                                                          \
    extern "C" __global__ void __launch_bounds__(32 * kWarps, 1)                       \
        attention_decode_##head_dim(const __grid_constant__ AttentionDecodeParams p) { \
        attention_decode<head_dim>(p);                                                 \
    }

INSTANTIATE(32)
INSTANTIATE(64)
INSTANTIATE(80)
INSTANTIATE(96)
INSTANTIATE(128)
