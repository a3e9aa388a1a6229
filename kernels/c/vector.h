/* A register of floats: sixteen with AVX-512, eight with AVX2. What is written with it computes the same lane by lane. */

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__

enum { LANES = 16 };
typedef __m512 Floats;
typedef __mmask16 Mask; /* some of a register's lanes */

#define v_zero _mm512_setzero_ps
#define v_all _mm512_set1_ps
#define v_load _mm512_loadu_ps
#define v_load_aligned _mm512_load_ps
#define v_load_some _mm512_maskz_loadu_ps
#define v_store _mm512_storeu_ps
#define v_store_some _mm512_mask_storeu_ps
#define v_add _mm512_add_ps
#define v_sub _mm512_sub_ps
#define v_mul _mm512_mul_ps
#define v_div _mm512_div_ps
#define v_max _mm512_max_ps
#define v_min _mm512_min_ps
#define v_fma _mm512_fmadd_ps
#define v_fnma _mm512_fnmadd_ps
#define v_sum _mm512_reduce_add_ps
#define v_most _mm512_reduce_max_ps
#define v_from_bytes(bytes) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(bytes))))
#define v_from_half(bits) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(bits)))
/* To the nearest float16. */
#define v_rounded(x) _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define v_nearest(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
/* x * 2^n of a whole n. */
#define v_scale _mm512_scalef_ps
/* x, and y in the lanes that are not of the mask; x + y in those that are, x in the others. */
#define v_load_or(mask, from, y) _mm512_mask_loadu_ps(y, mask, from)
#define v_add_some(mask, x, y) _mm512_mask_add_ps(x, mask, x, y)
/* The lanes where two are equal, where the first is greater, and where one is NaN, as bits. */
#define v_equal(x, y) _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ)
#define v_greater(x, y) _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ)
#define v_strange(x) _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q)

/* The lanes of a vector that hold something, of `count` values that are left. */
INLINE Mask lanes_before(long count) { return (Mask)(count >= 16 ? 0xFFFF : (1 << count) - 1); }
INLINE unsigned lane_bits(Mask mask) { return mask; }

/* The first `count` of four values, the others zero; and they alone stored. */
INLINE __m128 load_first(int count, const float *from) { return _mm_maskz_loadu_ps((__mmask8)((1 << count) - 1), from); }
INLINE void store_first(float *to, int count, __m128 x) { _mm_mask_storeu_ps(to, (__mmask8)((1 << count) - 1), x); }

/* The sums of four accumulators. */
INLINE __m128 sums_of(Floats a, Floats b, Floats c, Floats d) {
    Floats ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    Floats cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    Floats all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#else

enum { LANES = 8 };
typedef __m256 Floats;
typedef __m256i Mask;

#define v_zero _mm256_setzero_ps
#define v_all _mm256_set1_ps
#define v_load _mm256_loadu_ps
#define v_load_aligned _mm256_load_ps
#define v_load_some(mask, from) _mm256_maskload_ps(from, mask)
#define v_store _mm256_storeu_ps
#define v_add _mm256_add_ps
#define v_sub _mm256_sub_ps
#define v_mul _mm256_mul_ps
#define v_div _mm256_div_ps
#define v_max _mm256_max_ps
#define v_min _mm256_min_ps
#define v_fma _mm256_fmadd_ps
#define v_fnma _mm256_fnmadd_ps
#define v_from_bytes(bytes) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(bytes))))
#define v_from_half(bits) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(bits)))
#define v_rounded(x) _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define v_nearest(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define v_load_or(mask, from, y) _mm256_blendv_ps(y, _mm256_maskload_ps(from, mask), _mm256_castsi256_ps(mask))
#define v_add_some(mask, x, y) _mm256_blendv_ps(x, _mm256_add_ps(x, y), _mm256_castsi256_ps(mask))
#define v_equal(x, y) (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_EQ_OQ))
#define v_greater(x, y) (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ))
#define v_strange(x) (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))

INLINE Mask lanes_before(long count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count > 8 ? 8 : (int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE unsigned lane_bits(Mask mask) { return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(mask)); }

/* Some processors take long over a masked store, so few are made. */
INLINE void v_store_some(float *to, Mask mask, Floats x) {
    if (lane_bits(mask) == 0xFF)
        _mm256_storeu_ps(to, x);
    else
        _mm256_maskstore_ps(to, mask, x);
}

INLINE __m128i four_before(int count) { return _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3)); }
INLINE __m128 load_first(int count, const float *from) {
    return count == 4 ? _mm_loadu_ps(from) : count == 1 ? _mm_load_ss(from) : _mm_maskload_ps(from, four_before(count));
}
INLINE void store_first(float *to, int count, __m128 x) {
    if (count == 4)
        _mm_storeu_ps(to, x);
    else if (count == 2)
        _mm_storel_pi((__m64 *)to, x);
    else if (count == 1)
        _mm_store_ss(to, x);
    else
        _mm_maskstore_ps(to, four_before(count), x);
}

INLINE Floats v_power(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }

/* In two steps, as 2^n itself may be no number. */
INLINE Floats v_scale(Floats x, Floats n) {
    __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, v_power(half)), v_power(_mm256_sub_epi32(all, half)));
}

INLINE __m128 sums_of(Floats a, Floats b, Floats c, Floats d) {
    Floats all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

INLINE float v_sum(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE float v_most(Floats x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#endif

/* e to the x, within two units of the last place: 2^n * p(r), r in [-ln 2 / 2, ln 2 / 2] (Cephes' polynomial). */
INLINE Floats exponential(Floats x) {
    x = v_min(v_all(104.0f), v_max(v_all(-104.0f), x));
    Floats n = v_nearest(v_mul(x, v_all(1.44269504f)));
    Floats r = v_fnma(n, v_all(0.693359375f), x);
    r = v_fnma(n, v_all(-2.12194440e-4f), r);
    Floats p = v_all(1.9875691500e-4f);
    p = v_fma(p, r, v_all(1.3981999507e-3f));
    p = v_fma(p, r, v_all(8.3334519073e-3f));
    p = v_fma(p, r, v_all(4.1665795894e-2f));
    p = v_fma(p, r, v_all(1.6666665459e-1f));
    p = v_fma(p, r, v_all(5.0000001201e-1f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_all(1.0f)));
    return v_scale(p, n);
}

INLINE Floats silu(Floats x) { return v_div(x, v_add(v_all(1.0f), exponential(v_sub(v_zero(), x)))); }
