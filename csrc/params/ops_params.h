// Parameter structs of every kernel that is not a matrix product, and the rules of shape that host and device share.
// Plain C, included by the kernels, by Cython and by tests. Every kernel takes exactly one of these structs by value.
//
// Conventions: activations are float32 row-major, rows `*_stride` floats apart. Whatever changes from step to step is
// read from device memory, so that a captured launch can be replayed. A row whose slot is negative is dead: it is
// there to fill a batch shape, writes nothing to the cache and gets zeros as attention output.
#ifndef WORKER_ORCD_OPS_PARAMS_H
#define WORKER_ORCD_OPS_PARAMS_H

#include <stdint.h>

#include "params/host_device.h"

// ---- the paged KV cache ------------------------------------------------------------------------------------------
// One float16 arena per layer, [n_blocks][n_head_kv][2][64 * head_dim]. A block holds 64 positions of one sequence;
// per KV head first K as [64 positions][head_dim], then V *transposed*, as [head_dim][64 positions]: both then serve
// as matrix operands with 16-byte reads and no transposition in attention. Clear the arena once before use.
#define KV_BLOCK 64

// Halves from the arena's start to the K part of (block, head); its V part follows after KV_BLOCK * head_dim.
static HOST_DEVICE int64_t kv_offset(int64_t block, int32_t head, int32_t n_head_kv, int32_t head_dim) {
    return (block * n_head_kv + head) * (2 * KV_BLOCK) * head_dim;
}

// ---- norm.cu -----------------------------------------------------------------------------------------------------
#define NORM_RMS 0
#define NORM_LAYER 1

// norm_vec4, norm_scalar: grid (n_rows), block norm_threads(n, is_scalar). norm_group: grid (ceil(n_group / 8),
// n_rows), block 256; there `n` is the width of one group.
typedef struct {
    float* x;               // [n_rows, n]; becomes x + residual where residual is given
    const float* residual;  // [n_rows, n] or null (norm_group: null)
    const float* weight;    // [n]
    const float* bias;      // [n] or null
    float* out;             // [n_rows, n]; may be x where residual is null
    int32_t x_stride, residual_stride, out_stride;
    int32_t n;
    int32_t kind;     // NORM_RMS, NORM_LAYER
    int32_t n_group;  // norm_group: groups of a row
    float eps;
} NormParams;

// Columns that one thread of norm_vec4 and norm_scalar can hold in registers.
#define NORM_COLUMNS 16

// Threads of a block for rows of n columns: about 8 columns a thread, at most 1024 (n <= 16384); for norm_scalar at
// most 512 (n <= 8192), as its addresses take more registers.
static HOST_DEVICE int32_t norm_threads(int32_t n, int32_t is_scalar) {
    const int32_t most = is_scalar ? 512 : 1024;
    int32_t threads = 128;
    while (threads < most && threads * 8 < n) threads *= 2;
    return threads;
}

// ---- rope_kv.cu --------------------------------------------------------------------------------------------------
#define ROPE_INTERLEAVED 0
#define ROPE_NEOX 1
#define ROPE_MAX_PAIRS 128

// rope_kv: grid (n_rows, any y >= 1), block 256.
typedef struct {
    float* q;                    // [n_rows, n_head * head_dim], rotated in place; null: no rotation of q
    float* k;                    // [n_rows, n_head_kv * head_dim], rotated in place; null: q alone
    const float* v;              // [n_rows, n_head_kv * head_dim]; null: nothing goes to the cache
    const float* inv_freq;       // [n_rot / 2], radians per position; with rope_tables one such table after another
    const int32_t* rope_tables;  // [max_seqs], the table that a slot's sequence turns by; null: there is one
    uint16_t* kv;                // this layer's arena, float16
    const int32_t* block_table;  // [max_seqs, max_blocks] of this layer's KV group
    const int32_t* positions;    // [n_rows]
    const int32_t* slots;        // [n_rows]
    int32_t q_stride, k_stride, v_stride;
    int32_t n_head, n_head_kv, head_dim;
    int32_t n_rot;      // 0: no rotation, the cache is written only
    int32_t rope_type;  // ROPE_INTERLEAVED, ROPE_NEOX
    int32_t max_blocks;
    float mscale;
} RopeKvParams;

