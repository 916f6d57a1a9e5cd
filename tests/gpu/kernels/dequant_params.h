// Parameters of dequant.cu. Plain C.
#ifndef WORKER_ORCD_DEQUANT_PARAMS_H
#define WORKER_ORCD_DEQUANT_PARAMS_H

#include <stdint.h>

// dequant_<type>: GGUF blocks to float32.
typedef struct {
    const uint8_t* blocks;  // [n_blocks] raw GGUF blocks, any alignment
    float* out;             // [n_blocks * block size]
    int64_t n_blocks;
} DequantParams;

#endif
