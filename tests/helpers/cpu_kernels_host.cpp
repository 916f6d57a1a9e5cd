// The baseline kernels of csrc/cpu as plain functions, for tests of a decoder without the engine around it.
#include "cpu/kernels.h"

using namespace worker_orcd;

extern "C" {
bool dequantize(int type, const uint8_t* src, float* dst, int64_t n) {
    return kernels_baseline()->dequantize(type, src, dst, n);
}
// y [n_out] = W [n_out, n_in] x, the rows of W one after another in whole blocks.
void matvec(int type, const uint8_t* w, int64_t n_in, int64_t n_out, const float* x, float* y, int64_t row_bytes) {
    MatmulTask task;
    task.w.data = w, task.w.type = type, task.w.n_in = n_in, task.w.n_out = n_out, task.w.row_bytes = row_bytes;
    task.x = &x, task.y = &y, task.n_tokens = 1;
    kernels_baseline()->matvec(task, 0, n_out);
}
}
