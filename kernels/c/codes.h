/* A register of 8-bit codes, four for each of LANES sums, or of as many 32-bit integers; what products of codes need. */

#include "int8.h"

/* Registers of floats that hold a group's values. */
enum { PARTS = GROUP / LANES };

INLINE int read_int(const int8_t *at) {
    int value;
    memcpy(&value, at, sizeof value);
    return value;
}

#ifdef __AVX512F__

typedef __m512i Codes;
#define VNNI __attribute__((target("avx512vnni")))

#define c_zero _mm512_setzero_si512
#define c_load(from) _mm512_load_si512((const void *)(from))
#define c_low_halves(both) _mm512_and_si512(both, _mm512_set1_epi8(15))
#define c_high_halves(both) c_low_halves(_mm512_srli_epi16(both, 4))
#define c_add _mm512_add_epi32
#define c_max _mm512_max_epi32
#define c_sum _mm512_reduce_add_epi32
#define c_most _mm512_reduce_max_epi32
#define c_to_floats _mm512_cvtepi32_ps
/* To the nearest. */
#define c_from_floats _mm512_cvtps_epi32
/* The bits of absolute values. */
#define c_magnitude(x) _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF))

/* A group's integers as 8 bits each, at most 127 and at least -128. */
INLINE void c_store(int8_t *to, const Codes *x) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(x[0]));
    _mm_storeu_si128((__m128i *)(to + 16), _mm512_cvtsepi32_epi8(x[1]));
}

/* Products of weights' codes with four of a row's at x, added up. dot4: codes of 0 to 15, eight of them between c_zero and
   c_total4. dot8: codes of 1 to 255 that stand for 128 less; begin with c_start8, of `Part.shift`. */
INLINE VNNI Codes dot4(Codes sum, Codes codes, const int8_t *x) {
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(read_int(x)));
}
#define c_total4(sum) (sum)
#define dot8 dot4
#define c_start8 _mm512_set1_epi32

#else

typedef __m256i Codes;
#define VNNI

#define c_zero _mm256_setzero_si256
#define c_load(from) _mm256_load_si256((const __m256i *)(from))
#define c_low_halves(both) _mm256_and_si256(both, _mm256_set1_epi8(15))
#define c_high_halves(both) c_low_halves(_mm256_srli_epi16(both, 4))
#define c_add _mm256_add_epi32
#define c_max _mm256_max_epi32
#define c_to_floats _mm256_cvtepi32_ps
#define c_from_floats _mm256_cvtps_epi32
#define c_magnitude(x) _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF))

INLINE int c_sum(Codes x) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

INLINE int c_most(Codes x) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

INLINE void c_store(int8_t *to, const Codes *x) {
    Codes all = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
    /* Packing goes by halves of a register. */
    all = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)to, all);
}

/* Compilers would make all products first and add them up later, for which there are no registers. */
#define NOW(sum) __asm__("" : "+x"(sum))

/* Pairs of products in 16 bits: eight of at most 2 * 15 * 128 fit. */
INLINE Codes dot4(Codes sum, Codes codes, const int8_t *x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(read_int(x))));
    NOW(sum);
    return sum;
}
#define c_total4(sum) _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
/* The left side of that instruction has no sign, so the right one takes it over: pairs of at most 2 * 127 * 128 fit. */
INLINE Codes dot8(Codes sum, Codes codes, const int8_t *x) {
    Codes weight = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    Codes row = _mm256_sign_epi8(_mm256_set1_epi32(read_int(x)), weight);
    sum = _mm256_add_epi32(sum, c_total4(_mm256_maddubs_epi16(_mm256_abs_epi8(weight), row)));
    NOW(sum);
    return sum;
}
#define c_start8(shift) c_zero()

#endif
