// Parameters of convert.cu. Plain C. Sizes are in elements, strides in elements of the row's type unless the name says
// bytes.
#ifndef WORKER_ORCD_CONVERT_PARAMS_H
#define WORKER_ORCD_CONVERT_PARAMS_H

#include <stdint.h>

// convert_f16, convert_split: activations for the matrix kernels.
typedef struct {
    const float* x;  // [n_rows, x_stride], the first k columns are read; 16-byte aligned rows
    uint8_t* out;    // [n_pad_rows, out_bytes]
    float* scale;    // convert_f16: [n_pad_rows] powers of two; convert_split: unused
    int64_t x_stride;
    int64_t out_bytes;  // bytes of a converted row, see x_f16_bytes and x_split_bytes in worker_orcd/cuda/layout.py
    int32_t k;
    int32_t k_pad;  // k rounded up to whole k tiles of the weight's type
    int32_t n_rows;
    int32_t n_pad_rows;  // rows to write; those past n_rows are zeros
} ConvertParams;

#endif
