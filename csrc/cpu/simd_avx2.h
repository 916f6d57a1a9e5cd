// Sixteen float lanes as two AVX2 registers with FMA and F16C: the primitives of kernels_impl.h.
//
// Same names and same results as simd_avx512.h, lane by lane. Included inside the namespace of its instruction set by
// one .cpp file.
#pragma once

struct F {
    __m256 lo, hi;
};
struct I {
    __m256i lo, hi;
};

// Register tile of the matrix product: see accumulate_tile below.
constexpr int kTileRows = 4;
constexpr int kTileTokens = 3;

WO_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
WO_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
WO_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
WO_INLINE void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
WO_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
WO_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
WO_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
WO_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
WO_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
// b where either is NaN
WO_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
WO_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

WO_INLINE float f16_to_float(uint16_t h) { return _cvtsh_ss(h); }
WO_INLINE F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
WO_INLINE void store_f16(uint16_t* p, F a) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
WO_INLINE F load_bf16(const uint16_t* p) {
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}

WO_INLINE I load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
WO_INLINE I load_i8(const uint8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
WO_INLINE I iset1(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
WO_INLINE I iadd(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
WO_INLINE I iand(I a, I b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
WO_INLINE I ior(I a, I b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
WO_INLINE I shift_right(I a, int n) { return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)}; }
WO_INLINE I shift_left(I a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
WO_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
WO_INLINE I round_to_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
WO_INLINE F as_float(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

// Lane i is all ones where bit i of `bits` is set.
WO_INLINE I lanes_of_bits(uint32_t bits) {
    const __m256i one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i lo = _mm256_and_si256(_mm256_set1_epi32((int)bits), one);
    __m256i hi = _mm256_and_si256(_mm256_set1_epi32((int)(bits >> 8)), one);
    return {_mm256_cmpeq_epi32(lo, one), _mm256_cmpeq_epi32(hi, one)};
}
// Lane i is a where bit i of `bits` is set, else b.
WO_INLINE F select(uint32_t bits, F a, F b) {
    I m = lanes_of_bits(bits);
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(m.lo)),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(m.hi))};
}
WO_INLINE F zero_below(F x, float limit, F value) {
    const __m256 l = _mm256_set1_ps(limit);
    return {_mm256_and_ps(_mm256_cmp_ps(x.lo, l, _CMP_NLT_UQ), value.lo),
            _mm256_and_ps(_mm256_cmp_ps(x.hi, l, _CMP_NLT_UQ), value.hi)};
}

// Sum of the lanes: (i) + (i+8), then +4, +2, +1. `sum4` sums four vectors by the same tree into out[0..3].
WO_INLINE void sum4(F a, F b, F c, F d, float* out) {
    __m256 ya = _mm256_add_ps(a.lo, a.hi), yb = _mm256_add_ps(b.lo, b.hi);
    __m256 yc = _mm256_add_ps(c.lo, c.hi), yd = _mm256_add_ps(d.lo, d.hi);
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(ya, yb, 0x20), _mm256_permute2f128_ps(ya, yb, 0x31));
    __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(yc, yd, 0x20), _mm256_permute2f128_ps(yc, yd, 0x31));
    __m256 v = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    __m256 s = _mm256_hadd_ps(v, v);
    _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
WO_INLINE float sum(F a) {
    __m256 y = _mm256_add_ps(a.lo, a.hi);
    __m128 u = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    __m128 v = _mm_add_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
WO_INLINE float max_lane(F a) {
    __m256 y = _mm256_max_ps(a.lo, a.hi);
    __m128 u = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    __m128 v = _mm_max_ps(u, _mm_movehl_ps(u, u));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

// The sums of one tile, lanes 0-7 over all k and then lanes 8-15: a half takes 12 accumulators, 3 tokens and a weight,
// which is all 16 registers, where whole lanes would spill.
#define WO_OWN_TILE
template <int T>
WO_INLINE void accumulate_half(const float* panel, int64_t n, const float* const* x, int first,
                               __m256 (*a)[kTileRows]) {
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kTileRows; ++r) a[t][r] = _mm256_setzero_ps();
    for (int64_t k = first; k < n; k += 16) {
        __m256 v[T];
        for (int t = 0; t < T; ++t) v[t] = _mm256_loadu_ps(x[t] + k);
        for (int r = 0; r < kTileRows; ++r) {
            __m256 w = _mm256_loadu_ps(panel + r * n + k);
            for (int t = 0; t < T; ++t) a[t][r] = _mm256_fmadd_ps(w, v[t], a[t][r]);
        }
    }
}
template <int T>
WO_INLINE void accumulate_tile(const float* panel, int64_t n, const float* const* x, F (*acc)[kTileRows]) {
    __m256 lo[T][kTileRows], hi[T][kTileRows];
    accumulate_half<T>(panel, n, x, 0, lo);
    accumulate_half<T>(panel, n, x, 8, hi);
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < kTileRows; ++r) acc[t][r] = {lo[t][r], hi[t][r]};
}

// Codebooks: d * (q - base) - m. There is no cheap 16-entry permute here, so `pick` computes the value.
struct Codebook2 {
    F d, m;
};
struct Codebook4 {
    F d, m;
    I base;
};
using Codebook5 = Codebook4;
struct CodebookTable {
    __m256 lo, hi;
};
WO_INLINE Codebook2 codebook2(float d, float m) { return {set1(d), set1(m)}; }
WO_INLINE Codebook4 codebook4(float d, int base) { return {set1(d), set1(0.0f), iset1(-base)}; }
WO_INLINE Codebook4 codebook4(float d, float m) { return {set1(d), set1(m), iset1(0)}; }
WO_INLINE Codebook5 codebook5(float d, int base) { return codebook4(d, base); }
WO_INLINE Codebook5 codebook5(float d, float m) { return codebook4(d, m); }
WO_INLINE CodebookTable codebook_table(float d, const float* values16) {
    F t = mul(set1(d), load(values16));
    return {t.lo, t.hi};
}
WO_INLINE F pick(Codebook2 c, I q) { return sub(mul(c.d, to_float(iand(q, iset1(3)))), c.m); }
WO_INLINE F value_of(Codebook4 c, I q) { return sub(mul(c.d, to_float(iadd(q, c.base))), c.m); }
WO_INLINE F pick(Codebook4 c, I q) { return value_of(c, iand(q, iset1(15))); }
WO_INLINE __m256 pick8(CodebookTable c, __m256i q) {
    __m256 third_bit = _mm256_castsi256_ps(_mm256_slli_epi32(q, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(c.lo, q), _mm256_permutevar8x32_ps(c.hi, q), third_bit);
}
WO_INLINE F pick(CodebookTable c, I q) { return {pick8(c, q.lo), pick8(c, q.hi)}; }
// The fifth bit of lane i is bit i of `high`.
WO_INLINE F pick(Codebook5 c, I q, uint32_t high) {
    return value_of(c, ior(iand(q, iset1(15)), iand(lanes_of_bits(high), iset1(16))));
}
// The fifth bit of lane i is bit `bit` of lane i of `high`.
WO_INLINE F pick(Codebook5 c, I q, I high, int bit) {
    return value_of(c, ior(iand(q, iset1(15)), shift_left(iand(shift_right(high, bit), iset1(1)), 4)));
}
