// Activations from float32 rows to the forms the matrix kernels read, once per product.
//
// convert_split(ConvertParams): bf16 high and low terms (activations.cuh), for decode launches of more than one tile.
//   Grid (any, n_pad_rows), 256 threads. Reads 4 bytes and writes 4.25 per element.
// convert_f16(ConvertParams): fp16 in fragment order, each row times a power of two that brings its largest magnitude
//   into [2^13, 2^14), so that no activation overflows and none within 2^27 of the largest loses precision; scale[row]
//   undoes it. Grid n_pad_rows, 256 threads. Reads 8 bytes (the second time from cache) and writes 2 per element.
#include "common/activations.cuh"
#include "params/convert_params.h"
#include "quant/types.cuh"

extern "C" __global__ void __launch_bounds__(256) convert_split(const __grid_constant__ ConvertParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.y, n_blocks = p.k_pad / 32, n_items = (4 * n_blocks + 31) & ~31;
    const float* x = row < p.n_rows ? p.x + row * p.x_stride : nullptr;
    for (int item = blockIdx.x * blockDim.x + threadIdx.x; item < n_items; item += gridDim.x * blockDim.x)
        split_item(p.out + row * p.out_bytes, x, item, n_blocks, p.k / 32);
}

extern "C" __global__ void __launch_bounds__(256) convert_f16(const __grid_constant__ ConvertParams p) {
    pdl_launch_dependents();
    pdl_wait();
    __shared__ int warp_largest[8];
    const int row = blockIdx.x, n_x_blocks = p.k / 32;
    const bool exists = row < p.n_rows;
    const float* x = p.x + (exists ? row : 0) * p.x_stride;

    int largest = 0;  // of the magnitudes' bits, which order as the magnitudes do
    for (int i = threadIdx.x; i < p.k / 4; i += blockDim.x) {
        const float4 v = reinterpret_cast<const float4*>(x)[i];
        largest = max(max(largest, __float_as_int(v.x) & 0x7fffffff), __float_as_int(v.y) & 0x7fffffff);
        largest = max(max(largest, __float_as_int(v.z) & 0x7fffffff), __float_as_int(v.w) & 0x7fffffff);
    }
    for (int d = 16; d > 0; d /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, d));
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int i = 0; i < 8; ++i) largest = max(largest, warp_largest[i]);
    const uint32_t scale = row_scale_bits(largest >> 23);
    const float inverse = __uint_as_float(inverse_bits(scale));
    if (threadIdx.x == 0) p.scale[row] = __uint_as_float(scale);

    for (int item = threadIdx.x; item < p.k_pad / 8; item += blockDim.x) {
        float v[8] = {};
        if (exists && item / 4 < n_x_blocks) load_columns(v, x + item / 4 * 32, item % 4);
        uint4 packed;
        packed.x = pack_f16(v[0] * inverse, v[1] * inverse);
        packed.y = pack_f16(v[2] * inverse, v[3] * inverse);
        packed.z = pack_f16(v[4] * inverse, v[5] * inverse);
        packed.w = pack_f16(v[6] * inverse, v[7] * inverse);
        *reinterpret_cast<uint4*>(p.out + row * p.out_bytes + item * 16) = packed;
    }
}
