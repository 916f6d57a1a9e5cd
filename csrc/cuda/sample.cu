// The next token of every row of logits, by the rule of sampling.h, and what the next step needs to know.
//
// Three launches; the vocabulary is cut into chunks of 4096:
//   sample_max    one block per chunk and row: the edits of its tokens, in place, where the slot has some; largest x,
//                 its lowest id, whether a NaN is there
//   sample_weigh  one block per chunk and row: the chunk's sum of weights; for rows with top-k or top-p instead a
//                 histogram of counts and weights over 2048 equal steps of the distance to the maximum
//   sample_draw   one block per row: greedy rows take the maximum. top-k and top-p each keep a prefix of the order (x
//                 descending, id ascending): the histogram names the step in which the prefix ends, the tokens of that
//                 step are ranked against each other. Then the draw: the chunk in which the running sum passes the
//                 random number, and the token in it. Last the feedback: next token, position, seen bit, count and
//                 history where the slot goes by them, the token and the step number for the host.
// All sums are of integers, so they do not depend on order, and atomics are harmless. Bytes: 4 n_vocab per row in each
// of the first two launches, again in the third once per filter and once more where there is one.
#include "params/sample_params.h"
#include "common/order.cuh"
#include "common/ptx.cuh"

static constexpr int kThreads = 256;
static constexpr int kDrawThreads = 1024;
static constexpr int kList = 1024;  // tokens that are ranked by comparing all with all
static constexpr int kMaxChunks = SAMPLE_MAX_VOCAB / SAMPLE_CHUNK;
static constexpr int kDigitBits = 11;        // of one step of the search in a crowded bin
static constexpr float kBinsPerUnit = 73.f;  // 2048 bins reach 28 below the maximum, where weights end
static_assert((1 << kDigitBits) == SAMPLE_BINS && SAMPLE_CHUNK == 4 * kDrawThreads);

// One row of logits and how its slot reads them.
struct Row {
    const float* logits;
    const uint32_t* seen;    // null: no penalty
    const uint32_t* counts;  // null: none that goes by them
    SlotSampling slot;
    int n_vocab;
    bool is_aligned;

    DEVICE_MEMBER Row(const SampleParams& p, int row, int slot_index) {
        logits = p.logits + (int64_t)row * p.logits_stride;
        slot = p.samples[slot_index];
        const bool has_penalty =
            sampling_has_penalty(slot.repetition_penalty, slot.frequency_penalty, slot.presence_penalty);
        seen = has_penalty ? p.seen + (int64_t)slot_index * p.seen_words : nullptr;
        counts = slot.frequency_penalty != 0.f ? p.counts + (int64_t)slot_index * p.n_vocab : nullptr;
        n_vocab = p.n_vocab;
        is_aligned = (reinterpret_cast<uint64_t>(logits) & 15) == 0;
    }

    DEVICE_MEMBER bool is_greedy() const { return sampling_is_greedy(slot.temperature); }
    DEVICE_MEMBER bool has_top_k() const { return slot.top_k > 0 && slot.top_k < n_vocab; }
    DEVICE_MEMBER bool has_filter() const { return has_top_k() || slot.top_p < 1.f; }
    // Tokens of less weight are left out.
    DEVICE_MEMBER uint64_t least_weight() const { return sampling_min_p_limit(slot.min_p); }

    // Logits first .. first + 3 (first a multiple of 4); -infinity beyond the vocabulary.
    DEVICE_MEMBER void load(float (&v)[4], int first) const {
        if (is_aligned && first + 4 <= n_vocab) {
            const float4 t = *reinterpret_cast<const float4*>(logits + first);
            v[0] = t.x, v[1] = t.y, v[2] = t.z, v[3] = t.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = first + i < n_vocab ? logits[first + i] : -INFINITY;
        }
    }

    // Seen bits of tokens first .. first + 3.
    DEVICE_MEMBER uint32_t seen_bits(int first) const {
        return seen && first < n_vocab ? seen[first / 32] >> (first % 32) & 15u : 0u;
    }

