// Parameters of convert.cu, and the chunks of K that every product sums by. Plain C. Sizes are in elements, strides in
// elements of the row's type unless the name says bytes.
#ifndef WORKER_ORCD_CONVERT_PARAMS_H
#define WORKER_ORCD_CONVERT_PARAMS_H

#include <stdint.h>

#include "params/host_device.h"

// What is done to a row before it is converted; the numbers of norm_params.h.
#define CONVERT_RMS 0
#define CONVERT_LAYER 1
#define CONVERT_PLAIN 2

// Columns of one chunk of a product over k columns: its sum is made on its own, and the chunks' sums are added in
// order. Fine where K is short, so that one row's product has work for many warps.
static HOST_DEVICE int32_t chunk_columns(int32_t k) {
    if (k <= 1024 && k % 256 != 0) return 128;
    return k <= 5120 ? 256 : k <= 7168 ? 512 : 1024;
}

// How converted rows lie: one after the other in the order of mma.sync fragments (x_slot) or of warpgroup products,
// with their factors behind; or in tiles, as warpgroup products take them, their factors apart (common/many_rows.cuh):
// the 128 bytes of each step of 64 columns of all rows lie together.
#define CONVERTED_FRAGMENTS 0
#define CONVERTED_LINES 1
#define CONVERTED_TILES 2

// Bytes of n rows of k columns in tiles, without their factors.
static HOST_DEVICE int64_t tiles_bytes(int32_t k, int32_t n) { return (int64_t)((k + 255) / 256) * 512 * n; }

// convert_rows: grid (n_pad_rows, n_inputs), block 256. A row may have several inputs, as the slots of a row of experts
// have: input i of row r is x + r * x_stride + i * input_stride and becomes converted row i * n_pad_rows + r; or, with
// convert_rows_to_places, the rows places[r * places_stride + i + c] of tiles, c < n_copies.
typedef struct {
    const float* x;         // the first k columns are read; 16-byte aligned rows
    const float* weight;    // [k] of the norm, 16-byte aligned, or null (CONVERT_PLAIN)
    const float* bias;      // [k], CONVERT_LAYER, or null
    uint8_t* out;           // [n_inputs * n_pad_rows, out_bytes], of tiles [steps, factor_stride, 128 bytes]; with
                            // convert_rows_to_places null where only the roots are wanted
    float* factors;         // [n_chunks, factor_stride] of tiles
    const int32_t* places;  // of convert_rows_to_places
    float* roots;           // [n_rows] 1 / root of the norms, or null
    int64_t x_stride;
    int64_t input_stride;
    int32_t out_bytes;  // of a converted row, see x_f16_bytes in worker_orcd/cuda/layout.py
    int32_t k;          // a multiple of 32
    int32_t n_rows;
    int32_t n_pad_rows;  // rows to write; those past n_rows are zeros
    int32_t kind;
    int32_t order;          // CONVERTED_*
    int32_t factor_stride;  // rows that tiles have room for, a multiple of 8
    int32_t places_stride;
    int32_t n_copies;
    float eps;
} ConvertParams;

#endif
