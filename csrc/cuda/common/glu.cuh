// Gated activations, for the kernels that apply them by themselves and for those that do so after a product: the same
// bits in both, so the roundings are written out where a compiler could fuse them.
#pragma once

#include "common/ptx.cuh"
#include "params/pointwise_params.h"

// The tanh form of GELU (Hendrycks & Gimpel 2016).
DEVICE float gelu_tanh(float x) {
    const float inner = __fmaf_rn(__fmul_rn(__fmul_rn(0.044715f, x), x), x, x);
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.f, tanhf(__fmul_rn(0.7978845608028654f, inner))));
}

// To a few units in the last place: without the slow paths of division and exp, whose code a short kernel waits for.
DEVICE float sigmoid(float x) { return __fdividef(1.f, __fadd_rn(1.f, __expf(-x))); }

DEVICE float glu_value(int kind, float g, float u) {
    if (kind == GLU_SILU) return __fmul_rn(__fmul_rn(g, sigmoid(g)), u);
    if (kind == GLU_GELU_TANH) return __fmul_rn(gelu_tanh(g), u);
    g = g > 7.f ? 7.f : g;
    u = u > 7.f ? 7.f : u < -7.f ? -7.f : u;
    return __fmul_rn(__fmul_rn(g, sigmoid(__fmul_rn(1.702f, g))), __fadd_rn(u, 1.f));
}

// Of four, which are of one kind.
DEVICE float4 glu_values(int kind, const float4& g, const float4& u) {
    const auto of = [&](int one) {
        return make_float4(glu_value(one, g.x, u.x), glu_value(one, g.y, u.y), glu_value(one, g.z, u.z),
                           glu_value(one, g.w, u.w));
    };
    return kind == GLU_SILU ? of(GLU_SILU) : kind == GLU_GELU_TANH ? of(GLU_GELU_TANH) : of(GLU_SWIGLU_OAI);
}
