// Parameters of decode.cu, matvec.cu and matmul.cu. Plain C. Sizes are in elements, strides in elements of the row's
// type unless the name says bytes. Converted rows are those of convert_params.h.
#ifndef WORKER_ORCD_MATMUL_PARAMS_H
#define WORKER_ORCD_MATMUL_PARAMS_H

#include <stdint.h>

#include "params/convert_params.h"

// Most threads of a block of decode_*: of variants 128, 256, 256e and 256e1; of 128e, 128e1 and `long`, which take more
// registers.
#define PRODUCT_THREADS 608
#define PRODUCT_FEW_THREADS 512

// Most rows of a step whose products decode_* and expert_few_* make; where there are products of warpgroups, these make
// those of more.
#define MANY_ROWS_FROM 8

// Matrices that one matvec launch may cover.
#define MATVEC_MAX_MATRICES 4

// What becomes of the results.
#define PRODUCT_STORE 0  // out = result
#define PRODUCT_ADD 1    // out += result
#define PRODUCT_GLU 2    // out of matrix 0 = act(result of matrix 0) * result of matrix 1
#define PRODUCT_MIX 3    // of experts: out = result, then sum += what the gates make of a row's results

// One matrix of a launch for many rows.
typedef struct {
    const uint8_t* w;   // repacked [n_out, k]
    const float* bias;  // [n_out] or null
    float* out;         // [n_rows, out_stride]
    int64_t out_stride;
    int32_t n_out;
    int32_t row_tile0;  // sum of the row tiles of the matrices before it
} ProductMatrix;

// One matrix of a decode launch.
typedef struct {
    const uint8_t* w;   // repacked [n_out, k]
    const float* bias;  // [n_out] or null
} DecodeMatrix;

// decode_<type>_<variant>: out = h W^T for 1 to 8 rows h. Block 32 * n_warps * n_groups: warp w has chunks w % n_warps,
// + n_warps, ... of the row tiles of group w / n_warps. The grid is free.
typedef struct {
    DecodeMatrix m[2];         // the second with PRODUCT_GLU
    float* out;                // [n_rows, out_stride]
    const float* x;            // [1, k], for one row: it is converted by every block; or null
    const float* norm_weight;  // with x: [k] of the RMS norm before the product, or null
    const uint8_t* rows;       // [n_rows, x_bytes] converted rows, without x
    int64_t out_stride;
    int64_t scales_at;   // from w to the row scales, of types that have them
    int32_t tile_bytes;  // of a row tile
    int32_t x_bytes;
    int32_t n_out;
    int32_t block_tiles;  // row tiles of a block (of each matrix)
    int32_t more_tiles;   // of one more each for as many of the first blocks
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_chunks;
    int32_t n_rows;
    int32_t n_warps;
    int32_t n_groups;
    int32_t n_staged;  // row tiles of a warp that are decoded into shared memory before the wait, of variants with `e`
    int32_t depth;     // slots of a warp's ring of weights
    int32_t batch;  // row tiles (of both matrices) whose sums are added up at once: a multiple of n_groups (with `e`:
                    // of the tiles that are decoded before the wait) and, with PRODUCT_GLU, of 2
    int32_t ring_bytes;  // shared memory: the rings come first,
    int32_t x_smem;      // then x, then sums of chunks;
    int32_t factors;     // where the factors begin,
    int32_t staged;      // the fragments of n_staged row tiles of every warp, 1,024 bytes for each 32 columns,
    int32_t barriers;    // and the barriers
    int32_t mode;        // PRODUCT_*
    int32_t glu;         // GLU_* of pointwise_params.h
    float eps;
    float inverse_k;  // 1 / k
} DecodeParams;

// decode_<type>_<type>_<variant>: two launches with blocks of one size as one.
typedef struct {
    DecodeParams p[2];
    int32_t n_first_blocks;  // of p[0]
    int32_t unused;
} DecodePairParams;

// matvec_<type>_<tiles>: out = x W^T for up to 8 * tiles rows, one or several matrices of one type and one input.
typedef struct {
    ProductMatrix m[MATVEC_MAX_MATRICES];
    const uint8_t* rows;  // [8 * tiles, x_bytes] converted rows
    int32_t x_bytes;
    int32_t n_matrices;
    int32_t n_row_tiles;  // of all matrices
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_rows;
    int32_t ring_bytes;  // shared memory of the weight rings: warps * ring bytes of a warp
    int32_t mode;        // PRODUCT_STORE, PRODUCT_ADD
} MatvecParams;

// wgmma_<type>_<rows>: out = x W^T for any number of rows, one or several matrices of one type and one input. x is
// converted into tiles (convert_params.h). The grid is free.
typedef struct {
    ProductMatrix m[MATVEC_MAX_MATRICES];  // with PRODUCT_GLU two, both with n_out outputs; results go to the first
    const uint8_t* x;
    const float* factors;   // [n_chunks, factor_stride]
    int32_t factor_stride;  // rows that x has room for: a multiple of 8, at least n_rows
    int32_t n_matrices;
    int32_t n_row_tiles;  // of all matrices
    int32_t n_tiles_m;    // tiles along the outputs
    int32_t n_tiles_n;    // tiles along the rows
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_rows;
    int32_t mode;  // PRODUCT_STORE, PRODUCT_ADD, PRODUCT_GLU
    int32_t glu;   // GLU_* of pointwise_params.h
} ManyRowsParams;

// matmul_<type>, matmul_<type>_small: out = x W^T for any number of rows.
typedef struct {
    const uint8_t* w;   // repacked [n_out, k]
    const uint8_t* x;   // [n_rows rounded up to a multiple of 64, x_bytes] converted rows
    const float* bias;  // [n_out] or null
    float* out;         // [n_rows, out_stride]
    int64_t out_stride;
    int32_t x_bytes;
    int32_t n_out;
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_rows;
    int32_t add;  // nonzero: out += result
} MatmulParams;

#endif
