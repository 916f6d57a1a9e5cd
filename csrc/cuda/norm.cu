// RMS and layer norm of rows.
//
//   rms:    out = x / sqrt(mean(x^2) + eps) * weight
//   layer:  out = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias
//
// norm_vec4 / norm_scalar: one block a row, the row in registers, read once; the scalar form serves widths, strides
// or addresses that are no multiple of 16 bytes. norm_group: one warp a group (per-head norms).
// The order of every sum depends on n only. Bytes: 4 n (read) + 4 n (written).
#include "params/norm_params.h"
#include "common/ptx.cuh"

static constexpr int kGroupWarps = 8;
static constexpr int kGroupColumns = 32;  // columns of a group that one lane holds: groups of up to 1024

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// Sum over the block; every thread gets it. `scratch` [32] may be reused after the next barrier.
DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    const int n_warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return warp_sum(lane < n_warps ? scratch[lane] : 0.f);
}

template <int kVec>
DEVICE void load(float (&v)[kVec], const float* p) {
    if constexpr (kVec == 4) {
        const float4 t = *reinterpret_cast<const float4*>(p);
        v[0] = t.x, v[1] = t.y, v[2] = t.z, v[3] = t.w;
    } else {
        v[0] = *p;
    }
}

template <int kVec>
DEVICE void store(float* p, const float (&v)[kVec]) {
    if constexpr (kVec == 4) {
        *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
        *p = v[0];
    }
}

template <int kVec>
DEVICE void norm(const NormParams& p) {
    constexpr int kLoads = NORM_COLUMNS / kVec;
    __shared__ float scratch[2][32];
    pdl_launch_dependents();
    // The weights are no kernel's output: their latency hides behind the kernel before.
    float weight[kLoads][kVec];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int column = (i * blockDim.x + threadIdx.x) * kVec;
        if (column < p.n) load<kVec>(weight[i], p.weight + column);
    }
    pdl_wait();
    const float* x = p.x + (int64_t)blockIdx.x * p.x_stride;
    float v[kLoads][kVec];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int column = (i * blockDim.x + threadIdx.x) * kVec;
#pragma unroll
        for (int j = 0; j < kVec; j++) v[i][j] = 0.f;
        if (column < p.n) load<kVec>(v[i], x + column);
    }
    float mean = 0.f;
    if (p.kind == NORM_LAYER) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kLoads; i++)
#pragma unroll
            for (int j = 0; j < kVec; j++) sum += v[i][j];
        mean = block_sum(sum, scratch[0]) / p.n;
    }
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int column = (i * blockDim.x + threadIdx.x) * kVec;
        if (column < p.n) {
#pragma unroll
            for (int j = 0; j < kVec; j++) {
                v[i][j] -= mean;
                square += v[i][j] * v[i][j];
            }
        }
    }
    const float factor = 1.f / sqrtf(block_sum(square, scratch[1]) / p.n + p.eps);
    float* out = p.out + (int64_t)blockIdx.x * p.out_stride;
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int column = (i * blockDim.x + threadIdx.x) * kVec;
        if (column < p.n) {
            float b[kVec] = {};
            if (p.bias) load<kVec>(b, p.bias + column);
#pragma unroll
            for (int j = 0; j < kVec; j++) v[i][j] = v[i][j] * factor * weight[i][j] + b[j];
            store<kVec>(out + column, v[i]);
        }
    }
}

// n, strides multiples of 4; all addresses 16-byte aligned.
extern "C" __global__ void __launch_bounds__(1024) norm_vec4(const __grid_constant__ NormParams p) { norm<4>(p); }

// The 1 keeps nvcc from limiting it to 64 registers, of which one spills on sm_90a.
extern "C" __global__ void __launch_bounds__(512, 1) norm_scalar(const __grid_constant__ NormParams p) { norm<1>(p); }

extern "C" __global__ void __launch_bounds__(32 * kGroupWarps) norm_group(const __grid_constant__ NormParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const int lane = threadIdx.x % 32, group = blockIdx.x * kGroupWarps + threadIdx.x / 32;
    if (group >= p.n_group) return;
    const float* x = p.x + (int64_t)blockIdx.y * p.x_stride + (int64_t)group * p.n;
    float v[kGroupColumns], sum = 0.f, square = 0.f;
#pragma unroll
    for (int i = 0; i < kGroupColumns; i++) {
        v[i] = i * 32 + lane < p.n ? x[i * 32 + lane] : 0.f;
        sum += v[i];
    }
    const float mean = p.kind == NORM_LAYER ? warp_sum(sum) / p.n : 0.f;
#pragma unroll
    for (int i = 0; i < kGroupColumns; i++) {
        v[i] -= mean;
        if (i * 32 + lane < p.n) square += v[i] * v[i];
    }
    const float factor = 1.f / sqrtf(warp_sum(square) / p.n + p.eps);
    float* out = p.out + (int64_t)blockIdx.y * p.out_stride + (int64_t)group * p.n;
#pragma unroll
    for (int i = 0; i < kGroupColumns; i++) {
        const int column = i * 32 + lane;
        if (column < p.n) out[column] = v[i] * factor * p.weight[column] + (p.bias ? p.bias[column] : 0.f);
    }
}
