// How a token is drawn from a row of logits: the rule both engines follow, and its arithmetic as plain functions.
//
// For the row at position p of a slot with temperature T, penalties r (repetition), f (frequency) and q (presence),
// top_k, top_p, min_p, a 64-bit seed and edits of single tokens:
//   0. A row with a NaN, a +infinity or nothing above -infinity has no distribution: the token is -1.
//      y_i = logit_i, plus the bias of i; -infinity where an edit that applies (sampling_edit_applies) bans i. Where
//      nothing above -infinity is left, the token is -1 too.
//   1. x_i = sampling_temper(y_i, T); skipped for T = 0 (sampling_is_greedy: below 1e-5 counts as 0).
//   2. Penalties: x_i = sampling_penalize(x_i, r) - sampling_discount(q, f, c_i, T) for the distinct tokens i sampled
//      c_i > 0 times in the slot since set_slot. With f = q = 0 the subtraction changes no bit.
//   3. T = 0: the token is the argmax, the lowest id of equals. Nothing below applies.
//   4. Order: by x descending, equal x by id ascending. top_k in [1, n_vocab): only the first top_k stay.
//   5. Weights: w_i = sampling_weight(x_i, m), m = the largest x: a whole number, e^(x_i - m) in units of 2^-40. Sums
//      of weights are exact in 64 bits (2^18 tokens x 2^40), so no sum here depends on its order.
//   6. top_p < 1: with W the sum of the weights that stay, only the shortest prefix of the order stays whose sum is at
//      least sampling_top_p_target(top_p, W) (at least the first token).
//   7. min_p > 0: only tokens with w_i >= sampling_min_p_limit(min_p) stay (the first always does).
//   8. With W the sum of what stays, u = sampling_random(seed, p + 1) and t = sampling_scale(u, W), the token is the
//      first in id order whose running sum of weights exceeds t.
// u is 64 random bits, read as u / 2^64 in [0, 1); it depends on the seed and on the position p + 1 that the drawn
// token will have, and on nothing else.
#pragma once

#include <stdint.h>

#include "params/host_device.h"

#ifndef __CUDACC__
#include <math.h>
#endif

// One in fixed point: the weight of the largest logit.
#define SAMPLING_ONE ((uint64_t)1 << 40)
#define SAMPLING_MAX 3.402823466e+38f

// How one slot samples: the numbers of the rule above.
typedef struct {
    uint64_t seed;
    float temperature;         // below 1e-5: greedy
    float top_p;               // 1: off
    float min_p;               // 0: off
    float repetition_penalty;  // 1: off
    int32_t top_k;             // 0: off
    float presence_penalty;    // 0: off
    float frequency_penalty;   // 0: off
    int32_t n_bias;            // of the slot's edits the first, which add to a logit; the others ban a token
    int32_t n_edits;           // 0: none, and the slot keeps no history
    int32_t reserved;
} SlotSampling;

// One change to the logit of one token. A slot's edits are SAMPLING_EDIT_WORDS int32 words: the entries, one bias a
// token at most, then the tokens that they point to.
typedef struct {
    int32_t token;
    float bias;        // of a bias
    int32_t until;     // of a ban: holds while fewer tokens than this were sampled in the slot,
    int32_t n_before;  // and the last n_before of these, fewer than SAMPLING_RECENT,
    int32_t before;    // are the words from `before` on
} SlotEdit;

#define SAMPLING_RECENT 32
// The tokens sampled in a slot since set_slot: word 0 is their number n, word 1 + i % SAMPLING_RECENT token i, of the
// latest SAMPLING_RECENT.
#define SAMPLING_HISTORY_WORDS 33
#define SAMPLING_EDIT_WORDS 11520

static HOST_DEVICE int sampling_edit_applies(const SlotEdit* edit, const int32_t* words, const int32_t* history) {
    int32_t n = history[0], first = n - edit->n_before;
    if (n >= edit->until || first < 0) return 0;
    for (int32_t i = 0; i < edit->n_before; ++i)
        if (history[1 + (first + i) % SAMPLING_RECENT] != words[edit->before + i]) return 0;
    return 1;
}
static HOST_DEVICE void sampling_remember(int32_t history[SAMPLING_HISTORY_WORDS], int32_t token) {
    history[1 + history[0] % SAMPLING_RECENT] = token;
    ++history[0];
}

// Philox4x32-10 (Salmon et al. 2011): four random words of a 128-bit counter under a 64-bit key.
static HOST_DEVICE void philox4x32_10(const uint32_t counter[4], uint32_t key0, uint32_t key1, uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int round = 0; round < 10; ++round) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ key0, n2 = (uint32_t)(a >> 32) ^ c3 ^ key1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        c0 = n0;
        c2 = n2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

// The 64 random bits of the token at `position`: words 1 (high) and 0 (low) of counter (position, 0, 0, 0), keyed by
// the low and the high half of the seed.
static HOST_DEVICE uint64_t sampling_random(uint64_t seed, uint32_t position) {
    const uint32_t counter[4] = {position, 0, 0, 0};
    uint32_t out[4];
    philox4x32_10(counter, (uint32_t)seed, (uint32_t)(seed >> 32), out);
    return (uint64_t)out[1] << 32 | out[0];
}

static HOST_DEVICE int sampling_is_greedy(float temperature) { return temperature < 1e-5f; }

// float32 division; what overflows upwards is the largest float, so that one logit stays on top instead of none.
static HOST_DEVICE float sampling_temper(float x, float temperature) {
    x = x / temperature;
    return x > SAMPLING_MAX ? SAMPLING_MAX : x;
}
static HOST_DEVICE int sampling_has_penalty(float repetition, float frequency, float presence) {
    return repetition != 1 || frequency != 0 || presence != 0;
}
static HOST_DEVICE float sampling_penalize(float x, float penalty) {
    return x > 0 ? sampling_temper(x, penalty) : x * penalty;
}

// What a token loses that was sampled `count` times. The product is rounded before it is added to: no engine may fuse
// the two.
static HOST_DEVICE float sampling_discount(float presence, float frequency, uint32_t count, float temperature) {
#ifdef __CUDA_ARCH__
    float y = __fadd_rn(__fmul_rn(frequency, (float)count), presence);
#else
    float y = frequency * (float)count + presence;
#endif
    return sampling_is_greedy(temperature) ? y : y / temperature;
}

// e^(x - max) in units of 2^-40, rounded down; 0 from 28 below the maximum.
static HOST_DEVICE uint64_t sampling_weight(float x, float max) {
    float d = x - max;
    return d > -28.0f ? (uint64_t)(expf(d) * 1099511627776.0f) : 0;
}

// Sum that the top-p prefix must reach.
static HOST_DEVICE uint64_t sampling_top_p_target(float top_p, uint64_t total) {
    double t = (double)top_p * (double)total;
    uint64_t target = (uint64_t)t;
    if ((double)target < t) ++target;
    return target < 1 ? 1 : target > total ? total : target;
}

// Least weight that min-p lets stay.
static HOST_DEVICE uint64_t sampling_min_p_limit(float min_p) {
    double limit = (double)min_p * (double)SAMPLING_ONE;
    uint64_t whole = (uint64_t)limit;
    return (double)whole < limit ? whole + 1 : whole;
}

// floor(u / 2^64 * total), without overflow.
static HOST_DEVICE uint64_t sampling_scale(uint64_t u, uint64_t total) {
#ifdef __CUDA_ARCH__
    return __umul64hi(u, total);
#else
    return (uint64_t)(((unsigned __int128)u * total) >> 64);
#endif
}
