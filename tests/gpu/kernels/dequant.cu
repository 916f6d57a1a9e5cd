// Raw GGUF blocks to float32, every type, bit for bit what the format defines: products and sums rounded one by one, in
// the order of the formula, never contracted. The engine never does this to a matrix; the tests do, to hold raw_code
// and the formulas in csrc/cuda/quant against the gguf package.
//
// dequant_<type>(DequantParams): a thread per element, any grid (it strides over the elements). Reads every block
// several times, mostly from L1, and writes 4 bytes per element.
#include "dequant_params.h"
#include "quant/types.cuh"

DEVICE float half_at(const uint8_t* p) { return half_float(raw_u16(p)); }
DEVICE float scaled(float scale, int q) { return __fmul_rn(scale, static_cast<float>(q)); }

// Element k of block `b`: code * scale (+ min); the formulas are in the types' headers.
template <class Q>
DEVICE float raw_value(const uint8_t* b, int k) {
    const int q = static_cast<int>(Q::raw_code(b, k));
    if constexpr (std::is_same_v<Q, F32>) return __int_as_float(q);
    if constexpr (std::is_same_v<Q, F16>) return half_float(q);
    if constexpr (std::is_same_v<Q, BF16>) return __int_as_float(q << 16);
    if constexpr (std::is_same_v<Q, Q4_0>) return scaled(half_at(b), q - 8);
    if constexpr (std::is_same_v<Q, Q5_0>) return scaled(half_at(b), q - 16);
    if constexpr (std::is_same_v<Q, Q8_0>) return scaled(half_at(b), static_cast<int8_t>(q));
    if constexpr (std::is_same_v<Q, Q4_1> || std::is_same_v<Q, Q5_1>)
        return __fadd_rn(scaled(half_at(b), q), half_at(b + 2));
    if constexpr (std::is_same_v<Q, MXFP4>) {
        float scale[2][2], unused[2][2];
        MXFP4::scales(b[0], 0, scale, unused);
        return __fmul_rn(scale[0][0], MXFP4::e2m1(q));
    }
    if constexpr (std::is_same_v<Q, Q2_K>) {
        const float scale = scaled(half_at(b + 80), b[k / 16] & 15), min = scaled(half_at(b + 82), b[k / 16] >> 4);
        return __fsub_rn(scaled(scale, q), min);
    }
    if constexpr (std::is_same_v<Q, Q3_K>) {
        const int s = k / 16, low = (b[96 + s % 8] >> (s / 8 * 4)) & 15, high = (b[104 + s % 4] >> (s / 4 * 2)) & 3;
        return scaled(scaled(half_at(b + 108), (low | high << 4) - 32), q - 4);
    }
    if constexpr (std::is_same_v<Q, Q4_K> || std::is_same_v<Q, Q5_K>) {
        const int i = k / 32;
        const uint8_t* c = b + 4;
        const int s = i < 4 ? c[i] & 63 : (c[i + 4] & 15) | (c[i - 4] >> 6) << 4;
        const int m = i < 4 ? c[i + 4] & 63 : (c[i + 4] >> 4) | (c[i] >> 6) << 4;
        return __fsub_rn(scaled(scaled(half_at(b), s), q), scaled(half_at(b + 2), m));
    }
    if constexpr (std::is_same_v<Q, Q6_K>)
        return scaled(scaled(half_at(b + 208), static_cast<int8_t>(b[192 + k / 16])), q - 32);
}

template <class Q>
DEVICE void dequant(const DequantParams& p) {
    const int64_t n = p.n_blocks * Q::kBlockK, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    pdl_launch_dependents();
    pdl_wait();
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
        p.out[i] = raw_value<Q>(p.blocks + i / Q::kBlockK * Q::kBlockBytes, static_cast<int>(i % Q::kBlockK));
}

#define DEFINE(Type, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) dequant_##name(const __grid_constant__ DequantParams p) { \
        dequant<Type>(p);                                                                                       \
    }
FOR_EACH_TYPE(DEFINE)
