/* Parameters of the expert kernels (route.cu, experts_decode.cu, experts_prefill.cu). Plain C: shared by the kernels,
   the engine's extension modules and the kernel tests. Every kernel takes one of these by value. Sizes are in elements,
   strides in elements of the row's type unless the name says bytes; pointers are device pointers.

   A pair is a row and one of its slots: number row * n_used + slot, rows counted from the launch's first. */
#ifndef WORKER_ORCD_EXPERTS_PARAMS_H
#define WORKER_ORCD_EXPERTS_PARAMS_H

#include <stdint.h>

/* Most experts of a layer, and most of them that a row uses. */
#define EXPERTS_MAX 256
#define EXPERTS_USED_MAX 32
/* Parts of K whose sums a router logit is added up from, in order. */
#define ROUTE_SLICES 16
/* Rows of x that one warp of route_logits takes together. */
#define ROUTE_ROWS 8
/* Most pairs of one expert that a decode block takes together. */
#define EXPERT_DECODE_ROWS 16
/* Matrices of one expert that one launch may cover. */
#define EXPERT_MAX_MATRICES 2

/* Pairs [first, first + n) of the list's order, all of one expert. */
typedef struct {
    int32_t expert;
    int32_t first;
    int32_t n;
    int32_t unused;
} ExpertItem;

/* Which pairs each expert has: written by the routing kernels, read by the products. */
typedef struct {
    int32_t* n_items;
    ExpertItem* items; /* [*n_items], by expert; 16-byte aligned */
    int32_t* pairs;    /* [n_rows * n_used] pair numbers by expert, ascending within one */
} ExpertList;

/* route_logits_<type>, route_choose, route_list. */
typedef struct {
    const float* x;    /* [n_rows, x_stride]; 16-byte aligned rows */
    const uint8_t* w;  /* repacked [n_expert, k] */
    const float* bias; /* [n_expert] or null */
    float* partial;    /* [n_rows, ROUTE_SLICES, n_expert rounded up to 16] */
    float* ids;        /* [n_rows, n_used] whole numbers */
    float* gates;      /* [n_rows, n_used] */
    int64_t x_stride;
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_expert;
    int32_t n_used;
    int32_t n_rows;
    int32_t item_rows; /* most pairs of an item; route_choose with 0 makes no list */
    ExpertList list;
} RouteParams;

/* One matrix of every expert. */
typedef struct {
    const uint8_t* w;  /* [n_expert, matrix_bytes], each repacked [n_out, k] */
    const float* bias; /* [n_expert, n_out] or null */
    float* out;        /* pair (row, slot): out + row * out_stride + slot * n_out */
    int64_t out_stride;
} ExpertMatrix;

/* expert_matvec_<type>_<tiles>: products of every pair with its expert's matrices, few pairs. */
typedef struct {
    ExpertMatrix m[EXPERT_MAX_MATRICES]; /* of one type and shape */
    ExpertList list;
    const float* x; /* 1 tile: pair (row, slot) reads x + row * x_stride + slot * x_slot_stride; 16-byte aligned */
    const uint8_t* split; /* 2 tiles: converted rows, pair (row, slot) reads row + slot * split_slot_rows */
    int64_t x_stride;
    int64_t x_slot_stride;
    int64_t split_bytes; /* bytes of a converted row (also in the shared memory of the 1-tile kernels) */
    int64_t matrix_bytes;
    int32_t split_slot_rows;
    int32_t n_matrices;
    int32_t n_out;
    int32_t n_used;
    int32_t k;
    int32_t n_k_tiles;
    int32_t ring_bytes; /* shared memory of the weight rings: warps * ring bytes of a warp */
    int32_t unused;
} ExpertMatvecParams;

/* expert_matmul_<type>_<rows>: the same for many pairs, in tiles of 128 outputs x `rows` pairs. */
typedef struct {
    ExpertMatrix m[EXPERT_MAX_MATRICES]; /* of one type and shape */
    ExpertList list;                     /* items of at most `rows` pairs */
    const uint8_t* x;     /* rows by convert_f16, x_bytes each; pair (row, slot) reads row + slot * x_slot_rows */
    const float* x_scale; /* of each of them */
    int64_t matrix_bytes;
    int32_t x_bytes;
    int32_t x_slot_rows;
    int32_t n_out;
    int32_t n_used;
    int32_t n_k_tiles;
    int32_t unused;
} ExpertMatmulParams;

/* expert_sum: out[r, i] = sum over slots of gates[r, slot] * x[r, slot * n + i]. */
typedef struct {
    const float* x;     /* [n_rows, x_stride], n_used * n columns, n a multiple of 4; 16-byte aligned rows */
    const float* gates; /* [n_rows, n_used] */
    float* out;         /* [n_rows, out_stride]; 16-byte aligned rows */
    int64_t x_stride;
    int64_t out_stride;
    int32_t n;
    int32_t n_used;
} ExpertSumParams;

#endif
