// The draw of a row by one block once every group's weights are summed, or all tokens are in bins.
//
// Rows with top-k or top-p: each keeps a prefix of the order (x descending, id ascending). A histogram of counts and
// weights over 2048 equal steps of the distance to the maximum names the step in which the prefix ends, the tokens of
// that step are ranked against each other. Only groups whose largest x is far enough up are read again.
// All sums are of integers, so they do not depend on order, and atomics are harmless.
#pragma once

#include "sample_row.cuh"

static constexpr int kDigitBits = 10;        // of one step of the search in a crowded bin
static constexpr float kBinsPerUnit = 73.f;  // 2048 bins reach 28 below the maximum, where weights end

// Sums over the bins before, then the total.
template <int kBins>
struct Bins {
    static constexpr int kSize = kBins;
    uint64_t weights[kBins + 1];
    uint32_t counts[kBins + 1];
};

// What a block adds up of its part of the row; 64-bit sums in halves.
struct Histogram {
    uint32_t counts[SAMPLE_BINS], low[SAMPLE_BINS], high[SAMPLE_BINS];
};

struct DrawShared {
    union {
        Histogram histogram;
        struct {
            Bins<SAMPLE_BINS> bins;
            union {
                Bins<1 << kDigitBits> digits;
                struct {
                    uint64_t keys[kList], weights[kList];
                } list;
                uint64_t group_weights[kMaxGroups];
            };
            uint16_t groups[kMaxGroups];
        };
    };
    uint64_t warp_weights[kWarps];
    uint32_t warp_counts[kWarps];
    uint64_t random, step;
    int position;
    // results of the one thread that finds something
    uint64_t limit_key, limit_weight, rest;
    int bin, group;
    uint32_t n_list, n_groups;
};

DEVICE int bin_of(float x, float max) {
    const int bin = (int)((max - x) * kBinsPerUnit);
    return bin < SAMPLE_BINS - 1 ? bin : SAMPLE_BINS - 1;
}

// Adds a token to the histogram; 32-bit atomics are native in shared memory.
DEVICE void add_token(Histogram& h, int bin, uint64_t weight) {
    const uint32_t part = (uint32_t)weight;
    const uint32_t before = atomicAdd(&h.low[bin], part);
    const uint32_t carry = (uint32_t)(weight >> 32) + (before + part < part);
    if (carry) atomicAdd(&h.high[bin], carry);
    atomicAdd(&h.counts[bin], 1u);
}

// Makes weight and count the sums over the threads before this one. Returns the sum of all weights. All threads;
// begins and ends with a barrier.
DEVICE uint64_t scan_threads(DrawShared& s, uint64_t& weight, uint32_t& count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t w = weight;
    uint32_t c = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t other = __shfl_up_sync(kAllLanes, w, offset);
        const uint32_t other_count = __shfl_up_sync(kAllLanes, c, offset);
        if (lane >= offset) w += other, c += other_count;
    }
    __syncthreads();
    if (lane == 31) s.warp_weights[warp] = w, s.warp_counts[warp] = c;
    __syncthreads();
    // every warp adds up the warps before it
    const uint64_t of_warp = lane < kWarps ? s.warp_weights[lane] : 0;
    const uint64_t total = warp_sum(of_warp), before = warp_sum(lane < warp ? of_warp : 0);
    const uint32_t count_before = __reduce_add_sync(kAllLanes, lane < warp ? s.warp_counts[lane] : 0u);
    weight = before + w - weight;
    count = count_before + c - count;
    __syncthreads();
    return total;
}

// Bins to sums over the bins before them. Ends with a barrier.
template <typename AnyBins>
DEVICE void scan_bins(DrawShared& s, AnyBins& bins) {
    constexpr int kEach = AnyBins::kSize / kThreads;
    const int first = kEach * threadIdx.x;
    uint64_t weights[kEach], weight = 0;
    uint32_t counts[kEach], count = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        weight += weights[i] = bins.weights[first + i];
        count += counts[i] = bins.counts[first + i];
    }
    scan_threads(s, weight, count);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        bins.weights[first + i] = weight, bins.counts[first + i] = count;
        weight += weights[i], count += counts[i];
    }
    if (threadIdx.x == kThreads - 1) bins.weights[AnyBins::kSize] = weight, bins.counts[AnyBins::kSize] = count;
    __syncthreads();
}

