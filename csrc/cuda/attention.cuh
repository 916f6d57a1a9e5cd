// What the attention kernels share: scores in base 2, float32 operands as two halves, the last step of the softmax.
#pragma once

#include "params/attention_params.h"
#include "common/ptx.cuh"

static constexpr float kLog2e = 1.4426950408889634f;

// x = hi + lo to 22 bits: a float32 operand as two float16 ones. Key magnitudes of real models make the rounding of
// q to one half visible in the logits; K and V are halves already.
struct SplitPair {
    uint32_t hi, lo;
};

DEVICE SplitPair split_f16(float a, float b) {
    const uint32_t hi = pack_f16(a, b);
    return {hi, pack_f16(a - f16_low(hi), b - f16_high(hi))};
}

// Factor that turns sum(p v) into the output, from the maximum and the sum of exponentials (both in base 2) and the
// head's sink logit, which enters the denominator only.
DEVICE float softmax_factor(float top, float sum, const float* sinks, int head) {
    if (!sinks) return 1.f / sum;
    const float sink = sinks[head] * kLog2e;
    const float most = fmaxf(top, sink);
    const float own = exp2f(top - most);
    return own / (sum * own + exp2f(sink - most));
}
