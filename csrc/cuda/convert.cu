// Activations from float32 rows to what the matrix kernels read (common/activations.cuh), once per input:
//
//   CONVERT_PLAIN  h = x
//   CONVERT_RMS    h = x * weight, factors times 1 / sqrt(mean(x^2) + eps)
//   CONVERT_LAYER  h = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias
//
// convert_rows(ConvertParams): a block a row, a warp a chunk at a time. Reads 4 bytes of x (again from cache for every
// further pass) and writes 2 per element.
// convert_rows_to_places(ConvertParams): the same to places in tiles, or for the roots of the norm alone.
#include "common/convert_row.cuh"

extern "C" __global__ void __launch_bounds__(kConvertThreads, 3) convert_rows(const __grid_constant__ ConvertParams p) {
    __shared__ float units[2][kMaxUnits];
    pdl_launch_dependents();
    convert_row(p, blockIdx.x, blockIdx.y, units);
}

extern "C" __global__ void __launch_bounds__(kConvertThreads, 3)
    convert_rows_to_places(const __grid_constant__ ConvertParams p) {
    __shared__ float units[2][kMaxUnits];
    pdl_launch_dependents();
    convert_row<true>(p, blockIdx.x, blockIdx.y, units);
}
