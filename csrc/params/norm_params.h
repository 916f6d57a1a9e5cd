// Parameters of norm.cu. Plain C; x and out are float32 row-major, rows `*_stride` floats apart.
#ifndef WORKER_ORCD_NORM_PARAMS_H
#define WORKER_ORCD_NORM_PARAMS_H

#include <stdint.h>

#include "params/host_device.h"

#define NORM_RMS 0
#define NORM_LAYER 1

// norm_vec4, norm_scalar: grid (n_rows), block norm_threads(n, is_scalar). norm_group: grid (ceil(n_group / 8),
// n_rows), block 256; there `n` is the width of one group.
typedef struct {
    const float* x;       // [n_rows, n]
    const float* weight;  // [n]
    const float* bias;    // [n] or null
    float* out;           // [n_rows, n]; may be x
    int32_t x_stride, out_stride;
    int32_t n;
    int32_t kind;     // NORM_RMS, NORM_LAYER
    int32_t n_group;  // norm_group: groups of a row
    float eps;
} NormParams;

// Columns that one thread of norm_vec4 and norm_scalar can hold in registers.
#define NORM_COLUMNS 16

// Threads of a block for rows of n columns: about 8 columns a thread, at most 1024 (n <= 16384); for norm_scalar at
// most 512 (n <= 8192), as its addresses take more registers.
static HOST_DEVICE int32_t norm_threads(int32_t n, int32_t is_scalar) {
    const int32_t most = is_scalar ? 512 : 1024;
    int32_t threads = 128;
    while (threads < most && threads * 8 < n) threads *= 2;
    return threads;
}

#endif