// The bin in which the prefix that reaches `target` (of weights or of counts) ends. target is 1 .. total.
template <typename AnyBins>
DEVICE int find_bin(DrawShared& s, const AnyBins& bins, bool by_weight, uint64_t target) {
    for (int b = threadIdx.x; b < AnyBins::kSize; b += kThreads) {
        const uint64_t before = by_weight ? bins.weights[b] : bins.counts[b];
        const uint64_t after = by_weight ? bins.weights[b + 1] : bins.counts[b + 1];
        if (before < target && target <= after) s.bin = b;
    }
    __syncthreads();
    const int bin = s.bin;
    __syncthreads();
    return bin;
}

// Lists the groups that have a key of at least `least`. All threads; begins and ends with a barrier.
DEVICE void list_groups(DrawShared& s, const Row& row, uint64_t least) {
    __syncthreads();
    if (threadIdx.x == 0) s.n_groups = 0;
    __syncthreads();
#pragma unroll
    for (int group = threadIdx.x; group < kMaxGroups; group += kThreads)
        if (group < row.n_groups && __ldcg(row.group_keys + group) >= least)
            s.groups[atomicAdd(&s.n_groups, 1u)] = (uint16_t)group;
    __syncthreads();
}

// Calls f(key, weight) for the tokens of the listed groups that have a weight and an x of at least `floor`, and perhaps
// for further ones that have a weight.
template <typename F>
DEVICE void for_tokens(const DrawShared& s, const Row& row, float max, float floor, F f) {
    for_groups<3>(
        row, s.n_groups, [&](int i) { return s.groups[i]; },
        [&](int, int first, const float (&v)[4]) {
            row.for_near(max, floor, first, v, [&](int id, float x) {
                const uint64_t weight = sampling_weight(x, max);
                if (weight > 0) f(order_key(x, id), weight);
            });
        });
}

// The token at which the prefix that reaches `target` ends: its key, and the weight of the prefix. Ends with a barrier.
DEVICE void find_limit(DrawShared& s, const Row& row, float max, bool by_weight, uint64_t target) {
    const int bin = find_bin(s, s.bins, by_weight, target);
    const float floor = max - ((bin + 1) / kBinsPerUnit + 1e-3f);
    list_groups(s, row, order_key(floor, -1));
    uint64_t weight_before = s.bins.weights[bin];
    uint32_t count_before = s.bins.counts[bin], n = s.bins.counts[bin + 1] - count_before;
    // A crowded bin is divided by the leading digits of the keys, which differ from token to token in the end.
    uint64_t prefix = 0;
    int shift = 64;
    const auto is_inside = [&](uint64_t key) {
        return bin_of(key_value(key), max) == bin && (shift == 64 || key >> shift == prefix);
    };
    constexpr int kDigits = 1 << kDigitBits;
    while (n > kList) {
        const int next_shift = shift > kDigitBits ? shift - kDigitBits : 0;
        __syncthreads();
        for (int b = threadIdx.x; b < kDigits; b += kThreads) s.digits.weights[b] = 0, s.digits.counts[b] = 0;
        __syncthreads();
        for_tokens(s, row, max, floor, [&](uint64_t key, uint64_t weight) {
            if (!is_inside(key)) return;
            const int digit = kDigits - 1 - (int)(key >> next_shift & ((1 << (shift - next_shift)) - 1));
            atomicAdd(reinterpret_cast<unsigned long long*>(&s.digits.weights[digit]), (unsigned long long)weight);
            atomicAdd(&s.digits.counts[digit], 1u);
        });
        __syncthreads();
        scan_bins(s, s.digits);
        const uint64_t inside = target - (by_weight ? weight_before : count_before);
        const int digit = find_bin(s, s.digits, by_weight, inside);
        weight_before += s.digits.weights[digit];
        count_before += s.digits.counts[digit];
        n = s.digits.counts[digit + 1] - s.digits.counts[digit];
        prefix = prefix << (shift - next_shift) | (uint64_t)(kDigits - 1 - digit);
        shift = next_shift;
    }
    __syncthreads();
    if (threadIdx.x == 0) s.n_list = 0;
    __syncthreads();
    for_tokens(s, row, max, floor, [&](uint64_t key, uint64_t weight) {
        if (!is_inside(key)) return;
        const uint32_t at = atomicAdd(&s.n_list, 1u);
        s.list.keys[at] = key;
        s.list.weights[at] = weight;
    });
    __syncthreads();
    if (threadIdx.x < n) {
        const uint64_t key = s.list.keys[threadIdx.x], own = s.list.weights[threadIdx.x];
        uint64_t before = by_weight ? weight_before : count_before, weight = weight_before;
#pragma unroll 1
        for (uint32_t i = 0; i < n; i++) {
            if (s.list.keys[i] > key) {
                weight += s.list.weights[i];
                before += by_weight ? s.list.weights[i] : 1;
            }
        }
        if (before < target && target <= before + (by_weight ? own : 1))
            s.limit_key = key, s.limit_weight = weight + own;
    }
    __syncthreads();
}

