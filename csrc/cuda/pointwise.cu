// Elementwise operations on strided float32 rows: gated activations, GELU, residual add, gather of rows.
//
//   glu            out = silu(a) * b, gelu(a) * b, or u * sigmoid(1.702 u) * (v + 1) with u = min(a, 7), v = b to +-7
//   act_gelu_tanh  out = gelu(a)
//   add            out += a
//   gather_rows    out[j] = a[rows[j]], zeros where rows[j] is negative
//
// Grid: y = row, x = columns / 1024; a thread has four neighbouring columns and moves them as 16 bytes where addresses,
// strides and width allow it (the same for the whole launch). Clamps keep NaN. Bytes: 4 per element of each operand.
#include "common/glu.cuh"

DEVICE bool is_aligned(const void* p, int stride) {
    return ((reinterpret_cast<uint64_t>(p) | (4 * (int64_t)stride)) & 15) == 0;
}

// The up to four columns of this thread.
struct Columns {
    int first, n;
    bool vec4;
};

DEVICE Columns columns(const PointwiseParams& p) {
    const int first = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    const int n = p.n - first < 4 ? p.n - first : 4;
    const bool aligned = is_aligned(p.a, p.a_stride) && is_aligned(p.b, p.b_stride) && is_aligned(p.out, p.out_stride);
    return {first, n < 0 ? 0 : n, aligned && n == 4};
}

DEVICE void load(float (&v)[4], const float* row, const Columns& c) {
    if (c.vec4) {
        const float4 t = *reinterpret_cast<const float4*>(row + c.first);
        v[0] = t.x, v[1] = t.y, v[2] = t.z, v[3] = t.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = i < c.n ? row[c.first + i] : 0.f;
    }
}

DEVICE void store(float* row, const float (&v)[4], const Columns& c) {
    if (c.vec4) {
        *reinterpret_cast<float4*>(row + c.first) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < c.n) row[c.first + i] = v[i];
    }
}

DEVICE float* out_row(const PointwiseParams& p) { return p.out + (int64_t)blockIdx.y * p.out_stride; }
DEVICE const float* a_row(const PointwiseParams& p) { return p.a + (int64_t)blockIdx.y * p.a_stride; }

extern "C" __global__ void __launch_bounds__(256) glu(const __grid_constant__ PointwiseParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const Columns c = columns(p);
    float g[4], u[4];
    load(g, a_row(p), c);
    load(u, p.b + (int64_t)blockIdx.y * p.b_stride, c);
#pragma unroll
    for (int i = 0; i < 4; i++) g[i] = glu_value(p.kind, g[i], u[i]);
    store(out_row(p), g, c);
}

extern "C" __global__ void __launch_bounds__(256) act_gelu_tanh(const __grid_constant__ PointwiseParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const Columns c = columns(p);
    float v[4];
    load(v, a_row(p), c);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = gelu_tanh(v[i]);
    store(out_row(p), v, c);
}

extern "C" __global__ void __launch_bounds__(256) add(const __grid_constant__ PointwiseParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const Columns c = columns(p);
    float v[4], sum[4];
    load(v, a_row(p), c);
    load(sum, out_row(p), c);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += v[i];
    store(out_row(p), sum, c);
}

extern "C" __global__ void __launch_bounds__(256) gather_rows(const __grid_constant__ PointwiseParams p) {
    pdl_launch_dependents();
    pdl_wait();
    const Columns c = columns(p);
    const int from = p.rows[blockIdx.y];
    float v[4] = {};
    if (from >= 0) load(v, p.a + (int64_t)from * p.a_stride, c);
    store(out_row(p), v, c);
}
