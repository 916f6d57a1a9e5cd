// Parameters of attention_decode.cu and attention_prefill.cu. Plain C; q and out are float32 row-major, rows `*_stride`
// floats apart. Whatever changes from step to step is read from device memory, so that a captured launch can be
// replayed. A row whose slot is negative is dead: it is there to fill a batch shape and gets zeros as output.
#ifndef WORKER_ORCD_ATTENTION_PARAMS_H
#define WORKER_ORCD_ATTENTION_PARAMS_H

#include <stdint.h>

#include "params/kv_cache.h"

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

#endif
