// A row of logits as its slot reads it, and the end of a row; for the kernels of sample.cu.
//
// A row is read in groups of 128 tokens, each by a warp, four tokens a lane. Tokens are compared by their keys
// (order_key): larger for the larger x, then for the lower id, different for every token.
#pragma once

#include "params/sample_params.h"
#include "common/order.cuh"
#include "common/ptx.cuh"

static constexpr int kThreads = SAMPLE_THREADS;
static constexpr int kWarps = kThreads / 32;
static constexpr int kList = 512;  // tokens that are ranked by comparing all with all
static constexpr int kMaxGroups = SAMPLE_MAX_VOCAB / SAMPLE_GROUP;
static constexpr int kThreadGroups = kMaxGroups / kThreads;
static constexpr uint32_t kAllLanes = 0xffffffffu;
static_assert(SAMPLE_GROUP == 4 * 32 && kMaxGroups % kThreads == 0 && kWarps <= 32);

// One row of logits and how its slot reads them.
struct Row {
    float* logits;
    const uint32_t* seen;    // null: no penalty
    const uint32_t* counts;  // null: none that goes by them
    uint64_t* group_keys;
    const SlotSampling& slot;  // in shared memory: registers are few
    int index, slot_index, n_vocab, n_groups;
    bool is_aligned, is_tempered;

    // Of slot `of_slot`, which samples by `sampling`. Reads nothing that a kernel of the step writes.
    DEVICE_MEMBER Row(const SampleParams& p, int row, int of_slot, const SlotSampling& sampling) : slot(sampling) {
        index = row, slot_index = of_slot, n_vocab = p.n_vocab, n_groups = p.n_groups;
        logits = p.logits + (int64_t)row * p.logits_stride;
        group_keys = p.group_keys + (int64_t)row * p.n_groups;
        const bool has_penalty =
            sampling_has_penalty(slot.repetition_penalty, slot.frequency_penalty, slot.presence_penalty);
        seen = has_penalty ? p.seen + (int64_t)slot_index * p.seen_words : nullptr;
        counts = slot.frequency_penalty != 0.f ? p.counts + (int64_t)slot_index * p.n_vocab : nullptr;
        is_aligned = (reinterpret_cast<uint64_t>(logits) & 15) == 0;
        is_tempered = !is_greedy() && slot.temperature != 1.f;
    }

    DEVICE_MEMBER bool is_greedy() const { return sampling_is_greedy(slot.temperature); }
    DEVICE_MEMBER bool is_short() const { return sample_is_short(slot.temperature, slot.top_k, n_vocab); }
    DEVICE_MEMBER bool has_top_k() const { return slot.top_k > 0 && slot.top_k < n_vocab; }
    DEVICE_MEMBER bool has_filter() const { return has_top_k() || slot.top_p < 1.f; }
    // Tokens of less weight are left out.
    DEVICE_MEMBER uint64_t least_weight() const { return sampling_min_p_limit(slot.min_p); }

    // Logits first .. first + 3 (first a multiple of 4); -infinity beyond the vocabulary. Not from L1: edits of other
    // blocks are among them.
    DEVICE_MEMBER void load(float (&v)[4], int first) const {
        if (is_aligned && first + 4 <= n_vocab) {
            const float4 t = __ldcg(reinterpret_cast<const float4*>(logits + first));
            v[0] = t.x, v[1] = t.y, v[2] = t.z, v[3] = t.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = first + i < n_vocab ? __ldcg(logits + first + i) : -INFINITY;
        }
    }

    // Seen bits of tokens first .. first + 3.
    DEVICE_MEMBER uint32_t seen_bits(int first) const {
        return seen && first < n_vocab ? seen[first / 32] >> (first % 32) & 15u : 0u;
    }

    // What the penalties leave of the x of token `id`, which was sampled; the product must not be fused with the
    // difference that follows it.
    DEVICE_MEMBER float penalized(float x, int id) const {
        if (!(x > -INFINITY)) return x;
        x = x > 0.f ? sampling_penalize(x, slot.repetition_penalty) : __fmul_rn(x, slot.repetition_penalty);
        const uint32_t count = counts ? counts[id] : 0;
        return x - sampling_discount(slot.presence_penalty, slot.frequency_penalty, count, slot.temperature);
    }

    // The x of logit v.
    DEVICE_MEMBER float tempered(float v) const { return is_tempered ? sampling_temper(v, slot.temperature) : v; }

