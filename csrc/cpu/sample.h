// Drawing tokens from logits on the CPU, by the rule of csrc/params/sampling.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "params/sampling.h"

namespace worker_orcd {

// The tokens sampled in a slot, each once: what the repetition penalty counts.
class SampledSet {
  public:
    // Room for all tokens a sequence of context_length can draw: inserting allocates nothing.
    SampledSet(int64_t n_vocab, int64_t context_length);
    void clear();
    void insert(int32_t token);
    const std::vector<int32_t>& tokens() const { return tokens_; }

  private:
    std::vector<uint64_t> bits_;   // [n_vocab / 64]
    std::vector<int32_t> tokens_;  // distinct, in order of first appearance
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

// The token of the row `logits` [n_vocab] at `position`; -1 where the row has no distribution.
int32_t sample(const float* logits, int64_t n_vocab, int32_t position, const SlotSampling& params,
               const SampledSet& sampled, SampleScratch& scratch);

}  // namespace worker_orcd
