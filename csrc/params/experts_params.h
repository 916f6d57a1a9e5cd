// Parameters of experts_decode.cu, experts_prefill.cu and expert_sum in route.cu. Plain C. Sizes are in elements,
// strides in elements of the row's type unless the name says bytes. A pair is as in route_params.h.
#ifndef WORKER_ORCD_EXPERTS_PARAMS_H
#define WORKER_ORCD_EXPERTS_PARAMS_H

#include <stdint.h>

#include "params/route_params.h"

// Matrices of one expert that one launch may cover.
#define EXPERT_MAX_MATRICES 2

// One matrix of every expert.
typedef struct {
    const uint8_t* w;   // [n_expert, matrix_bytes], each repacked [n_out, k]
    const float* bias;  // [n_expert, n_out] or null
    float* out;         // pair (row, slot): out + row * out_stride + slot * n_out
    int64_t out_stride;
} ExpertMatrix;

// expert_matvec_<type>_<tiles>: products of every pair with its expert's matrices, few pairs.
typedef struct {
    ExpertMatrix m[EXPERT_MAX_MATRICES];  // of one type and shape
    ExpertList list;
    const float* x;        // 1 tile: pair (row, slot) reads x + row * x_stride + slot * x_slot_stride; 16-byte aligned
    const uint8_t* split;  // 2 tiles: converted rows, pair (row, slot) reads row + slot * split_slot_rows
    int64_t x_stride;
    int64_t x_slot_stride;
    int64_t split_bytes;  // bytes of a converted row (also in the shared memory of the 1-tile kernels)
    int64_t matrix_bytes;
    int32_t split_slot_rows;
    int32_t n_matrices;
    int32_t n_out;
    int32_t n_used;
    int32_t k;
    int32_t n_k_tiles;
    int32_t ring_bytes;  // shared memory of the weight rings: warps * ring bytes of a warp
    int32_t unused;
} ExpertMatvecParams;

// expert_matmul_<type>_<rows>: the same for many pairs, in tiles of 128 outputs x `rows` pairs.
typedef struct {
    ExpertMatrix m[EXPERT_MAX_MATRICES];  // of one type and shape
    ExpertList list;                      // items of at most `rows` pairs
    const uint8_t* x;      // rows by convert_f16, x_bytes each; pair (row, slot) reads row + slot * x_slot_rows
    const float* x_scale;  // of each of them
    int64_t matrix_bytes;
    int32_t x_bytes;
    int32_t x_slot_rows;
    int32_t n_out;
    int32_t n_used;
    int32_t n_k_tiles;
    int32_t unused;
} ExpertMatmulParams;

// expert_sum: out[r, i] = sum over slots of gates[r, slot] * x[r, slot * n + i].
typedef struct {
    const float* x;      // [n_rows, x_stride], n_used * n columns, n a multiple of 4; 16-byte aligned rows
    const float* gates;  // [n_rows, n_used]
    float* out;          // [n_rows, out_stride]; 16-byte aligned rows
    int64_t x_stride;
    int64_t out_stride;
    int32_t n;
    int32_t n_used;
} ExpertSumParams;

#endif
