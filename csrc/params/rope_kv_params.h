// Parameters of rope_kv.cu. Plain C; q, k and v are float32 row-major, rows `*_stride` floats apart. A row whose slot
// is negative is dead: it is there to fill a batch shape, is not rotated and writes nothing to the cache.
#ifndef WORKER_ORCD_ROPE_KV_PARAMS_H
#define WORKER_ORCD_ROPE_KV_PARAMS_H

#include <stdint.h>

#include "params/kv_cache.h"

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

#endif
