// Drawing tokens from logits on the CPU, by the rule of csrc/params/sampling.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "params/sampling.h"

namespace worker_orcd {

// The tokens sampled in a slot: what the penalties count, and what bans go by.
class SampledTokens {
  public:
    // Room for all tokens a sequence of context_length can draw: inserting allocates nothing.
    SampledTokens(int64_t n_vocab, int64_t context_length);
    void clear();
    void insert(int32_t token);
    const std::vector<int32_t>& distinct() const { return tokens_; }
    uint32_t count(int32_t token) const { return counts_[(size_t)token]; }
    const int32_t* history() const { return history_; }  // as sampling_edit_applies takes it

  private:
    struct Free {
        void operator()(uint32_t* p) const { std::free(p); }
    };
    std::unique_ptr<uint32_t[], Free> counts_;  // [n_vocab], pages that cost memory when they are first written
    std::vector<int32_t> tokens_;               // distinct, in order of first appearance
    int32_t history_[SAMPLING_HISTORY_WORDS] = {};
};

// One candidate token; `key` orders by x descending, then id ascending, when sorted descending.
struct Candidate {
    uint64_t key;
    uint64_t weight;
};

// Reused between draws so that drawing allocates nothing.
struct SampleScratch {
    explicit SampleScratch(int64_t n_vocab) {
        x.reserve((size_t)n_vocab);
        candidates.reserve((size_t)n_vocab);
    }
    std::vector<float> x;               // [n_vocab]
    std::vector<Candidate> candidates;  // [n_vocab]
};

// The token of the row `logits` [n_vocab] at `position`; -1 where the row has no distribution. `edits`: the words of
// params.n_edits edits.
int32_t sample(const float* logits, int64_t n_vocab, int32_t position, const SlotSampling& params, const int32_t* edits,
               const SampledTokens& sampled, SampleScratch& scratch);

}  // namespace worker_orcd