    // Temperature and penalties of token `id`; the product must not be fused with the difference that follows it.
    DEVICE_MEMBER float x(float logit, int id, bool is_seen) const {
        float v = is_greedy() ? logit : sampling_temper(logit, slot.temperature);
        if (is_seen && v > -INFINITY) {
            v = v > 0.f ? sampling_penalize(v, slot.repetition_penalty) : __fmul_rn(v, slot.repetition_penalty);
            const uint32_t count = counts ? counts[id] : 0;
            v -= sampling_discount(slot.presence_penalty, slot.frequency_penalty, count, slot.temperature);
        }
        return v;
    }
};

DEVICE int bin_of(float x, float max) {
    const int bin = (int)((max - x) * kBinsPerUnit);
    return bin < SAMPLE_BINS - 1 ? bin : SAMPLE_BINS - 1;
}

// The row's maximum over all chunks; `bad` where the row has no distribution. Every warp for itself.
DEVICE SamplePartial row_max(const SampleParams& p, int row) {
    SamplePartial best = {-INFINITY, INT32_MAX, 0, 0};
    for (int i = threadIdx.x % 32; i < p.n_chunks; i += 32) {
        const SamplePartial c = p.partial[(int64_t)row * p.n_chunks + i];
        best.bad |= c.bad;
        if (c.max > best.max) best.max = c.max, best.id = c.id;  // ids ascend
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const float max = __shfl_xor_sync(0xffffffffu, best.max, offset);
        const int id = __shfl_xor_sync(0xffffffffu, best.id, offset);
        best.bad |= __shfl_xor_sync(0xffffffffu, best.bad, offset);
        if (max > best.max || (max == best.max && id < best.id)) best.max = max, best.id = id;
    }
    if (best.max == -INFINITY) best.bad = 1;
    return best;
}

// The edits of the slot to the tokens first .. last - 1 of its row, which no other block touches. Ends with a barrier.
DEVICE void apply_edits(const SampleParams& p, const SlotSampling& slot, int slot_index, int first, int last) {
    float* logits = p.logits + (int64_t)blockIdx.y * p.logits_stride;
    const int32_t* words = p.edits + (int64_t)slot_index * SAMPLING_EDIT_WORDS;
    const SlotEdit* edits = reinterpret_cast<const SlotEdit*>(words);
    const int32_t* history = p.history + (int64_t)slot_index * SAMPLING_HISTORY_WORDS;
    for (int i = threadIdx.x; i < slot.n_bias; i += kThreads) {
        const int token = edits[i].token;
        if (first <= token && token < last) logits[token] += edits[i].bias;
    }
    __syncthreads();
    for (int i = slot.n_bias + threadIdx.x; i < slot.n_edits; i += kThreads) {
        const int token = edits[i].token;
        // what is no number stays, for the row to fail
        if (first <= token && token < last && logits[token] < INFINITY &&
            sampling_edit_applies(&edits[i], words, history))
            logits[token] = -INFINITY;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kThreads) sample_max(const __grid_constant__ SampleParams p) {
    __shared__ SamplePartial warps[kThreads / 32];
    pdl_launch_dependents();
    pdl_wait();
    const int slot = p.slots[blockIdx.y];
    if (slot < 0) return;
    const Row row(p, blockIdx.y, slot);
    if (row.slot.n_edits > 0) {
        const int first = blockIdx.x * SAMPLE_CHUNK;
        apply_edits(p, row.slot, slot, first, first + SAMPLE_CHUNK);
    }
    SamplePartial best = {-INFINITY, INT32_MAX, 0, 0};
    float v[SAMPLE_CHUNK / kThreads / 4][4];
#pragma unroll
    for (int i = 0; i < SAMPLE_CHUNK / kThreads / 4; i++)
        row.load(v[i], blockIdx.x * SAMPLE_CHUNK + (i * kThreads + threadIdx.x) * 4);
#pragma unroll
    for (int i = 0; i < SAMPLE_CHUNK / kThreads / 4; i++) {
        const int first = blockIdx.x * SAMPLE_CHUNK + (i * kThreads + threadIdx.x) * 4;
        const uint32_t seen = row.seen_bits(first);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float x = row.x(v[i][j], first + j, seen >> j & 1);
            if (!(v[i][j] < INFINITY) || !(x < INFINITY)) best.bad = 1;
            if (x > best.max) best.max = x, best.id = first + j;
        }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const float max = __shfl_xor_sync(0xffffffffu, best.max, offset);
        const int id = __shfl_xor_sync(0xffffffffu, best.id, offset);
        best.bad |= __shfl_xor_sync(0xffffffffu, best.bad, offset);
        if (max > best.max || (max == best.max && id < best.id)) best.max = max, best.id = id;
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < kThreads / 32; w++) {
        const SamplePartial c = warps[w];
        best.bad |= c.bad;
        if (c.max > best.max || (c.max == best.max && c.id < best.id)) best.max = c.max, best.id = c.id;
    }
    p.partial[(int64_t)blockIdx.y * p.n_chunks + blockIdx.x] = best;
}

