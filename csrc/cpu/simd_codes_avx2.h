// What the integer products need of AVX2 beside simd_avx2.h: the names of simd_codes_avx512.h, with the same results.
//
// Groups 0 and 1 of 16 bytes are in `lo`, 2 and 3 in `hi`. Included inside the namespace of its instruction set.
#pragma once

WO_INLINE __m256i load_two_groups(const uint8_t* p, int64_t stride) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                   _mm_loadu_si128((const __m128i*)(p + stride)), 1);
}
WO_INLINE I load_groups(const uint8_t* p, int64_t stride) {
    return {load_two_groups(p, stride), load_two_groups(p + 2 * stride, stride)};
}
WO_INLINE I load_everywhere(const void* p) {
    const __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return {v, v};
}
WO_INLINE void store_ints(void* p, I a) {
    _mm256_storeu_si256((__m256i*)p, a.lo);
    _mm256_storeu_si256((__m256i*)p + 1, a.hi);
}

WO_INLINE I zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
WO_INLINE I isub(I a, I b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
WO_INLINE I imax(I a, I b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
WO_INLINE I shift_right_signed(I a, int n) { return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)}; }
WO_INLINE I words_right(I a, int n) { return {_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)}; }
WO_INLINE I words_right_signed(I a, int n) { return {_mm256_srai_epi16(a.lo, n), _mm256_srai_epi16(a.hi, n)}; }
WO_INLINE I words_left(I a, int n) { return {_mm256_slli_epi16(a.lo, n), _mm256_slli_epi16(a.hi, n)}; }
WO_INLINE I bits_of(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
WO_INLINE int max_int(I a) {
    __m256i y = _mm256_max_epi32(a.lo, a.hi);
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}
WO_INLINE int sum_ints(I a) {
    __m256i y = _mm256_add_epi32(a.lo, a.hi);
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}

WO_INLINE I dot16(I acc, I a, I b) {
    return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, b.lo)),
            _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, b.hi))};
}

WO_INLINE I interleave_low(I a, I b) { return {_mm256_unpacklo_epi32(a.lo, b.lo), _mm256_unpacklo_epi32(a.hi, b.hi)}; }
WO_INLINE I interleave_high(I a, I b) { return {_mm256_unpackhi_epi32(a.lo, b.lo), _mm256_unpackhi_epi32(a.hi, b.hi)}; }
WO_INLINE I join_low(I a, I b) { return {_mm256_unpacklo_epi64(a.lo, b.lo), _mm256_unpacklo_epi64(a.hi, b.hi)}; }
WO_INLINE I join_high(I a, I b) { return {_mm256_unpackhi_epi64(a.lo, b.lo), _mm256_unpackhi_epi64(a.hi, b.hi)}; }
WO_INLINE I shuffle_bytes(I a, I order) {
    return {_mm256_shuffle_epi8(a.lo, order.lo), _mm256_shuffle_epi8(a.hi, order.hi)};
}
WO_INLINE __m256i add_fifth_bit(__m256i q, __m256i bits, __m256i mask) {
    __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, mask), mask);
    return _mm256_or_si256(q, _mm256_and_si256(set, _mm256_set1_epi8(16)));
}
WO_INLINE I add_fifth_bit(I q, I bits, I mask) {
    return {add_fifth_bit(q.lo, bits.lo, mask.lo), add_fifth_bit(q.hi, bits.hi, mask.hi)};
}
WO_INLINE F low_f16(I a) {
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, low), _mm256_and_si256(a.hi, low));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1))};
}

WO_INLINE void store_even_odd(int16_t* p, I a) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    __m256i words =
        _mm256_packs_epi32(_mm256_permutevar8x32_epi32(a.lo, order), _mm256_permutevar8x32_epi32(a.hi, order));
    _mm256_storeu_si256((__m256i*)p, words);
}

constexpr int kNativeLanes = 8, kEncodedTokens = 6;
using NativeF = __m256;
using NativeI = __m256i;
WO_INLINE NativeI native_zero_ints() { return _mm256_setzero_si256(); }
WO_INLINE NativeF native_zero() { return _mm256_setzero_ps(); }
WO_INLINE NativeI native_load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
WO_INLINE NativeF native_load(const float* p) { return _mm256_loadu_ps(p); }
WO_INLINE void native_store(float* p, NativeF a) { _mm256_storeu_ps(p, a); }
WO_INLINE NativeI native_pair(const uint8_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm256_set1_epi32(pair);
}
WO_INLINE NativeI native_dot16(NativeI acc, NativeI a, NativeI b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}
WO_INLINE NativeI native_minus(NativeI a, int32_t x) { return _mm256_sub_epi32(a, _mm256_set1_epi32(x)); }
WO_INLINE NativeF native_scaled(NativeI a, float s) { return _mm256_mul_ps(_mm256_cvtepi32_ps(a), _mm256_set1_ps(s)); }
WO_INLINE NativeF native_fma(NativeF a, NativeF b, NativeF c) { return _mm256_fmadd_ps(a, b, c); }
WO_INLINE NativeF native_fma(NativeF a, float b, NativeF c) { return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c); }
