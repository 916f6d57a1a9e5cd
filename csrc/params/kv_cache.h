// The paged KV cache: where K and V of a block lie. Plain C.
//
// One float16 arena per layer, [n_blocks][n_head_kv][2][64 * head_dim]. A block holds 64 positions of one sequence;
// per KV head first K as [64 positions][head_dim], then V *transposed*, as [head_dim][64 positions]: both then serve
// as matrix operands with 16-byte reads and no transposition in attention. Clear the arena once before use.
#ifndef WORKER_ORCD_KV_CACHE_H
#define WORKER_ORCD_KV_CACHE_H

#include <stdint.h>

#include "params/host_device.h"

#define KV_BLOCK 64

// Halves from the arena's start to the K part of (block, head); its V part follows after KV_BLOCK * head_dim.
static HOST_DEVICE int64_t kv_offset(int64_t block, int32_t head, int32_t n_head_kv, int32_t head_dim) {
    return (block * n_head_kv + head) * (2 * KV_BLOCK) * head_dim;
}

#endif