DEVICE uint64_t warp_sum(uint64_t v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

extern "C" __global__ void __launch_bounds__(kThreads) sample_weigh(const __grid_constant__ SampleParams p) {
    __shared__ uint32_t counts[SAMPLE_BINS], low[SAMPLE_BINS], high[SAMPLE_BINS];
    __shared__ uint64_t warps[kThreads / 32];
    pdl_launch_dependents();
    pdl_wait();
    const int slot = p.slots[blockIdx.y];
    if (slot < 0) return;
    const Row row(p, blockIdx.y, slot);
    if (row.is_greedy()) return;
    const SamplePartial top = row_max(p, blockIdx.y);
    if (top.bad) return;
    const bool has_filter = row.has_filter();
    if (has_filter) {
        for (int b = threadIdx.x; b < SAMPLE_BINS; b += kThreads) counts[b] = low[b] = high[b] = 0;
        __syncthreads();
    }
    const uint64_t least = row.least_weight();
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < SAMPLE_CHUNK / kThreads / 4; i++) {
        const int first = blockIdx.x * SAMPLE_CHUNK + (i * kThreads + threadIdx.x) * 4;
        const uint32_t seen = row.seen_bits(first);
        float v[4];
        row.load(v, first);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float x = row.x(v[j], first + j, seen >> j & 1);
            const uint64_t weight = sampling_weight(x, top.max);
            if (!has_filter) {
                if (weight >= least) sum += weight;
            } else if (weight > 0) {
                // 64-bit sums from 32-bit atomics: these are native in shared memory
                const int bin = bin_of(x, top.max);
                const uint32_t part = (uint32_t)weight;
                const uint32_t before = atomicAdd(&low[bin], part);
                const uint32_t carry = (uint32_t)(weight >> 32) + (before + part < part);
                if (carry) atomicAdd(&high[bin], carry);
                atomicAdd(&counts[bin], 1u);
            }
        }
    }
    if (has_filter) {
        __syncthreads();
        for (int b = threadIdx.x; b < SAMPLE_BINS; b += kThreads) {
            if (!counts[b]) continue;
            const int64_t at = (int64_t)blockIdx.y * SAMPLE_BINS + b;
            atomicAdd(&p.bin_counts[at], counts[b]);
            atomicAdd(reinterpret_cast<unsigned long long*>(&p.bin_weights[at]),
                      (unsigned long long)high[b] << 32 | low[b]);
        }
    } else {
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x > 0) return;
        for (int w = 1; w < kThreads / 32; w++) sum += warps[w];
        p.chunk_weights[(int64_t)blockIdx.y * p.n_chunks + blockIdx.x] = sum;
    }
}

struct DrawShared {
    uint64_t weights[SAMPLE_BINS + 1];  // sum over the bins before, then the total
    uint64_t sub_weights[SAMPLE_BINS + 1];
    uint64_t list_keys[kList], list_weights[kList];
    uint64_t warp_weights[32], chunk_weights[kMaxChunks];
    uint32_t counts[SAMPLE_BINS + 1];
    uint32_t sub_counts[SAMPLE_BINS + 1];
    uint32_t warp_counts[32];
    // results of the one thread that finds something
    uint64_t limit_key, limit_weight, rest;
    int bin, chunk, token;
    uint32_t n_list;
};
static_assert(sizeof(DrawShared) <= SAMPLE_DRAW_SMEM);

