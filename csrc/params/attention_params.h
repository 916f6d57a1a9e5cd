// Parameters of attention_decode.cu and attention_prefill.cu. Plain C; q, k, v and out are float32 row-major, rows
// `*_stride` floats apart. Whatever changes from step to step is read from device memory, so that a captured launch can
// be replayed. A row whose slot is negative is dead: it is there to fill a batch shape and gets zeros as output.
#ifndef WORKER_ORCD_ATTENTION_PARAMS_H
#define WORKER_ORCD_ATTENTION_PARAMS_H

#include <stdint.h>

#include "params/kv_cache.h"

// Keys of one split: positions [128 i, 128 i + 128) of the sequence. The sums of a row are grouped by it in every
// kernel, at any length; see attention.cuh. Two blocks of the cache.
#define ATTENTION_SPLIT 128

// Query heads of one KV head that a block serves together: the rows of one matrix product.
#define DECODE_HEADS 16
// Threads of a group of a block, and most groups; each has every so-manieth of the block's splits.
#define DECODE_THREADS 256
#define DECODE_GROUPS 2
// Most splits of a group that are in shared memory at once.
#define DECODE_DEPTH 2
// Blocks of a launch up to which a row may be shared by several; more fill a GPU by themselves.
#define DECODE_SPREAD_BLOCKS 128

// attention_decode_<head_dim>: grid (x, n_head_kv * decode_head_tiles(), n_rows), block groups * DECODE_THREADS,
// dynamic shared memory decode_smem_bytes(head_dim, groups, depth). x, groups and depth are free (the blocks of a row
// take its splits in turn, results depend on none of them): x as many as fill the GPU, at most max_splits.
//
// With k and v the row's own position is not in the cache yet: q and k are rotated as rope_kv does, and k and v are
// written to the cache. Without them rope_kv came before, and inv_freq, rope_tables, n_rot, rope_type and mscale are
// not looked at. The views are only read.
//
// May start before the kernels it depends on have finished: it reads slots, positions, tables and earlier positions of
// the cache at once.
typedef struct {
    const float* q;              // [n_rows, n_head * head_dim]
    const float* k;              // [n_rows, n_head_kv * head_dim] or null
    const float* v;              // [n_rows, n_head_kv * head_dim], null where k is
    const float* inv_freq;       // [n_rot / 2], radians per position; with rope_tables one such table after another
    const int32_t* rope_tables;  // [max_seqs], the table that a slot's sequence turns by; null: there is one
    uint16_t* kv;                // this layer's arena, float16
    const int32_t* block_table;  // [max_seqs, max_blocks] of this layer's KV group
    const int32_t* positions;    // [n_rows]
    const int32_t* slots;        // [n_rows]
    const float* sinks;          // [n_head] or null
    float* out;                  // [n_rows, n_head * head_dim]
    float* partial;      // workspace [n_rows, n_head, max_splits, head_dim + 4]; not used where x and groups are 1
    uint32_t* counters;  // workspace [n_rows, gridDim.y], zero before the first launch; left zero; likewise
    int32_t q_stride, k_stride, v_stride, out_stride;
    int32_t n_head, n_head_kv;
    int32_t kv_group, head_tiles;  // n_head / n_head_kv, decode_head_tiles()
    int32_t n_rot;                 // 0: no rotation
    int32_t rope_type;             // ROPE_INTERLEAVED, ROPE_NEOX
    int32_t max_blocks;
    int32_t max_splits;  // of the workspace: decode_max_splits(context_length, window)
    int32_t window;      // 0: all positions
    int32_t groups;      // 1 .. DECODE_GROUPS; more is faster where there are few rows
    int32_t depth;       // 1 .. DECODE_DEPTH; likewise
    float scale, mscale;
} AttentionDecodeParams;

// Most splits of a row over all positions below context_length; a window may straddle one more than its keys fill.
static HOST_DEVICE int32_t decode_max_splits(int32_t context_length, int32_t window) {
    const int32_t all = (context_length + ATTENTION_SPLIT - 1) / ATTENTION_SPLIT;
    if (window <= 0 || window >= context_length) return all;
    const int32_t seen = (window + ATTENTION_SPLIT - 2) / ATTENTION_SPLIT + 1;
    return seen < all ? seen : all;
}

// Rows that the workspace has room for, with gridDim.y blocks each: with more of them x is 1.
static HOST_DEVICE int32_t decode_partial_rows(int32_t heads) {
    return heads < DECODE_SPREAD_BLOCKS ? DECODE_SPREAD_BLOCKS / heads : 1;
}

static HOST_DEVICE int32_t decode_head_tiles(int32_t n_head, int32_t n_head_kv) {
    return (n_head / n_head_kv + DECODE_HEADS - 1) / DECODE_HEADS;
}

// For each split in memory K and V, as in the cache; for each group the weights [16][128]; both halves
// of q [16][head_dim]; two barriers for each split. Rows of weights and q are padded by 16 bytes against bank
// conflicts.
static HOST_DEVICE int32_t decode_smem_bytes(int32_t head_dim, int32_t groups, int32_t depth) {
    const int32_t weights = DECODE_HEADS * (ATTENTION_SPLIT * 2 + 16), stage = ATTENTION_SPLIT * head_dim * 4;
    return groups * (depth * (stage + 16) + weights) + 2 * DECODE_HEADS * (head_dim * 2 + 16);
}

#define PREFILL_ROWS 64

// Consecutive positions of one sequence: rows row .. row + n_rows of the step at positions position .. .
// Tiles that end at a multiple of 64 positions touch the fewest key blocks. n_rows 0: an unused entry.
typedef struct {
    int32_t row, n_rows, position, slot;
} AttentionTile;

// attention_prefill_<head_dim>: grid (n_tiles, n_head), block 128, dynamic shared memory prefill_smem_bytes(head_dim).
// attention_warpgroup_<head_dim>: the same grid and block, warpgroup_smem_bytes(head_dim); q_stride a multiple of 4.
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

// K and V of both blocks of a split.
static HOST_DEVICE int32_t prefill_smem_bytes(int32_t head_dim) { return 2 * 2 * KV_BLOCK * 2 * head_dim; }

// Beside them both halves of q of a tile, and two barriers.
static HOST_DEVICE int32_t warpgroup_smem_bytes(int32_t head_dim) {
    return prefill_smem_bytes(head_dim) + 2 * PREFILL_ROWS * 2 * head_dim + 16 + 256;
}

#endif
