// The order in which attention adds, the same in attention_decode.cu and attention_prefill.cu: a row gets the same bits
// as a decode row and as a prompt row, in any chunk and beside any other rows.
//
// The keys are cut into splits at multiples of 128 positions. Within a split, of its unmasked keys:
//   s[j] = log2(e) scale q . k[j]   products of 16 dimensions, ascending; of each the lower half of q, then the upper
//   m    = max s[j]
//   p[j] = exp2(s[j] - m)           rounded to fp16
//   l, a = sum p[j], sum p[j] v[j]  products of 16 keys, ascending, from zero; l is the sum of a v of ones, so that the
//                                   rounded weights add up to one
// Masked keys have p = 0, and products of zeros leave a sum as it is: they may be skipped. The splits are added in
// ascending order by `Fade`; one without an unmasked key changes nothing and may be skipped as well. The sink comes
// last. Sums outside the tensor cores name their rounding, so that no compiler contracts them otherwise elsewhere.
#pragma once

#include "params/attention_params.h"
#include "common/ptx.cuh"

static constexpr float kLog2e = 1.4426950408889634f;
static constexpr uint32_t kOnes = 0x3c003c00u;  // two halves: the operand that adds the weights up

// x = hi + lo to 22 bits: a float32 operand as two float16 ones. Key magnitudes of real models make the rounding of
// q to one half visible in the logits; K and V are halves already.
struct SplitPair {
    uint32_t hi, lo;
};

DEVICE SplitPair split_f16(float a, float b) {
    const uint32_t hi = pack_f16(a, b);
    return {hi, pack_f16(__fsub_rn(a, f16_low(hi)), __fsub_rn(b, f16_high(hi)))};
}

// Two elements of q as operands of the scores; factor: query_factor(scale).
DEVICE float query_factor(float scale) { return __fmul_rn(scale, kLog2e); }
DEVICE SplitPair split_query(float a, float b, float factor) {
    return split_f16(__fmul_rn(a, factor), __fmul_rn(b, factor));
}

// What is taken from scores before exp2; a row that has seen masked keys only has no maximum.
DEVICE float exponent_base(float top) { return top == -INFINITY ? 0.f : top; }
DEVICE float weight_of(float score, float base) { return exp2_normal(__fsub_rn(score, base)); }

// One step of adding splits: what is left of the sums so far, and what counts of the split's.
struct Fade {
    float keep, take;
};

// `top` becomes the maximum of both. A split without keys (-inf) gives exactly {1, 0}, the first one {0, 1}.
DEVICE Fade fade_of(float& top, float split_top) {
    const float before = top;
    top = fmaxf(top, split_top);
    const float base = exponent_base(top);
    return {weight_of(before, base), weight_of(split_top, base)};
}
DEVICE float add_split(float sum, float split_sum, Fade f) {
    return __fmaf_rn(sum, f.keep, __fmul_rn(split_sum, f.take));
}

// The sink of a head in base 2; -inf where there are none.
DEVICE float sink_of(const float* sinks, int head) { return sinks ? __fmul_rn(sinks[head], kLog2e) : -INFINITY; }

// Factor that turns sum(p v) into the output, from the maximum and the sum of exponentials (both in base 2) and the
// head's sink, which enters the denominator only. To 2^-22: without the slow path of division, whose code a short
// kernel waits for.
DEVICE float softmax_factor(float top, float sum, float sink) {
    const float most = fmaxf(top, sink);
    const float own = weight_of(top, most);
    return __fdividef(own, __fmaf_rn(sum, own, weight_of(sink, most)));
}