// Sums over the threads before this one. All 1024 threads; begins and ends with a barrier.
DEVICE void scan_threads(DrawShared& s, uint64_t& weight, uint32_t& count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t w = weight;
    uint32_t c = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, w, offset);
        const uint32_t other_count = __shfl_up_sync(0xffffffffu, c, offset);
        if (lane >= offset) w += other, c += other_count;
    }
    __syncthreads();
    if (lane == 31) s.warp_weights[warp] = w, s.warp_counts[warp] = c;
    __syncthreads();
    // every warp adds up the warps before it
    const uint64_t before = warp_sum(lane < warp ? s.warp_weights[lane] : 0);
    const uint64_t count_before = warp_sum(lane < warp ? (uint64_t)s.warp_counts[lane] : 0);
    weight = before + w - weight;
    count = (uint32_t)count_before + c - count;
    __syncthreads();
}

// Bins to sums over the bins before them; element SAMPLE_BINS becomes the total.
DEVICE void scan_bins(DrawShared& s, uint64_t* weights, uint32_t* counts) {
    const int b = 2 * threadIdx.x;
    const uint64_t w0 = weights[b], w1 = weights[b + 1];
    const uint32_t c0 = counts[b], c1 = counts[b + 1];
    uint64_t w = w0 + w1;
    uint32_t c = c0 + c1;
    scan_threads(s, w, c);
    weights[b] = w, weights[b + 1] = w + w0;
    counts[b] = c, counts[b + 1] = c + c0;
    if (threadIdx.x == kDrawThreads - 1) weights[SAMPLE_BINS] = w + w0 + w1, counts[SAMPLE_BINS] = c + c0 + c1;
    __syncthreads();
}

// The bin in which the prefix that reaches `target` (of weights or of counts) ends. target is 1 .. total.
DEVICE int find_bin(DrawShared& s, const uint64_t* weights, const uint32_t* counts, bool by_weight, uint64_t target) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int b = 2 * threadIdx.x + i;
        const uint64_t before = by_weight ? weights[b] : counts[b], after = by_weight ? weights[b + 1] : counts[b + 1];
        if (before < target && target <= after) s.bin = b;
    }
    __syncthreads();
    const int bin = s.bin;
    __syncthreads();
    return bin;
}

// Calls f(id, x, weight) for the tokens of the row at most `depth` below the maximum, and perhaps some further ones.
template <typename F>
DEVICE void for_tokens(const Row& row, float max, float depth, int first, int last, int thread, int n_threads, F f) {
    // A multiplication tells most tokens apart from those that need the exact division.
    const float factor = 1.f / row.slot.temperature;
    const float floor = max - depth - (0.01f + 1e-6f * (fabsf(max) + 28.f));
#pragma unroll 2
    for (int i = first + 4 * thread; i < last; i += 4 * n_threads) {
        float v[4];
        row.load(v, i);
        const uint32_t seen = row.seen_bits(i);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const bool is_seen = seen >> j & 1;
            if (!is_seen && v[j] * factor < floor) continue;
            const float x = row.x(v[j], i + j, is_seen);
            const uint64_t weight = sampling_weight(x, max);
            if (weight > 0) f(i + j, x, weight);
        }
    }
}

