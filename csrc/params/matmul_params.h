/* Parameters of the matrix kernels (repack.cu, convert.cu, matvec.cu, matmul.cu). Plain C: shared by the kernels, the
   engine's extension modules and the kernel tests. Every kernel takes one of these by value. Sizes are in elements,
   strides in elements of the row's type unless the name says bytes; pointers are device pointers. */
#ifndef WORKER_ORCD_MATMUL_PARAMS_H
#define WORKER_ORCD_MATMUL_PARAMS_H

#include <stdint.h>

/* Matrices that one decode launch may cover. */
#define MATVEC_MAX_MATRICES 4

/* repack_<type>: rows [row0, row0 + n_rows) of a matrix from GGUF blocks to its layout. */
typedef struct {
    const uint8_t* rows; /* [n_rows, row_bytes] raw GGUF rows */
    uint8_t* w;          /* the whole repacked matrix */
    int64_t row_bytes;
    int32_t k;      /* row length */
    int32_t n_out;  /* rows of the matrix */
    int32_t row0;   /* multiple of 16 */
    int32_t n_rows; /* multiple of 16 unless the matrix ends here */
} RepackParams;

/* rows_<type>: out[r, :] = scale * W[index[r], :] (added to what is there, with `add`). */
typedef struct {
    const uint8_t* w;     /* repacked matrix [n_table, k] */
    const int32_t* index; /* [n_rows]; a row whose index is outside 0 .. n_table-1 is written as zeros */
    float* out;           /* [n_rows, out_stride], 8-byte aligned rows */
    int64_t out_stride;
    float scale;
    int32_t k;
    int32_t n_table;
    int32_t n_rows;
    int32_t add;
} RowsParams;

/* convert_f16, convert_split: activations for the matrix kernels. */
typedef struct {
    const float* x; /* [n_rows, x_stride], the first k columns are read; 16-byte aligned rows */
    uint8_t* out;   /* [n_pad_rows, out_bytes] */
    float* scale;   /* convert_f16: [n_pad_rows] powers of two; convert_split: unused */
    int64_t x_stride;
    int64_t out_bytes; /* bytes of a converted row, see x_f16_bytes and x_split_bytes in worker_orcd/cuda/layout.py */
    int32_t k;
    int32_t k_pad; /* k rounded up to whole k tiles of the weight's type */
    int32_t n_rows;
    int32_t n_pad_rows; /* rows to write; those past n_rows are zeros */
} ConvertParams;

/* One matrix of a decode launch. */
typedef struct {
    const uint8_t* w;  /* repacked [n_out, k] */
    const float* bias; /* [n_out] or null */
    float* out;        /* [n_rows, out_stride] */
    int64_t out_stride;
    int32_t n_out;
    int32_t row_tile0; /* sum of the row tiles of the matrices before it */
    int32_t add;       /* nonzero: out += result */
    int32_t unused;
} MatvecMatrix;

/* matvec_<type>_<tiles>: out = x W^T for up to 8 * tiles rows, one or several matrices of one type and one input. */
typedef struct {
    MatvecMatrix m[MATVEC_MAX_MATRICES];
    const float* x;       /* [n_rows, x_stride], used by the 1-tile kernels; 16-byte aligned rows */
    const uint8_t* split; /* [8 * tiles, split_bytes] by convert_split, used by the others */
    int64_t x_stride;
    int64_t split_bytes; /* bytes of a converted row (also in the shared memory of the 1-tile kernels) */
    int32_t n_matrices;
    int32_t n_row_tiles; /* of all matrices */
    int32_t k;
    int32_t n_k_tiles;
    int32_t n_rows;
    int32_t ring_bytes; /* shared memory of the weight rings: warps * ring bytes of a warp */
} MatvecParams;

/* matmul_<type>, matmul_<type>_small: out = x W^T for any number of rows. */
typedef struct {
    const uint8_t* w;     /* repacked [n_out, k] */
    const uint8_t* x;     /* [n_rows rounded up to a multiple of 64, x_bytes] by convert_f16 */
    const float* x_scale; /* [n_rows] */
    const float* bias;    /* [n_out] or null */
    float* out;           /* [n_rows, out_stride] */
    int64_t out_stride;
    int32_t x_bytes; /* of a converted row */
    int32_t n_out;
    int32_t n_k_tiles;
    int32_t n_rows;
    int32_t add; /* nonzero: out += result */
    int32_t unused;
} MatmulParams;

#endif