    // The x of logits v, tokens first .. first + 3. Whether all are numbers, if the logits are.
    DEVICE_MEMBER bool read_x(float (&x)[4], int first, const float (&v)[4]) const {
        bool is_good = true;
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = v[j];
        if (is_tempered) {
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = sampling_temper(v[j], slot.temperature);
        }
#pragma unroll 1
        for (uint32_t rest = seen_bits(first); rest; rest &= rest - 1) {
            const int j = __ffs(rest) - 1;
            const float y = penalized(j < 2 ? j ? x[1] : x[0] : j == 2 ? x[2] : x[3], first + j);
#pragma unroll
            for (int k = 0; k < 4; k++) x[k] = k == j ? y : x[k];
            is_good &= y < INFINITY;
        }
        return is_good;
    }

    // Calls f(id, x) for those of tokens first .. first + 3 with x >= floor, and perhaps some further ones. A
    // multiplication tells most tokens apart from those that need the exact division.
    template <typename F>
    DEVICE_MEMBER void for_near(float max, float floor, int first, const float (&v)[4], F f) const {
        const float factor = is_tempered ? 1.f / slot.temperature : 1.f;
        const float below = floor - (0.01f + 1e-6f * (fabsf(max) + 28.f));
        const uint32_t seen = seen_bits(first);
        uint32_t rest = seen;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (v[j] * factor >= below) rest |= 1u << j;
#pragma unroll 1
        for (; rest; rest &= rest - 1) {
            const int j = __ffs(rest) - 1;
            const float x = tempered(j < 2 ? j ? v[1] : v[0] : j == 2 ? v[2] : v[3]);
            f(first + j, seen >> j & 1 ? penalized(x, first + j) : x);
        }
    }
};

DEVICE int key_id(uint64_t key) { return (int)(0xffffffffu - (uint32_t)key); }

// A key at or below those of all tokens that have a weight.
DEVICE uint64_t least_key(float max) { return order_key(max - 28.5f, -1); }

// Calls f(group, first, v) in every warp for its share of `n` groups, group_at(0) .. group_at(n - 1): v are the lane's
// logits of tokens first .. first + 3. kUnroll groups are loaded at once.
template <int kUnroll, typename GroupAt, typename F>
DEVICE void for_groups(const Row& row, int n, GroupAt group_at, F f) {
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < n; i += kUnroll * kWarps) {
        float v[kUnroll][4];
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
            if (i + u * kWarps < n) row.load(v[u], group_at(i + u * kWarps) * SAMPLE_GROUP + 4 * lane);
        // Code that a step runs once costs by its length: that of f is there once.
#pragma unroll 1
        for (int at = i; at < n && at < i + kUnroll * kWarps; at += kWarps) {
            const int group = group_at(at);
            f(group, group * SAMPLE_GROUP + 4 * lane, v[0]);
#pragma unroll
            for (int u = 1; u < kUnroll; u++)
#pragma unroll
                for (int j = 0; j < 4; j++) v[u - 1][j] = v[u][j];
        }
    }
}

// Of numbers below 2^54.
DEVICE uint64_t short_warp_sum(uint64_t v) {
    const uint32_t low = __reduce_add_sync(kAllLanes, (uint32_t)v & ((1u << 27) - 1));
    return ((uint64_t)__reduce_add_sync(kAllLanes, (uint32_t)(v >> 27)) << 27) + low;
}

DEVICE uint64_t warp_sum(uint64_t v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
    return v;
}

// Whether this block is the last of the row's to come here: then what all of them wrote before is visible to its
// threads. Leaves the counter zero. All threads; begins and ends with a barrier.
DEVICE bool is_last_block(uint32_t* arrived) {
    bool is_last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomic_add_acq_rel(arrived, 1) == gridDim.x - 1;
        if (is_last) *arrived = 0;
    }
    return __syncthreads_or(is_last);
}

// Ends a row of the step that `step` were done before; the last row of the launches ends the step. One thread.
DEVICE void end_row(const SampleParams& p, uint64_t step) {
    fence_system();
    if (gridDim.y > 1) {
        if (atomicAdd(p.done, 1u) != gridDim.y - 1) return;
        *p.done = 0;
        fence_system();
    }
    *p.step = step + 1;
    if (p.host_step) *reinterpret_cast<volatile uint64_t*>(p.host_step) = step + 1;
}

// What the host and the next step see of the row's token, -1: it has none. One thread.
DEVICE void publish(const SampleParams& p, const Row& row, int position, uint64_t step, int token) {
    p.out[(int64_t)(step % p.out_steps) * p.out_stride + row.index] = token;
    if (p.next_tokens) p.next_tokens[row.index] = token >= 0 ? token : 0;
    if (p.advance) p.positions[row.index] = position + 1;
    if (token >= 0) {
        atomicOr(&p.seen[(int64_t)row.slot_index * p.seen_words + token / 32], 1u << (token % 32));
        if (row.counts) p.counts[(int64_t)row.slot_index * p.n_vocab + token]++;
        if (row.slot.n_edits > 0)
            sampling_remember(p.history + (int64_t)row.slot_index * SAMPLING_HISTORY_WORDS, token);
    }
    end_row(p, step);
}
