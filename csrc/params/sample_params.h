// Parameters of sample.cu; csrc/params/sampling.h says how a token is drawn, and how a slot samples. Plain C.
#ifndef WORKER_ORCD_SAMPLE_PARAMS_H
#define WORKER_ORCD_SAMPLE_PARAMS_H

#include <stdint.h>

#include "params/host_device.h"
#include "params/sampling.h"

#define SAMPLE_THREADS 512  // of a block of both kernels
#define SAMPLE_GROUP 128    // tokens that a warp looks at together: four a lane
#define SAMPLE_BINS 2048
#define SAMPLE_TOP_K 128  // largest top_k for which sample_max draws by itself
#define SAMPLE_MAX_VOCAB 262144

static HOST_DEVICE int32_t sample_groups(int32_t n_vocab) { return (n_vocab + SAMPLE_GROUP - 1) / SAMPLE_GROUP; }

// Blocks of one row: two groups a warp, fewer blocks where many rows fill the GPU anyway. Results do not depend on it.
static HOST_DEVICE int32_t sample_blocks(int32_t n_vocab, int32_t n_rows, int32_t n_sm) {
    int32_t per_block = 2 * SAMPLE_THREADS / 32;
    int32_t blocks = (sample_groups(n_vocab) + per_block - 1) / per_block, share = 2 * n_sm / n_rows;
    return blocks < share ? blocks : share > 1 ? share : 1;
}

// Whether sample_max alone gives the token of a row: it is greedy, or its top-k is on and small.
static HOST_DEVICE int32_t sample_is_short(float temperature, int32_t top_k, int32_t n_vocab) {
    return sampling_is_greedy(temperature) || (top_k > 0 && top_k < n_vocab && top_k <= SAMPLE_TOP_K);
}

// In this order, both with the same struct, the same grid (sample_blocks(n_vocab, n_rows, multiprocessors), n_rows) and
// blocks of SAMPLE_THREADS: sample_max, then sample_draw, which may be left out where every live row is short. n_vocab
// is at most SAMPLE_MAX_VOCAB. A dead row (slot < 0) draws nothing and writes nothing of its own. What is "left zero"
// must be zero before the first launch.
typedef struct {
    float* logits;                // [n_rows, n_vocab]; sample_max edits those of slots that have edits
    const SlotSampling* samples;  // [max_seqs]
    const int32_t* slots;         // [n_rows]
    int32_t* positions;           // [n_rows] of the rows the logits belong to; the drawn tokens' are one higher
    const int32_t* edits;         // [max_seqs, SAMPLING_EDIT_WORDS]; of slots that have some
    int32_t* history;         // [max_seqs, SAMPLING_HISTORY_WORDS]; the draw adds its token where the slot has edits
    uint32_t* seen;           // [max_seqs, seen_words] tokens sampled in the slot, a bit each; the draw sets its bit
    uint32_t* counts;         // [max_seqs, n_vocab] how often; counted where the slot has a frequency penalty
    uint64_t* best;           // workspace [n_rows] key of the largest x; left zero
    uint32_t* arrived;        // workspace [n_rows] blocks that have done their part of the row; left zero
    uint64_t* group_keys;     // workspace [n_rows, n_groups] key of the largest x of every group, of rows that draw
    uint64_t* group_weights;  // workspace [n_rows, n_groups] sums of weights, of rows without top-k and top-p
    uint64_t* bin_weights;    // workspace [n_rows, SAMPLE_BINS]; left zero
    uint32_t* bin_counts;     // workspace [n_rows, SAMPLE_BINS]; left zero
    uint32_t* done;           // workspace [1] rows that have their token; left zero
    int32_t* next_tokens;     // [n_rows] input of the next step (0 where the draw failed), or null
    int32_t* out;             // host memory [out_steps, out_stride]: row step % out_steps takes the tokens; -1: failed
    uint64_t* step;           // [1] steps done; one more after the last row's token
    uint64_t* host_step;      // host memory [1]: the same number, written after the tokens; or null
    int32_t draw_follows;     // not zero: sample_draw is launched too. Else a row that needs it fails
    int32_t logits_stride, n_vocab, n_groups, seen_words;
    int32_t out_steps, out_stride;
    int32_t advance;  // not zero: positions[row] += 1
} SampleParams;

#endif