// ---- attention_decode.cu -----------------------------------------------------------------------------------------
// Query heads of one KV head that a block serves together.
#define DECODE_HEADS 8

// attention_decode_<head_dim>: grid (x, n_head_kv * decode_head_tiles(), n_rows), block 128, dynamic shared memory
// decode_smem_bytes(head_dim). x is free (the blocks of a row take its splits in turn, results do not depend on it):
// as many as fill the GPU, at most max_splits.
typedef struct {
    const float* q;              // [n_rows, n_head * head_dim], rotated
    const uint16_t* kv;          // this layer's arena, float16
    const int32_t* block_table;  // [max_seqs, max_blocks] of this layer's KV group
    const int32_t* positions;    // [n_rows]
    const int32_t* slots;        // [n_rows]
    const float* sinks;          // [n_head] or null
    float* out;                  // [n_rows, n_head * head_dim]
    float* partial;              // workspace [n_rows, n_head, max_splits, head_dim + 4]
    uint32_t* counters;          // workspace [n_rows, gridDim.y], zero before the first launch; left zero
    int32_t q_stride, out_stride;
    int32_t n_head, n_head_kv;
    int32_t max_blocks;
    int32_t max_splits;  // of the workspace: decode_max_splits(context_length, window)
    int32_t window;      // 0: all positions
    float scale;
} AttentionDecodeParams;

// Positions of one split for a row that attends to n_keys keys. A function of the row alone, so that its sums are
// grouped the same way in every batch; grows with the row so that the last step (adding at most 129 splits) stays
// short.
static HOST_DEVICE int32_t decode_split(int32_t n_keys) {
    if (n_keys <= 4096) return 128;
    if (n_keys <= 16384) return 256;
    int32_t split = 512;
    while ((n_keys + 127) / 128 > split) split *= 2;
    return split;
}

// Most splits of a row over all positions below context_length; one more than the keys fill, as a window straddles.
static HOST_DEVICE int32_t decode_max_splits(int32_t context_length, int32_t window) {
    const int32_t n = window > 0 && window < context_length ? window : context_length;
    const int32_t edges[4] = {4096, 16384, 65536, n};
    int32_t most = 0;
    for (int32_t i = 0; i < 4; i++) {
        const int32_t keys = edges[i] < n ? edges[i] : n;
        const int32_t splits = (keys + decode_split(keys) - 1) / decode_split(keys) + 1;
        if (splits > most) most = splits;
    }
    return most;
}

static HOST_DEVICE int32_t decode_head_tiles(int32_t n_head, int32_t n_head_kv) {
    return (n_head / n_head_kv + DECODE_HEADS - 1) / DECODE_HEADS;
}

// Four warps, each with one chunk of K and one of V, 32 positions each; dimensions padded to 32.
static HOST_DEVICE int32_t decode_smem_bytes(int32_t head_dim) {
    return 4 * ((head_dim + 31) / 32 * 32 + head_dim) * 32 * 2;
}

// ---- attention_prefill.cu ----------------------------------------------------------------------------------------
#define PREFILL_ROWS 64

// Consecutive positions of one sequence: rows row .. row + n_rows of the step at positions position .. .
// Tiles that end at a multiple of 64 positions touch the fewest key blocks. n_rows 0: an unused entry.
typedef struct {
    int32_t row, n_rows, position, slot;
} AttentionTile;

// attention_prefill_<head_dim>: grid (n_tiles, n_head), block 128, dynamic shared memory prefill_smem_bytes(head_dim).
// Rows in no tile are left alone.
typedef struct {
    const float* q;              // [n_rows, n_head * head_dim], rotated
    const uint16_t* kv;          // this layer's arena, float16
    const int32_t* block_table;  // [max_seqs, max_blocks] of this layer's KV group
    const AttentionTile* tiles;  // [gridDim.x]; longest first is fastest
    const float* sinks;          // [n_head] or null
    float* out;                  // [n_rows, n_head * head_dim]
    int32_t q_stride, out_stride;
    int32_t n_head, n_head_kv;
    int32_t max_blocks;
    int32_t window;  // 0: all positions
    float scale;
} AttentionPrefillParams;

