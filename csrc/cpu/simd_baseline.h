// Sixteen float lanes in compiler vectors for any x86-64: the primitives of kernels_impl.h.
//
// Same names as simd_avx512.h. `fma` rounds the product (no FMA unit is assumed, and emulating one is slow), so
// results may differ from the other two in the last bits; dequantization does not use it and is the same to the bit.
#pragma once

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));
struct F {
    Float4 v[4];
};
struct I {
    Int4 v[4];
};

constexpr int kTileRows = 4;
constexpr int kTileTokens = 1;

#define WO_QUARTERS for (int j = 0; j < 4; ++j)

WO_INLINE F set1(float x) {
    F r;
    WO_QUARTERS r.v[j] = Float4{x, x, x, x};
    return r;
}
WO_INLINE F zero() { return set1(0.0f); }
// Weights need not be aligned: every load is a copy.
WO_INLINE F load(const float* p) {
    F r;
    WO_QUARTERS __builtin_memcpy(&r.v[j], p + 4 * j, 16);
    return r;
}
WO_INLINE void store(float* p, F a) { WO_QUARTERS __builtin_memcpy(p + 4 * j, &a.v[j], 16); }
WO_INLINE F add(F a, F b) {
    WO_QUARTERS a.v[j] += b.v[j];
    return a;
}
WO_INLINE F sub(F a, F b) {
    WO_QUARTERS a.v[j] -= b.v[j];
    return a;
}
WO_INLINE F mul(F a, F b) {
    WO_QUARTERS a.v[j] *= b.v[j];
    return a;
}
WO_INLINE F div(F a, F b) {
    WO_QUARTERS a.v[j] /= b.v[j];
    return a;
}
WO_INLINE F fma(F a, F b, F c) { return add(mul(a, b), c); }
// b where either is NaN
WO_INLINE F max(F a, F b) {
    WO_QUARTERS a.v[j] = a.v[j] > b.v[j] ? a.v[j] : b.v[j];
    return a;
}
WO_INLINE F min(F a, F b) {
    WO_QUARTERS a.v[j] = a.v[j] < b.v[j] ? a.v[j] : b.v[j];
    return a;
}

WO_INLINE float bits_to_float(uint32_t u) {
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}
WO_INLINE uint32_t float_to_bits(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return u;
}

static float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, mantissa = h & 0x3FF, exponent = (h >> 10) & 31;
    if (exponent == 31) return bits_to_float(sign | 0x7F800000 | (mantissa << 13));
    if (exponent == 0) {
        float magnitude = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
        return bits_to_float(sign | float_to_bits(magnitude));
    }
    return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
static uint16_t float_to_f16(float f) {
    uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // rounds to 65536 or more
    if (magnitude < 0x38800000) {                                   // subnormal: let the adder round to 2^-24
        float shifted = bits_to_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(shifted) - 0x3F000000));
    }
    uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}
WO_INLINE F load_f16(const uint16_t* p) {
    uint16_t h[16];
    float r[16];
    __builtin_memcpy(h, p, 32);
    for (int i = 0; i < 16; ++i) r[i] = f16_to_float(h[i]);
    return load(r);
}
WO_INLINE void store_f16(uint16_t* p, F a) {
    float v[16];
    store(v, a);
    for (int i = 0; i < 16; ++i) p[i] = float_to_f16(v[i]);
}
WO_INLINE F load_bf16(const uint16_t* p) {
    uint16_t h[16];
    float r[16];
    __builtin_memcpy(h, p, 32);
    for (int i = 0; i < 16; ++i) r[i] = bits_to_float((uint32_t)h[i] << 16);
    return load(r);
}

