// The next token of every row of logits, by the rule of sampling.h, and what the next step needs to know.
//
// The blocks of a row share its groups of tokens; the last of them to finish has the rest of the work:
//   sample_max   the edits of the slot, in place, where it has some; the largest x of the row, its lowest id, whether a
//                NaN is there; for rows that draw the largest x of every group. The last block publishes the tokens of
//                greedy rows and of rows without a distribution, and draws for rows with a small top-k.
//   sample_draw  for all other rows: every group's sum of weights; with top-k or top-p a histogram of counts and
//   weights
//                instead. The last block draws.
// Publishing a token is next token, position, seen bit, count and history where the slot goes by them, the token and,
// after the last row, the step number for the host. Bytes: 4 n_vocab per row in each launch, and once more of the
// groups near the top in each pass of a filter.
#include "sample_bins.cuh"
#include "sample_list.cuh"

// More than any key of a number: of a row with a NaN or an infinity.
static constexpr uint64_t kBadKey = ~(uint64_t)0;

// The groups of this block of the row.
struct Share {
    int first, n;

    DEVICE_MEMBER explicit Share(const Row& row) {
        const int each = (row.n_groups + gridDim.x - 1) / gridDim.x, rest = row.n_groups - (int)blockIdx.x * each;
        first = blockIdx.x * each;
        n = rest < 0 ? 0 : rest < each ? rest : each;
    }
};

// The edits of the slot to the tokens of the block's groups, which no other block touches. Ends with a barrier.
DEVICE void apply_edits(const SampleParams& p, const Row& row, const Share& share) {
    const int first = share.first * SAMPLE_GROUP, last = first + share.n * SAMPLE_GROUP;
    const int32_t* words = p.edits + (int64_t)row.slot_index * SAMPLING_EDIT_WORDS;
    const SlotEdit* edits = reinterpret_cast<const SlotEdit*>(words);
    const int32_t* history = p.history + (int64_t)row.slot_index * SAMPLING_HISTORY_WORDS;
    for (int i = threadIdx.x; i < row.slot.n_bias; i += kThreads) {
        const int token = edits[i].token;
        if (first <= token && token < last) row.logits[token] += edits[i].bias;
    }
    __syncthreads();
    for (int i = row.slot.n_bias + threadIdx.x; i < row.slot.n_edits; i += kThreads) {
        const int token = edits[i].token;
        // what is no number stays, for the row to fail
        if (first <= token && token < last && row.logits[token] < INFINITY &&
            sampling_edit_applies(&edits[i], words, history))
            row.logits[token] = -INFINITY;
    }
    __syncthreads();
}

