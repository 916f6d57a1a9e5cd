// Parameters of matvec.cu and matmul.cu. Plain C. Sizes are in elements, strides in elements of the row's type unless
// the name says bytes.
#ifndef WORKER_ORCD_MATMUL_PARAMS_H
#define WORKER_ORCD_MATMUL_PARAMS_H

#include <stdint.h>

// Matrices that one decode launch may cover.
#define MATVEC_MAX_MATRICES 4

// One matrix of a decode launch.
typedef struct {
    const uint8_t* w;   // repacked [n_out, k]
    const float* bias;  // [n_out] or null
    float* out;         // [n_rows, out_stride]
    int64_t out_stride;
    int32_t n_out;
    int32_t row_tile0;  // sum of the row tiles of the matrices before it
    int32_t add;        // nonzero: out += result
    int32_t unused;
} MatvecMatrix;

// matvec_<type>_<tiles>: out = x W^T for up to 8 * tiles rows, one or several matrices of one type and one input.
typedef struct {
    MatvecMatrix m[MATVEC_MAX_MATRICES];
    const float* x;        // [n_rows, x_stride], used by the 1-tile kernels; 16-byte aligned rows
    const uint8_t* split;  // [8 * tiles, split_bytes] by convert_split, used by the others
    int64_t x_stride;
    int64_t split_bytes;  // bytes of a converted row (also in the shared memory of the 1-tile kernels)
    int32_t n_matrices;
    int32_t n_row_tiles;  // of all matrices
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_rows;
    int32_t ring_bytes;  // shared memory of the weight rings: warps * ring bytes of a warp
} MatvecParams;

// matmul_<type>, matmul_<type>_small: out = x W^T for any number of rows.
typedef struct {
    const uint8_t* w;      // repacked [n_out, k]
    const uint8_t* x;      // [n_rows rounded up to a multiple of 64, x_bytes] by convert_f16
    const float* x_scale;  // [n_rows]
    const float* bias;     // [n_out] or null
    float* out;            // [n_rows, out_stride]
    int64_t out_stride;
    int32_t x_bytes;  // of a converted row
    int32_t n_out;
    int32_t n_k_tiles;
    int32_t n_rows;
    int32_t add;  // nonzero: out += result
    int32_t unused;
} MatmulParams;

#endif
