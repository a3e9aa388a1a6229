/* What the files of this folder share. They are compiled together on the machine that runs them (`native.py`). */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Multiplications below which one thread is as fast as several: some twenty microseconds. */
enum { PARALLEL = 1 << 20 };

static inline float read_float(const void *at) {
    float value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* The lanes of a vector that hold something, of `count` values that are left. */
static inline __mmask16 lanes_before(long count) { return (__mmask16)(count >= 16 ? 0xFFFF : (1 << count) - 1); }

/* The sums of four accumulators. */
static inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Before a loop over a small constant: what it indexes then stays in registers. */
#define UNROLL _Pragma("GCC unroll 16")

/* e to the x, within two units of the last place: 2^n * p(r), r in [-ln 2 / 2, ln 2 / 2] (Cephes' polynomial). */
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(104.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* The kernels that are used by another file, each defined in its own. */
void native_rms_norm(const float *x, const float *residual, long rows, long size, const float *weight, float eps,
                     float *total, float *out);
void native_silu_and_mul(const float *gate_up, long rows, long size, float *out);
void native_rope(const float *q, long q_stride, const float *k, long k_stride, const float *v, long v_stride,
                 const float *table, long half, const int32_t *positions, const int32_t *slots, long tokens,
                 long heads, long kv_heads, long size, float *k_cache, float *v_cache, float *out);
int native_attention(const float *q, const float *k_cache, const float *v_cache, long page_size, long kv_heads,
                     long heads, long size, const int32_t *page_table, long table_stride, const int32_t *query_start,
                     long rows, long tokens, const int32_t *visible, const int32_t *scratch_start,
                     const int32_t *scratch_end, long most, float scale, float *out);
