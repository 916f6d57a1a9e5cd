// What the integer products need of AVX-512 beside simd_avx512.h: bytes and words in four groups of 16 bytes.
//
// `I` holds the same 16 bytes of four rows of weights (rows i, i + 4, i + 8, i + 12, one in each group), or one int32
// for each of 16 rows. With WO_VNNI `dot16` is one instruction. Included inside the namespace of its instruction set.
#pragma once

// 16 bytes each from p, p + stride, p + 2 stride and p + 3 stride.
WO_INLINE I load_groups(const uint8_t* p, int64_t stride) {
    I v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + stride)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + 2 * stride)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + 3 * stride)), 3);
}
// The same 16 bytes in every group.
WO_INLINE I load_everywhere(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
WO_INLINE void store_ints(void* p, I a) { _mm512_storeu_si512(p, a); }

WO_INLINE I zero_ints() { return _mm512_setzero_si512(); }
WO_INLINE I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
WO_INLINE I imax(I a, I b) { return _mm512_max_epi32(a, b); }
WO_INLINE I shift_right_signed(I a, int n) { return _mm512_srai_epi32(a, (unsigned)n); }
WO_INLINE I words_right(I a, int n) { return _mm512_srli_epi16(a, (unsigned)n); }
WO_INLINE I words_right_signed(I a, int n) { return _mm512_srai_epi16(a, (unsigned)n); }
WO_INLINE I words_left(I a, int n) { return _mm512_slli_epi16(a, (unsigned)n); }
WO_INLINE I bits_of(F a) { return _mm512_castps_si512(a); }
WO_INLINE int max_int(I a) { return _mm512_reduce_max_epi32(a); }
WO_INLINE int sum_ints(I a) { return _mm512_reduce_add_epi32(a); }

// acc + a0 * b0 + a1 * b1 of each pair of int16.
WO_INLINE I dot16(I acc, I a, I b) {
#ifdef WO_VNNI
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}

// Within each group: int32s 0 and 1 (low) or 2 and 3 (high) of a and b in turns; likewise halves of 8 bytes.
WO_INLINE I interleave_low(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
WO_INLINE I interleave_high(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
WO_INLINE I join_low(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
WO_INLINE I join_high(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
// Bytes of each group by their numbers in the group of `order`.
WO_INLINE I shuffle_bytes(I a, I order) { return _mm512_shuffle_epi8(a, order); }
// 16 more where a byte of `bits` has a bit of `mask` (one bit in each byte).
WO_INLINE I add_fifth_bit(I q, I bits, I mask) {
    return _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, mask), q, _mm512_set1_epi8(16));
}
// The float16 in the low half of each int32.
WO_INLINE F low_f16(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }

// 16 int32 that fit as int16: those of even lanes, then those of odd lanes.
WO_INLINE void store_even_odd(int16_t* p, I a) {
    const I order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(order, a)));
}

// One register of the processor, for the products of many tokens, and how many of those share a tile.
constexpr int kNativeLanes = 16, kEncodedTokens = 12;
using NativeF = __m512;
using NativeI = __m512i;
WO_INLINE NativeI native_zero_ints() { return _mm512_setzero_si512(); }
WO_INLINE NativeF native_zero() { return _mm512_setzero_ps(); }
WO_INLINE NativeI native_load_ints(const void* p) { return _mm512_loadu_si512(p); }
WO_INLINE NativeF native_load(const float* p) { return _mm512_loadu_ps(p); }
WO_INLINE void native_store(float* p, NativeF a) { _mm512_storeu_ps(p, a); }
WO_INLINE NativeI native_pair(const uint8_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
}
WO_INLINE NativeI native_dot16(NativeI acc, NativeI a, NativeI b) { return dot16(acc, a, b); }
WO_INLINE NativeI native_minus(NativeI a, int32_t x) { return _mm512_sub_epi32(a, _mm512_set1_epi32(x)); }
WO_INLINE NativeF native_scaled(NativeI a, float s) { return _mm512_mul_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(s)); }
WO_INLINE NativeF native_fma(NativeF a, NativeF b, NativeF c) { return _mm512_fmadd_ps(a, b, c); }
WO_INLINE NativeF native_fma(NativeF a, float b, NativeF c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c); }