WO_INLINE I load_u8(const uint8_t* p) {
    I r;
    WO_QUARTERS r.v[j] = Int4{p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]};
    return r;
}
WO_INLINE I load_i8(const uint8_t* p) {
    I r;
    WO_QUARTERS r.v[j] = Int4{(int8_t)p[4 * j], (int8_t)p[4 * j + 1], (int8_t)p[4 * j + 2], (int8_t)p[4 * j + 3]};
    return r;
}
WO_INLINE I iset1(int x) {
    I r;
    WO_QUARTERS r.v[j] = Int4{x, x, x, x};
    return r;
}
WO_INLINE I iadd(I a, I b) {
    WO_QUARTERS a.v[j] = (Int4)((Uint4)a.v[j] + (Uint4)b.v[j]);
    return a;
}
WO_INLINE I iand(I a, I b) {
    WO_QUARTERS a.v[j] &= b.v[j];
    return a;
}
WO_INLINE I ior(I a, I b) {
    WO_QUARTERS a.v[j] |= b.v[j];
    return a;
}
WO_INLINE I shift_right(I a, int n) {
    WO_QUARTERS a.v[j] = (Int4)((Uint4)a.v[j] >> n);
    return a;
}
WO_INLINE I shift_left(I a, int n) {
    WO_QUARTERS a.v[j] = (Int4)((Uint4)a.v[j] << n);
    return a;
}
WO_INLINE F to_float(I a) {
    F r;
    WO_QUARTERS r.v[j] = __builtin_convertvector(a.v[j], Float4);
    return r;
}
WO_INLINE F as_float(I a) {
    F r;
    WO_QUARTERS r.v[j] = (Float4)a.v[j];
    return r;
}
// Nearest, ties to even, for |a| < 2^22 (NaN gives some number).
WO_INLINE I round_to_int(F a) {
    I r;
    WO_QUARTERS r.v[j] = (Int4)((Uint4)(a.v[j] + 12582912.0f) - 0x4B400000u);
    return r;
}

// Lane i is all ones where bit i of `bits` is set.
WO_INLINE I lanes_of_bits(uint32_t bits) {
    const Int4 one = {1, 2, 4, 8};
    I r;
    WO_QUARTERS {
        int quarter = (int)(bits >> (4 * j));
        r.v[j] = (Int4{quarter, quarter, quarter, quarter} & one) == one;
    }
    return r;
}
// Lane i is a where bit i of `bits` is set, else b.
WO_INLINE F select(uint32_t bits, F a, F b) {
    I m = lanes_of_bits(bits);
    WO_QUARTERS a.v[j] = m.v[j] ? a.v[j] : b.v[j];
    return a;
}
WO_INLINE F zero_below(F x, float limit, F value) {
    F l = set1(limit);
    WO_QUARTERS value.v[j] = x.v[j] < l.v[j] ? Float4{} : value.v[j];
    return value;
}

// Sum of the lanes: (i) + (i+8), then +4, +2, +1. `sum4` sums four vectors by the same tree into out[0..3].
WO_INLINE float sum(F a) {
    float v[16];
    store(v, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}
WO_INLINE void sum4(F a, F b, F c, F d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
}
WO_INLINE float max_lane(F a) {
    float v[16], m;
    store(v, a);
    m = v[0];
    for (int i = 1; i < 16; ++i) m = m > v[i] ? m : v[i];
    return m;
}

// Codebooks: d * (q - base) - m.
struct Codebook2 {
    float d, m;
};
struct Codebook4 {
    float d, m;
    int base;
};
using Codebook5 = Codebook4;
struct CodebookTable {
    float t[16];
};
WO_INLINE Codebook2 codebook2(float d, float m) { return {d, m}; }
WO_INLINE Codebook4 codebook4(float d, int base) { return {d, 0.0f, -base}; }
WO_INLINE Codebook4 codebook4(float d, float m) { return {d, m, 0}; }
WO_INLINE Codebook5 codebook5(float d, int base) { return codebook4(d, base); }
WO_INLINE Codebook5 codebook5(float d, float m) { return codebook4(d, m); }
WO_INLINE CodebookTable codebook_table(float d, const float* values16) {
    CodebookTable c;
    store(c.t, mul(set1(d), load(values16)));
    return c;
}
WO_INLINE F value_of(Codebook4 c, I q) { return sub(mul(set1(c.d), to_float(iadd(q, iset1(c.base)))), set1(c.m)); }
WO_INLINE F pick(Codebook2 c, I q) { return value_of({c.d, c.m, 0}, iand(q, iset1(3))); }
WO_INLINE F pick(Codebook4 c, I q) { return value_of(c, iand(q, iset1(15))); }
WO_INLINE F pick(CodebookTable c, I q) {
    float v[16];
    for (int i = 0; i < 16; ++i) v[i] = c.t[q.v[i / 4][i % 4] & 15];
    return load(v);
}
// The fifth bit of lane i is bit i of `high`.
WO_INLINE F pick(Codebook5 c, I q, uint32_t high) {
    return value_of(c, ior(iand(q, iset1(15)), iand(lanes_of_bits(high), iset1(16))));
}
// The fifth bit of lane i is bit `bit` of lane i of `high`.
WO_INLINE F pick(Codebook5 c, I q, I high, int bit) {
    return value_of(c, ior(iand(q, iset1(15)), shift_left(iand(shift_right(high, bit), iset1(1)), 4)));
}

#undef WO_QUARTERS