// The token at which the prefix that reaches `target` ends: its key, and the weight of the prefix.
DEVICE void find_limit(DrawShared& s, const Row& row, float max, bool by_weight, uint64_t target) {
    const int bin = find_bin(s, s.weights, s.counts, by_weight, target);
    const float depth = (bin + 1) / kBinsPerUnit + 1e-3f;
    uint64_t weight_before = s.weights[bin];
    uint32_t count_before = s.counts[bin], n = s.counts[bin + 1] - count_before;
    // A crowded bin is divided by the leading digits of the keys, which differ from token to token in the end.
    uint64_t prefix = 0;
    int shift = 64;
    while (n > kList) {
        const int next_shift = shift > kDigitBits ? shift - kDigitBits : 0;
        for (int b = threadIdx.x; b < SAMPLE_BINS; b += kDrawThreads) s.sub_weights[b] = 0, s.sub_counts[b] = 0;
        __syncthreads();
        for_tokens(row, max, depth, 0, row.n_vocab, threadIdx.x, kDrawThreads, [&](int id, float x, uint64_t weight) {
            const uint64_t key = order_key(x, id);
            if (bin_of(x, max) != bin || (shift < 64 && key >> shift != prefix)) return;
            const int digit = SAMPLE_BINS - 1 - (int)(key >> next_shift & ((1 << (shift - next_shift)) - 1));
            atomicAdd(reinterpret_cast<unsigned long long*>(&s.sub_weights[digit]), (unsigned long long)weight);
            atomicAdd(&s.sub_counts[digit], 1u);
        });
        __syncthreads();
        scan_bins(s, s.sub_weights, s.sub_counts);
        const uint64_t inside = target - (by_weight ? weight_before : count_before);
        const int digit = find_bin(s, s.sub_weights, s.sub_counts, by_weight, inside);
        weight_before += s.sub_weights[digit];
        count_before += s.sub_counts[digit];
        n = s.sub_counts[digit + 1] - s.sub_counts[digit];
        prefix = prefix << (shift - next_shift) | (uint64_t)(SAMPLE_BINS - 1 - digit);
        shift = next_shift;
        __syncthreads();
    }
    if (threadIdx.x == 0) s.n_list = 0;
    __syncthreads();
    for_tokens(row, max, depth, 0, row.n_vocab, threadIdx.x, kDrawThreads, [&](int id, float x, uint64_t weight) {
        const uint64_t key = order_key(x, id);
        if (bin_of(x, max) != bin || (shift < 64 && key >> shift != prefix)) return;
        const uint32_t at = atomicAdd(&s.n_list, 1u);
        if (at >= kList) return;
        s.list_keys[at] = key;
        s.list_weights[at] = weight;
    });
    __syncthreads();
    if (threadIdx.x < n) {
        const uint64_t key = s.list_keys[threadIdx.x];
        uint64_t before = by_weight ? weight_before : count_before, weight = weight_before;
        for (uint32_t i = 0; i < n; i++) {
            if (s.list_keys[i] > key) {
                weight += s.list_weights[i];
                before += by_weight ? s.list_weights[i] : 1;
            }
        }
        const uint64_t own = s.list_weights[threadIdx.x];
        if (before < target && target <= before + (by_weight ? own : 1))
            s.limit_key = key, s.limit_weight = weight + own;
    }
    __syncthreads();
}