// The largest x of the lanes, its lowest id: a key. `id` is the lowest of the lane's own that has x.
DEVICE uint64_t warp_key(float x, int id) {
    const uint32_t own = order_key(x, id) >> 32, top = __reduce_max_sync(kAllLanes, own);
    const uint32_t lowest = __reduce_min_sync(kAllLanes, own == top ? (uint32_t)id : 0xffffffffu);
    return (uint64_t)top << 32 | (0xffffffffu - lowest);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) sample_max(const __grid_constant__ SampleParams p) {
    __shared__ ListShared s;
    __shared__ uint64_t warps[kWarps], row_best;
    __shared__ SlotSampling sampling;
    pdl_launch_dependents();
    const int slot = p.slots[blockIdx.y], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (slot < 0) {
        pdl_wait();
        if (blockIdx.x == 0 && threadIdx.x == 0) end_row(p, *p.step);
        return;
    }
    if (threadIdx.x == 0) sampling = p.samples[slot];
    __syncthreads();
    const Row row(p, blockIdx.y, slot, sampling);
    pdl_wait();
    const int position = p.positions[row.index];
    const uint64_t step = *p.step;
    const Share share(row);
    if (row.slot.n_edits > 0) apply_edits(p, row, share);

    uint64_t best = 0;
    float lane_x = -INFINITY;  // of greedy rows
    int lane_id = 0;
    bool is_good = true;
    for_groups<4>(
        row, share.n, [&](int i) { return share.first + i; },
        [&](int group, int first, const float (&v)[4]) {
            float x[4];
            is_good &= row.read_x(x, first, v);
#pragma unroll
            for (int j = 0; j < 4; j++) is_good &= v[j] < INFINITY;
            const float top = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
            const int id = first + (x[0] == top ? 0 : x[1] == top ? 1 : x[2] == top ? 2 : 3);
            if (row.is_greedy()) {
                if (top > lane_x) lane_x = top, lane_id = id;
            } else {
                const uint64_t key = warp_key(top, id);
                if (key > best) best = key;
                if (lane == 0) row.group_keys[group] = key;
            }
        });
    if (row.is_greedy()) best = warp_key(lane_x, lane_id);
    if (__any_sync(kAllLanes, !is_good)) best = kBadKey;
    if (lane == 0) warps[warp] = best;
    __syncthreads();
    if (warp == 0) {
        best = lane < kWarps ? warps[lane] : 0;
#pragma unroll
        for (int offset = kWarps / 2; offset > 0; offset /= 2) {
            const uint64_t other = __shfl_xor_sync(kAllLanes, best, offset);
            if (other > best) best = other;
        }
        if (lane == 0) atomicMax(reinterpret_cast<unsigned long long*>(&p.best[row.index]), (unsigned long long)best);
    }
    if (!is_last_block(&p.arrived[row.index])) return;

    if (threadIdx.x == 0) row_best = __ldcg(&p.best[row.index]);
    __syncthreads();
    best = row_best;
    const bool has_distribution = best != kBadKey && key_value(best) > -INFINITY;
    if (has_distribution && !row.is_short() && p.draw_follows) return;
    if (threadIdx.x == 0) p.best[row.index] = 0;
    if (has_distribution && row.is_short() && !row.is_greedy())
        draw_listed(s, p, row, best, position, step);
    else if (threadIdx.x == 0)
        publish(p, row, position, step, has_distribution && row.is_greedy() ? key_id(best) : -1);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) sample_draw(const __grid_constant__ SampleParams p) {
    __shared__ DrawShared s;
    __shared__ SlotSampling sampling;
    pdl_launch_dependents();
    const int slot = p.slots[blockIdx.y], lane = threadIdx.x % 32;
    if (slot < 0) {
        pdl_wait();
        return;
    }
    if (threadIdx.x == 0) sampling = p.samples[slot];
    __syncthreads();
    const Row row(p, blockIdx.y, slot, sampling);
    pdl_wait();
    if (row.is_short()) return;
    const uint64_t best = __ldcg(&p.best[row.index]);
    if (best == 0) return;  // it has no distribution
    const uint64_t least = row.least_weight();
    const float max = key_value(best);
    const Share share(row);
    const auto group_at = [&](int i) { return share.first + i; };
    if (row.has_filter()) {
        Histogram& h = s.histogram;
        for (int b = threadIdx.x; b < SAMPLE_BINS; b += kThreads) h.counts[b] = h.low[b] = h.high[b] = 0;
        __syncthreads();
        for_groups<2>(row, share.n, group_at, [&](int, int first, const float (&v)[4]) {
            float x[4];
            row.read_x(x, first, v);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint64_t weight = sampling_weight(x[j], max);
                if (weight > 0) add_token(h, bin_of(x[j], max), weight);
            }
        });
        __syncthreads();
        for (int b = threadIdx.x; b < SAMPLE_BINS; b += kThreads) {
            if (!h.counts[b]) continue;
            const int64_t at = (int64_t)row.index * SAMPLE_BINS + b;
            atomicAdd(&p.bin_counts[at], h.counts[b]);
            atomicAdd(reinterpret_cast<unsigned long long*>(&p.bin_weights[at]),
                      (unsigned long long)h.high[b] << 32 | h.low[b]);
        }
    } else {
        uint64_t* group_weights = p.group_weights + (int64_t)row.index * row.n_groups;
        for_groups<2>(row, share.n, group_at, [&](int group, int first, const float (&v)[4]) {
            float x[4];
            uint64_t sum = 0;
            row.read_x(x, first, v);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint64_t weight = sampling_weight(x[j], max);
                if (weight >= least) sum += weight;
            }
            sum = short_warp_sum(sum);
            if (lane == 0) group_weights[group] = sum;
        });
    }
    if (!is_last_block(&p.arrived[row.index])) return;
    if (threadIdx.x == 0) p.best[row.index] = 0;
    draw(s, p, row, max);
}
