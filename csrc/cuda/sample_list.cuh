// The draw of a row with a small top-k, by one block, once the largest key of every group is known.
//
// At least top_k tokens have keys as large as the top_k-th largest of the groups' keys, so all that may stay lie in the
// groups above it: as many groups as top_k, or little more. Their tokens above it go into a list and are ranked.
#pragma once

#include "sample_row.cuh"

// Groups that may be read: top_k and what makes their search short, in whole rounds of the block.
static constexpr int kRound = 4 * kWarps;
static constexpr int kListGroups = (SAMPLE_TOP_K + kRound / 4 + kRound - 1) / kRound * kRound;

struct ListShared {
    uint64_t keys[kList];  // of the tokens that may be among the first top_k
    uint64_t sorted[SAMPLE_TOP_K], weights[SAMPLE_TOP_K];
    uint64_t random, rest;
    int warp_counts[2][kWarps];
    int n_groups, n_keys;
    uint16_t groups[kListGroups];
};

// A key at which between `least` and `most` keys are as large or larger; `low` where no more than `most` are there.
// count(key) says how many, to all threads alike, fewer than `least` at `high`. The keys differ, and least < most.
template <typename F>
DEVICE uint64_t narrow(uint64_t low, uint64_t high, int least, int most, F count) {
    uint64_t key = low;
#pragma unroll 1
    for (int i = 0;; i++) {
        const int n = count(key);
        if (n <= most && (n >= least || i == 0)) return key;
        if (n > most)
            low = key;
        else
            high = key;
        // Halves the distance of the x, which ends soon where the tokens lie as usual; then that of the keys, which
        // ends always.
        const float x = 0.5f * key_value(low) + 0.5f * key_value(high);
        key = order_key(x, -1);
        if (i >= 8 || !(low < key && key < high)) key = low + (high - low) / 2;
    }
}

// Draws and publishes the token of a row whose largest key is `best`. All threads.
DEVICE void draw_listed(ListShared& s, const SampleParams& p, const Row& row, uint64_t best, int position,
                        uint64_t step) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % 8, top_k = row.slot.top_k;
    const float max = key_value(best);
    if (threadIdx.x == kThreads - 1) s.random = sampling_random(row.slot.seed, (uint32_t)position + 1);

    // the groups
    uint64_t keys[kThreadGroups];
#pragma unroll
    for (int i = 0; i < kThreadGroups; i++) {
        const int group = i * kThreads + threadIdx.x;
        keys[i] = group < row.n_groups ? __ldcg(row.group_keys + group) : 0;
    }
    int turn = 0;
    const auto count_groups = [&](uint64_t key) {
        int n = 0;
#pragma unroll
        for (int i = 0; i < kThreadGroups; i++) n += keys[i] >= key;
        n = __reduce_add_sync(kAllLanes, n);
        turn ^= 1;  // the other counts may still be read
        if (lane == 0) s.warp_counts[turn][warp] = n;
        __syncthreads();
        return __reduce_add_sync(kAllLanes, lane < kWarps ? s.warp_counts[turn][lane] : 0);
    };
    const int most_groups = (top_k + kRound / 4 + kRound - 1) / kRound * kRound;
    uint64_t limit = narrow(least_key(max), best + 1, top_k, most_groups, count_groups);
    if (threadIdx.x == 0) s.n_groups = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreadGroups; i++)
        if (keys[i] >= limit) s.groups[atomicAdd(&s.n_groups, 1)] = (uint16_t)(i * kThreads + threadIdx.x);

    // their tokens
    const auto list_tokens = [&](uint64_t key) {
        __syncthreads();
        if (threadIdx.x == 0) s.n_keys = 0;
        __syncthreads();
        for_groups<4>(
            row, s.n_groups, [&](int i) { return s.groups[i]; },
            [&](int, int first, const float (&v)[4]) {
                row.for_near(max, key_value(key), first, v, [&](int id, float x) {
                    const uint64_t own = order_key(x, id);
                    if (own < key) return;
                    const int at = atomicAdd(&s.n_keys, 1);
                    if (at < kList) s.keys[at] = own;
                });
            });
        __syncthreads();
        return s.n_keys;
    };
    narrow(limit, best + 1, top_k, kList, list_tokens);
    const int n = s.n_keys, n_sorted = n < top_k ? n : top_k;

    // The first top_k in their order, and their weights. Eight lanes look for the rank of one.
    for (int base = 0; base < n; base += kThreads / 8) {
        const int i = base + threadIdx.x / 8;
        const uint64_t key = i < n ? s.keys[i] : 0;
        int rank = 0;
        for (int j = part; j < n; j += 8) rank += s.keys[j] > key;
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) rank += __shfl_xor_sync(kAllLanes, rank, offset);
        if (i < n && rank < top_k && part == 0)
            s.sorted[rank] = key, s.weights[rank] = sampling_weight(key_value(key), max);
    }
    __syncthreads();

    // top-p and min-p: the weight of what does not stay becomes 0
    if (warp == 0) {
        constexpr int kEach = SAMPLE_TOP_K / 32;
        uint64_t weights[kEach], sum = 0;
#pragma unroll
        for (int j = 0; j < kEach; j++) {
            const int i = kEach * lane + j;
            weights[j] = i < n_sorted ? s.weights[i] : 0;
            sum += weights[j];
        }
        uint64_t before = sum;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const uint64_t other = __shfl_up_sync(kAllLanes, before, offset);
            if (lane >= offset) before += other;
        }
        const uint64_t total = __shfl_sync(kAllLanes, before, 31), least = row.least_weight();
        const uint64_t target = row.slot.top_p < 1.f ? sampling_top_p_target(row.slot.top_p, total) : total;
        before -= sum;
        sum = 0;
#pragma unroll
        for (int j = 0; j < kEach; j++) {
            const int i = kEach * lane + j;
            const uint64_t kept = before < target && weights[j] >= least ? weights[j] : 0;
            before += weights[j];
            sum += kept;
            if (i < n_sorted) s.weights[i] = kept;
        }
        sum = warp_sum(sum);
        if (lane == 0) s.rest = sampling_scale(s.random, sum);
    }
    __syncthreads();

    // the token at which the running sum in id order passes the random number
    for (int base = 0; base < n_sorted; base += kThreads / 8) {
        const int i = base + threadIdx.x / 8;
        const uint64_t own = i < n_sorted ? s.weights[i] : 0;
        const int id = i < n_sorted ? key_id(s.sorted[i]) : 0;
        uint64_t before = 0;
        for (int j = part; j < n_sorted; j += 8)
            if (key_id(s.sorted[j]) < id) before += s.weights[j];
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) before += __shfl_xor_sync(kAllLanes, before, offset);
        if (part == 0 && before <= s.rest && s.rest < before + own) publish(p, row, position, step, id);
    }
}
