// Parameters of sample.cu; csrc/params/sampling.h says how a token is drawn, and how a slot samples. Plain C.
#ifndef WORKER_ORCD_SAMPLE_PARAMS_H
#define WORKER_ORCD_SAMPLE_PARAMS_H

#include <stdint.h>

#include "params/host_device.h"
#include "params/sampling.h"

#define SAMPLE_CHUNK 4096  // logits of one block of sample_max and sample_weigh
#define SAMPLE_BINS 2048
#define SAMPLE_MAX_VOCAB 262144
#define SAMPLE_DRAW_SMEM 67072  // dynamic shared memory of sample_draw

static HOST_DEVICE int32_t sample_chunks(int32_t n_vocab) { return (n_vocab + SAMPLE_CHUNK - 1) / SAMPLE_CHUNK; }

// What sample_max leaves of one chunk.
typedef struct {
    float max;
    int32_t id;   // lowest id that has it
    int32_t bad;  // not zero: a NaN or an infinity
    int32_t reserved;
} SamplePartial;

// In this order, all three with the same struct:
// sample_max: grid (sample_chunks(n_vocab), n_rows), block 256. sample_weigh: the same; may be left out where every
// live slot is greedy. sample_draw: grid (n_rows), block 1024, dynamic shared memory SAMPLE_DRAW_SMEM. n_vocab is at
// most SAMPLE_MAX_VOCAB. A dead row (slot < 0) draws nothing and writes nothing of its own.
typedef struct {
    float* logits;                // [n_rows, n_vocab]; sample_max edits those of slots that have edits
    const SlotSampling* samples;  // [max_seqs]
    const int32_t* slots;         // [n_rows]
    int32_t* positions;           // [n_rows] of the rows the logits belong to; the drawn tokens' are one higher
    const int32_t* edits;         // [max_seqs, SAMPLING_EDIT_WORDS]; of slots that have some
    int32_t* history;         // [max_seqs, SAMPLING_HISTORY_WORDS]; the draw adds its token where the slot has edits
    uint32_t* seen;           // [max_seqs, seen_words] tokens sampled in the slot, a bit each; the draw sets its bit
    uint32_t* counts;         // [max_seqs, n_vocab] how often; counted where the slot has a frequency penalty
    SamplePartial* partial;   // workspace [n_rows, n_chunks]
    uint64_t* chunk_weights;  // workspace [n_rows, n_chunks]
    uint64_t* bin_weights;    // workspace [n_rows, SAMPLE_BINS], zero before the first launch; left zero
    uint32_t* bin_counts;     // workspace [n_rows, SAMPLE_BINS], zero before the first launch; left zero
    uint32_t* done;           // workspace [1], zero before the first launch; left zero
    int32_t* next_tokens;     // [n_rows] input of the next step (0 where the draw failed), or null
    int32_t* out;             // host memory [out_steps, out_stride]: row step % out_steps takes the tokens; -1: failed
    uint64_t* step;           // [1] steps done; one more after this launch
    uint64_t* host_step;      // host memory [1]: the same number, written after the tokens; or null
    int32_t logits_stride, n_vocab, n_chunks, seen_words;
    int32_t out_steps, out_stride;
    int32_t advance;  // not zero: positions[row] += 1
} SampleParams;

#endif