// The key of the last token that top-k and top-p let stay, at the least one that all others are above. Leaves the bins
// of the workspace zero. All threads.
DEVICE uint64_t filter_limit(DrawShared& s, const SampleParams& p, const Row& row, float max) {
    for (int b = threadIdx.x; b < SAMPLE_BINS; b += kThreads) {
        const int64_t at = (int64_t)row.index * SAMPLE_BINS + b;
        s.bins.weights[b] = __ldcg(&p.bin_weights[at]);
        s.bins.counts[b] = __ldcg(&p.bin_counts[at]);
        p.bin_weights[at] = 0;
        p.bin_counts[at] = 0;
    }
    __syncthreads();
    scan_bins(s, s.bins);
    uint64_t total = s.bins.weights[SAMPLE_BINS], limit = least_key(max);
#pragma unroll 1
    for (int is_top_p = 0; is_top_p < 2; is_top_p++) {
        if (is_top_p ? row.slot.top_p >= 1.f
                     : !row.has_top_k() || (uint32_t)row.slot.top_k >= s.bins.counts[SAMPLE_BINS])
            continue;
        const uint64_t target = is_top_p ? sampling_top_p_target(row.slot.top_p, total) : row.slot.top_k;
        find_limit(s, row, max, is_top_p, target);
        if (s.limit_key > limit) limit = s.limit_key;
        total = s.limit_weight;
    }
    return limit;
}

// Draws and publishes the token of a row whose largest x is `max`. All threads.
DEVICE void draw(DrawShared& s, const SampleParams& p, const Row& row, float max) {
    if (threadIdx.x == kThreads - 1) {
        s.step = *p.step;
        s.position = p.positions[row.index];
        s.random = sampling_random(row.slot.seed, (uint32_t)s.position + 1);
    }
    const uint64_t least = row.least_weight();
    uint64_t limit = 0;
    const auto kept = [&](float x, int id) {
        const uint64_t weight = sampling_weight(x, max);
        return weight >= least && order_key(x, id) >= limit ? weight : 0;
    };
    // sums of the groups in id order, consecutive ones a thread
    uint64_t weights[kThreadGroups], sum = 0;
    const int first_group = kThreadGroups * threadIdx.x;
    if (row.has_filter()) {
        limit = filter_limit(s, p, row, max);
        list_groups(s, row, limit);
        for (int i = threadIdx.x; i < kMaxGroups; i += kThreads) s.group_weights[i] = 0;
        __syncthreads();
        for_groups<3>(
            row, s.n_groups, [&](int i) { return s.groups[i]; },
            [&](int group, int first, const float (&v)[4]) {
                uint64_t of_group = 0;
                row.for_near(max, key_value(limit), first, v, [&](int id, float x) { of_group += kept(x, id); });
                of_group = short_warp_sum(of_group);
                if (threadIdx.x % 32 == 0) s.group_weights[group] = of_group;
            });
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kThreadGroups; i++) sum += weights[i] = s.group_weights[first_group + i];
    } else {
        const uint64_t* group_weights = p.group_weights + (int64_t)row.index * row.n_groups;
#pragma unroll
        for (int i = 0; i < kThreadGroups; i++)
            sum += weights[i] = first_group + i < row.n_groups ? __ldcg(group_weights + first_group + i) : 0;
    }
    uint64_t before = sum;
    uint32_t unused = 0;
    const uint64_t total = scan_threads(s, before, unused);
    const uint64_t target = sampling_scale(s.random, total);
    if (before <= target && target < before + sum) {
        bool is_found = false;
#pragma unroll
        for (int i = 0; i < kThreadGroups; i++) {
            if (!is_found && target < before + weights[i]) {
                s.group = first_group + i, s.rest = target - before;
                is_found = true;
            }
            before += weights[i];
        }
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const int first = s.group * SAMPLE_GROUP + 4 * threadIdx.x;
    float v[4], x[4];
    row.load(v, first);
    row.read_x(x, first, v);
    sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) sum += weights[j] = kept(x[j], first + j);
    before = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t other = __shfl_up_sync(kAllLanes, before, offset);
        if ((int)threadIdx.x >= offset) before += other;
    }
    before -= sum;
    if (s.rest < before || s.rest >= before + sum) return;
    int token = first;
#pragma unroll
    for (int j = 0; j < 3; j++) {  // before + weights of tokens up to j
        before += weights[j];
        if (before <= s.rest) token = first + j + 1;
    }
    publish(p, row, s.position, s.step, token);
}
