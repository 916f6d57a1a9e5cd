/* Parameters of dequant.cu. Plain C. */
#ifndef WORKER_ORCD_DEQUANT_PARAMS_H
#define WORKER_ORCD_DEQUANT_PARAMS_H

#include <stdint.h>

/* dequant_<type>: GGUF blocks to float32. Pointers are device pointers. */
typedef struct {
    const uint8_t* blocks; /* [n_blocks] raw GGUF blocks, any alignment */
    float* out;            /* [n_blocks * elements of a block] */
    int64_t n_blocks;
} DequantParams;

#endif
