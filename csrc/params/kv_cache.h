// The paged KV cache: where K and V of a block lie. Plain C.
//
// One float16 arena per layer, [n_blocks][n_head_kv][2][64 * head_dim]. A block holds 64 positions of one sequence, per
// KV head first K, then V, both in tiles of 8 positions and a tile in rows of 8 elements, which serve as they lie as
// the rows of matrix operands:
//
//   K [64 / 8][head_dim / 8][8 positions][8 dimensions]     V [64 / 8][head_dim][8 positions]
//
// So what a run of positions needs is one piece of memory, and eight rows of an operand fill all banks of shared memory
// once. Clear the arena once before use.
#ifndef WORKER_ORCD_KV_CACHE_H
#define WORKER_ORCD_KV_CACHE_H

#include <stdint.h>

#include "params/host_device.h"

#define KV_BLOCK 64

// Halves from the arena's start to the K part of (block, head); its V part follows after KV_BLOCK * head_dim.
static HOST_DEVICE int64_t kv_offset(int64_t block, int32_t head, int32_t n_head_kv, int32_t head_dim) {
    return (block * n_head_kv + head) * (2 * KV_BLOCK) * head_dim;
}

// Halves from kv_offset() to an element of K, and of V, of a position of the block.
static HOST_DEVICE int32_t kv_k_at(int32_t position, int32_t dim, int32_t head_dim) {
    return position / 8 * 8 * head_dim + dim / 8 * 64 + position % 8 * 8 + dim % 8;
}
static HOST_DEVICE int32_t kv_v_at(int32_t position, int32_t dim, int32_t head_dim) {
    return KV_BLOCK * head_dim + position / 8 * 8 * head_dim + dim * 8 + position % 8;
}

#endif
