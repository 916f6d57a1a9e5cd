// Parameters of pointwise.cu. Plain C; activations are float32 row-major, rows `*_stride` floats apart.
#ifndef WORKER_ORCD_POINTWISE_PARAMS_H
#define WORKER_ORCD_POINTWISE_PARAMS_H

#include <stdint.h>

#define GLU_SILU 0
#define GLU_GELU_TANH 1
#define GLU_SWIGLU_OAI 2

// glu, act_gelu_tanh, add, gather_rows: grid (ceil(ceil(n / 4) / 256), n_rows), block 256.
// glu: out = act(a) * b. act_gelu_tanh: out = gelu(a). add: out += a. gather_rows: out[j] = a[rows[j]].
typedef struct {
    const float* a;       // [n_rows, n]; glu: gate; gather_rows: [any, n]
    const float* b;       // [n_rows, n]; glu: up
    float* out;           // [n_rows, n]; glu and act: may be a
    const int32_t* rows;  // [n_rows]; gather_rows: row of a, negative: out row becomes zero
    int32_t a_stride, b_stride, out_stride;
    int32_t n;
    int32_t kind;  // glu: GLU_*
} PointwiseParams;

#endif
