// Parameters of experts_few.cu, experts_decode.cu, experts_prefill.cu and expert_sum in route.cu. Plain C. Sizes are in
// elements, strides in elements of the row's type unless the name says bytes. A pair is as in route_params.h.
#ifndef WORKER_ORCD_EXPERTS_PARAMS_H
#define WORKER_ORCD_EXPERTS_PARAMS_H

#include <stdint.h>

#include "params/matmul_params.h"
#include "params/route_params.h"

// Matrices of one expert that one launch may cover.
#define EXPERT_MAX_MATRICES 2
// Most threads of a block of expert_few_*: of variants 128 and 256, of `long`.
#define EXPERT_FEW_THREADS 768
#define EXPERT_LONG_THREADS 384
// Most row tiles whose sums a block of expert_few_* adds up at once.
#define EXPERT_FEW_BATCH 256

// One matrix of every expert.
typedef struct {
    const uint8_t* w;   // [n_expert, matrix_bytes], each repacked [n_out, k]
    const float* bias;  // [n_expert, n_out] or null
    float* out;         // pair (row, slot): out + row * out_stride + slot * n_out
    int64_t out_stride;
} ExpertMatrix;

// expert_few_<type>_<variant>: products of every pair of 1 to 8 rows with one of its expert's matrices, or the gated
// activation of both. Block 32 * n_warps * n_groups; the grid is free. The list has items of up to 8 pairs.
// PRODUCT_MIX: sum[r] += sum over slots of gates[r, slot] * out of pair (r, slot), in order of the slots.
typedef struct {
    // The second with PRODUCT_GLU; `out` and `out_stride` in them do not count.
    ExpertMatrix m[EXPERT_MAX_MATRICES];
    ExpertList list;
    float* out;      // pair (row, slot): out + row * out_stride + slot * n_out
    const float* x;  // float32 rows, converted here, of pair (row, slot) x + row * x_stride + slot * x_slot_stride,
                     // or null
    const uint8_t* rows;  // without x converted rows, x_bytes each; pair (row, slot) reads row + slot * x_slot_rows
    const float* gates;   // [n_rows, n_used], PRODUCT_MIX
    float* sum;           // [n_rows, sum_stride], PRODUCT_MIX
    uint32_t* arrived;    // [row tiles] 0 between launches, PRODUCT_MIX
    int64_t out_stride;
    int64_t x_stride;
    int64_t x_slot_stride;  // 0: the slots of a row have one input
    int64_t sum_stride;
    int64_t matrix_bytes;
    int64_t scales_at;   // from w to the row scales, of types that have them
    int32_t tile_bytes;  // of a row tile
    int32_t x_bytes;
    int32_t x_slot_rows;
    int32_t n_out;
    int32_t n_used;
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_chunks;
    int32_t n_rows;
    int32_t n_warps;
    int32_t n_groups;
    int32_t depth;  // as in `DecodeParams`
    int32_t batch;  // row tiles (of both matrices) whose sums are added up at once, a multiple of n_groups and of 2: of
                    // items with 8 pairs, 8 / n times as many of those with n; at most EXPERT_FEW_BATCH in one
    int32_t ring_bytes;  // shared memory: the rings come first,
    int32_t x_smem;      // then x, of 128 and 256, n_rows * (bytes of a row's fragments + 64), then sums of chunks;
    int32_t factors;     // where the factors begin,
    int32_t barriers;    // and the barriers
    int32_t mode;        // PRODUCT_STORE, PRODUCT_GLU, PRODUCT_MIX
    int32_t glu;         // GLU_* of pointwise_params.h
    int32_t holds_next;  // the launch that follows begins when the list is there,
    int32_t has_list;    // and is this one: it need not wait for the list
} ExpertFewParams;

// expert_matvec_<type>_<tiles>: products of every pair of 9 to 64 rows with its expert's matrices.
typedef struct {
    ExpertMatrix m[EXPERT_MAX_MATRICES];  // of one type and shape
    ExpertList list;
    const uint8_t* rows;  // converted rows, x_bytes each; pair (row, slot) reads row + slot * x_slot_rows
    int64_t matrix_bytes;
    int32_t x_bytes;
    int32_t x_slot_rows;
    int32_t n_matrices;
    int32_t n_out;
    int32_t n_used;
    int32_t k;
    int32_t n_k_tiles;
    int32_t ring_bytes;  // shared memory of the weight rings: warps * ring bytes of a warp
} ExpertMatvecParams;

// Most pairs of an item of wgmma_experts_* whose rows it gathers. The rows of larger items lie at the places of their
// pairs, where convert_rows brings them.
#define EXPERT_GATHERED_ROWS 32

// wgmma_experts_<type>_<rows>: products of every pair of any number of rows with one or two of its expert's matrices,
// or the gated activation of both, which goes to the first. Items of the list have at most `rows` pairs. The grid is
// free.
typedef struct {
    ExpertMatrix m[EXPERT_MAX_MATRICES];  // of one type and shape
    ExpertList list;
    // Gathered: converted rows in lines (convert_params.h), x_bytes each; pair (row, slot) reads row + slot *
    // x_slot_rows. Else in tiles, a row for each place of the list, with their factors.
    const uint8_t* x;
    const float* factors;   // [n_chunks, factor_stride]
    int64_t matrix_bytes;   // of an expert
    int32_t factor_stride;  // places of the list, a multiple of 8
    int32_t x_bytes;
    int32_t x_slot_rows;
    int32_t n_matrices;
    int32_t n_tiles_m;  // tiles along the outputs of all matrices
    int32_t n_out;
    int32_t n_used;
    int32_t k;
    int32_t n_k_tiles;
    int32_t mode;  // PRODUCT_STORE, PRODUCT_GLU
    int32_t glu;   // GLU_* of pointwise_params.h
} ManyExpertRowsParams;

// expert_matmul_<type>_<rows>: the same for many pairs, in tiles of 128 outputs x `rows` pairs.
typedef struct {
    ExpertMatrix m[EXPERT_MAX_MATRICES];  // of one type and shape
    ExpertList list;                      // items of at most `rows` pairs
    const uint8_t* x;  // converted rows, x_bytes each; pair (row, slot) reads row + slot * x_slot_rows
    int64_t matrix_bytes;
    int32_t x_bytes;
    int32_t x_slot_rows;
    int32_t n_out;
    int32_t n_used;
    int32_t k;
    int32_t n_k_tiles;
} ExpertMatmulParams;

// expert_sum: out[r, i] (+)= sum over slots of gates[r, slot] * x[r, slot * n + i].
typedef struct {
    const float* x;      // [n_rows, x_stride], n_used * n columns, n a multiple of 4; 16-byte aligned rows
    const float* gates;  // [n_rows, n_used]
    float* out;          // [n_rows, out_stride]; 16-byte aligned rows
    int64_t x_stride;
    int64_t out_stride;
    int32_t n;
    int32_t n_used;
    int32_t add;  // nonzero: out += sum
    int32_t unused;
} ExpertSumParams;

#endif
