// Parameters of repack.cu. Plain C. Sizes are in elements, strides in elements of the row's type unless the name says
// bytes.
#ifndef WORKER_ORCD_REPACK_PARAMS_H
#define WORKER_ORCD_REPACK_PARAMS_H

#include <stdint.h>

// repack_<type>: rows [row0, row0 + n_rows) of a matrix from GGUF blocks to its layout.
typedef struct {
    const uint8_t* rows;  // [n_rows, row_bytes] raw GGUF rows
    uint8_t* w;           // the whole repacked matrix
    int64_t row_bytes;
    int32_t k;       // row length
    int32_t n_out;   // rows of the matrix
    int32_t row0;    // multiple of 16
    int32_t n_rows;  // multiple of 16 unless the matrix ends here
} RepackParams;

// rows_<type>: out[r, :] = scale * W[index[r], :] (added to what is there, with `add`).
typedef struct {
    const uint8_t* w;      // repacked matrix [n_table, k]
    const int32_t* index;  // [n_rows]; a row whose index is outside 0 .. n_table-1 is written as zeros
    float* out;            // [n_rows, out_stride], 8-byte aligned rows
    int64_t out_stride;
    float scale;
    int32_t k;
    int32_t n_table;
    int32_t add;
} RowsParams;

#endif