// The token of a row that has a distribution and is not greedy. All threads get it.
DEVICE int draw(DrawShared& s, const SampleParams& p, const Row& row, float max, int position) {
    const int row_index = blockIdx.x;
    const uint64_t least = row.least_weight();
    uint64_t limit_key = 0;
    if (row.has_filter()) {
        for (int b = threadIdx.x; b < SAMPLE_BINS; b += kDrawThreads) {
            const int64_t at = (int64_t)row_index * SAMPLE_BINS + b;
            s.weights[b] = p.bin_weights[at];
            s.counts[b] = p.bin_counts[at];
            p.bin_weights[at] = 0;
            p.bin_counts[at] = 0;
        }
        __syncthreads();
        scan_bins(s, s.weights, s.counts);
        uint64_t total = s.weights[SAMPLE_BINS];
        if (row.has_top_k() && (uint32_t)row.slot.top_k < s.counts[SAMPLE_BINS]) {
            find_limit(s, row, max, false, row.slot.top_k);
            limit_key = s.limit_key;
            total = s.limit_weight;
        }
        if (row.slot.top_p < 1.f) {
            __syncthreads();
            find_limit(s, row, max, true, sampling_top_p_target(row.slot.top_p, total));
            if (s.limit_key > limit_key) limit_key = s.limit_key;
        }
    }
    const auto kept = [&](int id, float x, uint64_t weight) {
        return weight >= least && order_key(x, id) >= limit_key;
    };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row.has_filter()) {
        // No token of the prefix is deeper than its last one, the limit.
        const float limit_x = key_value(limit_key);
        const float depth = limit_key ? max - limit_x : 28.f;
        for (int chunk = warp; chunk < p.n_chunks; chunk += kDrawThreads / 32) {
            const int end = (chunk + 1) * SAMPLE_CHUNK < row.n_vocab ? (chunk + 1) * SAMPLE_CHUNK : row.n_vocab;
            uint64_t sum = 0;
            for_tokens(row, max, depth, chunk * SAMPLE_CHUNK, end, lane, 32, [&](int id, float x, uint64_t weight) {
                if (kept(id, x, weight)) sum += weight;
            });
            sum = warp_sum(sum);
            if (lane == 0) s.chunk_weights[chunk] = sum;
        }
    } else {
        for (int chunk = threadIdx.x; chunk < p.n_chunks; chunk += kDrawThreads)
            s.chunk_weights[chunk] = p.chunk_weights[(int64_t)row_index * p.n_chunks + chunk];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint64_t total = 0;
        for (int chunk = 0; chunk < p.n_chunks; chunk++) total += s.chunk_weights[chunk];
        uint64_t rest = sampling_scale(sampling_random(row.slot.seed, (uint32_t)position + 1), total);
        int chunk = 0;
        while (chunk < p.n_chunks - 1 && rest >= s.chunk_weights[chunk]) rest -= s.chunk_weights[chunk++];
        s.chunk = chunk;
        s.rest = rest;
    }
    __syncthreads();
    const int first = s.chunk * SAMPLE_CHUNK + 4 * threadIdx.x;
    const uint32_t seen = row.seen_bits(first);
    float v[4];
    row.load(v, first);
    uint64_t weights[4], sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float x = row.x(v[j], first + j, seen >> j & 1);
        const uint64_t weight = sampling_weight(x, max);
        weights[j] = kept(first + j, x, weight) ? weight : 0;
        sum += weights[j];
    }
    uint64_t before = sum;
    uint32_t unused = 0;
    scan_threads(s, before, unused);
    if (before <= s.rest && s.rest < before + sum) {
        int j = 0;
        while (j < 3 && before + weights[j] <= s.rest) before += weights[j++];
        s.token = first + j;
    }
    __syncthreads();
    return s.token;
}

// What the host and the next step see of the row's token. One thread; the last row of the launch ends the step.
DEVICE void publish(const SampleParams& p, int slot, int position, int token, bool is_counted, bool has_history) {
    const int row = blockIdx.x;
    const uint64_t step = *p.step;
    if (slot >= 0) {
        if (token >= 0) {
            atomicOr(&p.seen[(int64_t)slot * p.seen_words + token / 32], 1u << (token % 32));
            if (is_counted) p.counts[(int64_t)slot * p.n_vocab + token]++;
            if (has_history) sampling_remember(p.history + (int64_t)slot * SAMPLING_HISTORY_WORDS, token);
        }
        if (p.next_tokens) p.next_tokens[row] = token >= 0 ? token : 0;
        if (p.advance) p.positions[row] = position + 1;
        p.out[(int64_t)(step % p.out_steps) * p.out_stride + row] = token;
    }
    __threadfence_system();
    if (atomicAdd(p.done, 1u) != gridDim.x - 1) return;
    *p.done = 0;
    *p.step = step + 1;
    __threadfence_system();
    if (p.host_step) *reinterpret_cast<volatile uint64_t*>(p.host_step) = step + 1;
}

extern "C" __global__ void __launch_bounds__(kDrawThreads) sample_draw(const __grid_constant__ SampleParams p) {
    extern __shared__ __align__(16) uint8_t smem[];
    pdl_launch_dependents();
    pdl_wait();
    const int slot = p.slots[blockIdx.x];
    int token = -1, position = 0;
    bool is_counted = false, has_history = false;
    if (slot >= 0) {
        const Row row(p, blockIdx.x, slot);
        position = p.positions[blockIdx.x];
        is_counted = row.counts != nullptr;
        has_history = row.slot.n_edits > 0;
        const SamplePartial top = row_max(p, blockIdx.x);
        if (!top.bad)
            token = row.is_greedy() ? top.id : draw(*reinterpret_cast<DrawShared*>(smem), p, row, top.max, position);
    }
    if (threadIdx.x == 0) publish(p, slot, position, token, is_counted, has_history);
}
