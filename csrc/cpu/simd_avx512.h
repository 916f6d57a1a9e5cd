// Sixteen float lanes on AVX-512 (F, BW, DQ, VL) with FMA and F16C: the primitives of kernels_impl.h.
//
// `F` holds 16 floats, `I` 16 int32. Every header simd_*.h offers the same names with the same results (the baseline
// differs only in that `fma` rounds twice). Included inside the namespace of its instruction set by one .cpp file.
#pragma once

using F = __m512;
using I = __m512i;

// Register tile of the matrix product: rows of weights x tokens (24 accumulators of the 32 registers).
constexpr int kTileRows = 4;
constexpr int kTileTokens = 6;

WO_INLINE F zero() { return _mm512_setzero_ps(); }
WO_INLINE F set1(float x) { return _mm512_set1_ps(x); }
WO_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
WO_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
WO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
WO_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
WO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
WO_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
WO_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// b where either is NaN
WO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
WO_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }

WO_INLINE float f16_to_float(uint16_t h) { return _cvtsh_ss(h); }
WO_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
WO_INLINE void store_f16(uint16_t* p, F a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
WO_INLINE F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

WO_INLINE I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
WO_INLINE I load_i8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
WO_INLINE I iset1(int x) { return _mm512_set1_epi32(x); }
WO_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
WO_INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
WO_INLINE I ior(I a, I b) { return _mm512_or_si512(a, b); }
WO_INLINE I shift_right(I a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
WO_INLINE I shift_left(I a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
WO_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
WO_INLINE I round_to_int(F a) { return _mm512_cvtps_epi32(a); }
WO_INLINE F as_float(I a) { return _mm512_castsi512_ps(a); }

// Lane i is a where bit i of `bits` is set, else b.
WO_INLINE F select(uint32_t bits, F a, F b) { return _mm512_mask_blend_ps((__mmask16)bits, b, a); }
WO_INLINE F zero_below(F x, float limit, F value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), value);
}

// Sum of the lanes: (i) + (i+8), then +4, +2, +1. `sum4` sums four vectors by the same tree into out[0..3].
WO_INLINE __m128 sum4_(F a, F b, F c, F d) {
    __m256 ya = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m256 yb = _mm256_add_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps(b, 1));
    __m256 yc = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    __m256 yd = _mm256_add_ps(_mm512_castps512_ps256(d), _mm512_extractf32x8_ps(d, 1));
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(ya, yb, 0x20), _mm256_permute2f128_ps(ya, yb, 0x31));
    __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(yc, yd, 0x20), _mm256_permute2f128_ps(yc, yd, 0x31));
    __m256 v = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    __m256 s = _mm256_hadd_ps(v, v);
    return _mm_unpacklo_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
WO_INLINE void sum4(F a, F b, F c, F d, float* out) { _mm_storeu_ps(out, sum4_(a, b, c, d)); }
WO_INLINE float sum(F a) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    __m128 v = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
WO_INLINE float max_lane(F a) { return _mm512_reduce_max_ps(a); }

// Codebooks: a block's few values are computed once (16 lanes: d * (q - base) - m for q = 0..15) and then permuted into
// place, which is one operation per 16 weights where a conversion takes three. `pick` reads the low bits of each lane
// and ignores the others.
WO_INLINE F ramp(int first) {
    const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_ps(lanes, _mm512_set1_ps((float)first));
}
struct Codebook2 {
    F t;
};
struct Codebook4 {
    F t;
};
struct Codebook5 {
    F lo, hi;
};
WO_INLINE Codebook2 codebook2(float d, float m) {
    const __m512 q = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    return {_mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(d), q), _mm512_set1_ps(m))};
}
WO_INLINE Codebook4 codebook4(float d, int base) { return {_mm512_mul_ps(_mm512_set1_ps(d), ramp(-base))}; }
WO_INLINE Codebook4 codebook4(float d, float m) {
    return {_mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(d), ramp(0)), _mm512_set1_ps(m))};
}
WO_INLINE Codebook5 codebook5(float d, int base) {
    return {_mm512_mul_ps(_mm512_set1_ps(d), ramp(-base)), _mm512_mul_ps(_mm512_set1_ps(d), ramp(16 - base))};
}
WO_INLINE Codebook5 codebook5(float d, float m) {
    return {_mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(d), ramp(0)), _mm512_set1_ps(m)),
            _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(d), ramp(16)), _mm512_set1_ps(m))};
}
WO_INLINE Codebook4 codebook_table(float d, const float* values16) {
    return {_mm512_mul_ps(_mm512_set1_ps(d), _mm512_loadu_ps(values16))};
}
WO_INLINE F pick(Codebook2 c, I q) { return _mm512_permutexvar_ps(q, c.t); }
WO_INLINE F pick(Codebook4 c, I q) { return _mm512_permutexvar_ps(q, c.t); }
// The fifth bit of lane i is bit i of `high`.
WO_INLINE F pick(Codebook5 c, I q, uint32_t high) {
    return _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(q, c.lo), (__mmask16)high, q, c.hi);
}
// The fifth bit of lane i is bit `bit` of lane i of `high`.
WO_INLINE F pick(Codebook5 c, I q, I high, int bit) {
    __mmask16 k = _mm512_test_epi32_mask(high, _mm512_set1_epi32(1 << bit));
    return _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(q, c.lo), k, q, c.hi);
}