// Two stages of K [64][head_dim] and V [head_dim][64]; rows padded by 16 bytes against bank conflicts.
static HOST_DEVICE int32_t prefill_smem_bytes(int32_t head_dim) {
    return 2 * (KV_BLOCK * (2 * head_dim + 16) + head_dim * (2 * KV_BLOCK + 16));
}

// ---- pointwise.cu ------------------------------------------------------------------------------------------------
#define GLU_SILU 0
#define GLU_GELU 1
#define GLU_SWIGLU_OAI 2

// glu, act_gelu_tanh, add, gather_rows: grid (ceil(ceil(n / 4) / 256), n_rows), block 256.
// glu: out = act(a) * b. act_gelu_tanh: out = gelu(a). add: out += a. gather_rows: out[j] = a[rows[j]].
typedef struct {
    const float* a;       // [n_rows, n]; glu: gate; gather_rows: [any, n]
    const float* b;       // [n_rows, n]; glu: up
    float* out;           // [n_rows, n]; glu and act: may be a
    const int32_t* rows;  // [n_rows]; gather_rows: row of a, negative: out row becomes zero
    int32_t a_stride, b_stride, out_stride;
    int32_t n;
    int32_t kind;  // glu: GLU_*
} PointwiseParams;

// ---- sample.cu ---------------------------------------------------------------------------------------------------
#define SAMPLE_CHUNK 4096  // logits of one block of sample_max and sample_weigh
#define SAMPLE_BINS 2048
#define SAMPLE_MAX_VOCAB 262144

static HOST_DEVICE int32_t sample_chunks(int32_t n_vocab) { return (n_vocab + SAMPLE_CHUNK - 1) / SAMPLE_CHUNK; }

// How one slot samples; csrc/params/sampling.h says what the numbers mean.
typedef struct {
    uint64_t seed;
    float temperature;         // below 1e-5: greedy
    float top_p;               // 1: off
    float min_p;               // 0: off
    float repetition_penalty;  // 1: off
    int32_t top_k;             // 0: off
    int32_t reserved;
} SlotSampling;

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
    const float* logits;          // [n_rows, n_vocab]
    const SlotSampling* samples;  // [max_seqs]
    const int32_t* slots;         // [n_rows]
    int32_t* positions;           // [n_rows] of the rows the logits belong to; the drawn tokens' are one higher
    uint32_t* seen;           // [max_seqs, seen_words] tokens sampled in the slot, a bit each; the draw sets its bit
    SamplePartial* partial;   // workspace [n_rows, n_chunks]
    uint64_t* chunk_weights;  // workspace [n_rows, n_chunks]
    uint64_t* bin_weights;    // workspace [n_rows, SAMPLE_BINS], zero before the first launch; left zero
    uint32_t* bin_counts;     // workspace [n_rows, SAMPLE_BINS], zero before the first launch; left zero
    uint32_t* done;           // workspace [1], zero before the first launch; left zero
    int32_t* next_tokens;     // [n_rows] input of the next step (0 where the draw failed), or null
    int32_t* out;             // host memory [out_steps, out_stride]: row step % out_steps takes the tokens; -1: failed
    uint64_t* step;           // [1] steps done; one more after this launch
    uint64_t* host_step;      // host memory [1]: the same number, written after the tokens; or null
    int32_t* failed;          // [1] set to 1 by a row whose draw failed; or null
    int32_t logits_stride, n_vocab, n_chunks, seen_words;
    int32_t out_steps, out_stride;
    int32_t advance;  // not zero: positions[row] += 1
} SampleParams;

#define SAMPLE_DRAW_SMEM 67072

#endif
