// See sample.h; the steps are numbered as in csrc/params/sampling.h.
//
// No full sort: top-k and top-p both want a prefix of the order, found by partitioning (quickselect by count and by sum
// of weights), and weights below 2^-40 of the largest, which are most of a vocabulary, never become candidates.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace worker_orcd {

SampledTokens::SampledTokens(int64_t n_vocab, int64_t context_length)
    : counts_((uint32_t*)std::calloc((size_t)n_vocab, sizeof(uint32_t))) {
    if (!counts_) throw std::bad_alloc();
    tokens_.reserve((size_t)std::min(n_vocab, context_length));
}

void SampledTokens::clear() {
    for (int32_t token : tokens_) counts_[(size_t)token] = 0;
    tokens_.clear();
    history_[0] = 0;
}

void SampledTokens::insert(int32_t token) {
    if (counts_[(size_t)token]++ == 0) tokens_.push_back(token);
    sampling_remember(history_, token);
}

static void apply_edits(float* y, const int32_t* words, const SlotSampling& p, const int32_t* history) {
    const SlotEdit* edits = (const SlotEdit*)words;
    for (int32_t i = 0; i < p.n_bias; ++i) y[edits[i].token] += edits[i].bias;
    for (int32_t i = p.n_bias; i < p.n_edits; ++i)
        if (sampling_edit_applies(&edits[i], words, history)) y[edits[i].token] = -INFINITY;
}

// Sorted descending: larger x first, then smaller id. -0 is made +0 so that the two are equal.
static uint64_t make_key(float x, int32_t id) {
    x += 0.0f;
    uint32_t u;
    std::memcpy(&u, &x, 4);
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (uint64_t)u << 32 | (uint32_t)~id;
}
static int32_t id_of(const Candidate& c) { return (int32_t)~(uint32_t)c.key; }
static bool before(const Candidate& a, const Candidate& b) { return a.key > b.key; }

// Largest value, its lowest index, and whether the row has a distribution (step 0).
static bool find_max(const float* x, int64_t n, float* max, int32_t* id) {
    float best = -INFINITY;
    bool good = true;
    for (int64_t i = 0; i < n; ++i) {
        good &= x[i] < INFINITY;  // false for NaN
        best = x[i] > best ? x[i] : best;
    }
    if (!good || best == -INFINITY) return false;
    *max = best;
    *id = (int32_t)(std::find(x, x + n, best) - x);
    return true;
}

// Shortens the candidates to the shortest prefix of the order whose weights reach `target`.
static void keep_prefix(std::vector<Candidate>& c, uint64_t target) {
    auto begin = c.begin(), end = c.end();
    uint64_t sum = 0;
    while (end - begin > 16) {
        auto mid = begin + (end - begin) / 2;
        std::nth_element(begin, mid, end, before);
        uint64_t left = 0;
        for (auto it = begin; it != mid; ++it) left += it->weight;
        if (sum + left >= target) {
            end = mid;
        } else {
            sum += left;
            begin = mid;
        }
    }
    std::sort(begin, end, before);
    for (; begin != end && sum < target; ++begin) sum += begin->weight;
    c.erase(begin, c.end());
}

int32_t sample(const float* logits, int64_t n_vocab, int32_t position, const SlotSampling& p, const int32_t* edits,
               const SampledTokens& sampled, SampleScratch& scratch) {
    float max;
    int32_t best;
    const bool greedy = sampling_is_greedy(p.temperature),
               penalize = sampling_has_penalty(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) &&
                          !sampled.distinct().empty();
    if (!find_max(logits, n_vocab, &max, &best)) return -1;
    if (greedy && !penalize && !p.n_edits) return best;

    std::vector<float>& x = scratch.x;
    x.assign(logits, logits + n_vocab);
    if (p.n_edits) apply_edits(x.data(), edits, p, sampled.history());
    if (!greedy)
        for (float& v : x) v = sampling_temper(v, p.temperature);
    if (penalize)
        for (int32_t i : sampled.distinct()) {
            float& v = x[(size_t)i];
            if (v == -INFINITY) continue;  // banned, and a penalty of less than any float is 0
            v = sampling_penalize(v, p.repetition_penalty) -
                sampling_discount(p.presence_penalty, p.frequency_penalty, sampled.count(i), p.temperature);
        }
    if (!find_max(x.data(), n_vocab, &max, &best)) return -1;
    if (greedy) return best;

    std::vector<Candidate>& c = scratch.candidates;
    c.clear();
    for (int64_t i = 0; i < n_vocab; ++i) {
        uint64_t w = sampling_weight(x[(size_t)i], max);
        if (w > 0) c.push_back({make_key(x[(size_t)i], (int32_t)i), w});
    }
    bool in_id_order = true;
    if (p.top_k > 0 && (size_t)p.top_k < c.size()) {
        in_id_order = false;
        std::nth_element(c.begin(), c.begin() + p.top_k, c.end(), before);
        c.resize((size_t)p.top_k);
    }
    uint64_t total = 0;
    for (const Candidate& v : c) total += v.weight;
    if (p.top_p < 1) {
        in_id_order = false;
        keep_prefix(c, sampling_top_p_target(p.top_p, total));
    }
    if (p.min_p > 0) {
        uint64_t limit = sampling_min_p_limit(p.min_p);
        c.erase(std::remove_if(c.begin(), c.end(),
                               [&](const Candidate& v) { return v.weight < limit && id_of(v) != best; }),
                c.end());
    }
    if (!in_id_order)
        std::sort(c.begin(), c.end(), [](const Candidate& a, const Candidate& b) { return id_of(a) < id_of(b); });
    total = 0;
    for (const Candidate& v : c) total += v.weight;
    uint64_t target = sampling_scale(sampling_random(p.seed, (uint32_t)position + 1), total), sum = 0;
    for (const Candidate& v : c) {
        sum += v.weight;
        if (sum > target) return id_of(v);
    }
    return best;  // not reached: target < total
}

}  // namespace worker_orcd
