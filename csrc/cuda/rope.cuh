// How a pair of dimensions turns and how K and V are rounded for the cache: the same bits in rope_kv.cu and in
// attention_decode.cu, so no product and sum may be contracted one way here and another way there.
//
//   angle = position * inv_freq[pair];  (a, b) -> mscale * (a cos - b sin, a sin + b cos)
//   pairs of a head: (2p, 2p + 1) interleaved, (p, p + n_rot / 2) neox; dimensions from n_rot on stay
#pragma once

#include "params/rope_kv_params.h"
#include "common/ptx.cuh"

// The two dimensions of a head's `pair`. The pairs after the rotated ones stand for dimensions n_rot .. head_dim - 1,
// two each.
struct RopePair {
    int first, second;
    bool is_rotated;
};

DEVICE RopePair rope_pair(int pair, int half_rot, int rope_type) {
    const bool is_rotated = pair < half_rot;
    if (is_rotated && rope_type == ROPE_NEOX) return {pair, pair + half_rot, true};
    return {2 * pair, 2 * pair + 1, is_rotated};
}

// (cos, sin) times mscale. The angle is reduced in float64 to half turns (sincospif needs no further reduction): exact
// at any position, and without the slow path and stack frame of sincosf.
DEVICE float2 rope_turn(int position, float inv_freq, float mscale) {
    double half_turns = __dmul_rn(__dmul_rn(position, inv_freq), 0.31830988618379067154);
    half_turns = __dsub_rn(half_turns, __dmul_rn(2.0, rint(__dmul_rn(0.5, half_turns))));
    float s, c;
    sincospif(static_cast<float>(half_turns), &s, &c);
    return make_float2(__fmul_rn(c, mscale), __fmul_rn(s, mscale));
}

DEVICE float2 rotate(float a, float b, float2 turn) {
    return make_float2(__fmaf_rn(a, turn.x, -__fmul_rn(b, turn.y)), __fmaf_rn(a, turn.y, __fmul_rn(b, turn.x)));
}

// Finite for every finite input, so that a key that overflows cannot turn into NaN as inf - inf; NaN stays NaN.
DEVICE uint16_t to_cache(float x) {
    x = x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x;
    return static_cast<uint16_t>(pack_f16(x, 0.f));
}
