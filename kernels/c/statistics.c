/* What statistics_native.py asks of a vocabulary's logits: the best one, and the sum of their weights. */

#include "native.h"

/* The first greatest of `width` values, NaN before all others; returns its place. */
static long first_best(const float *x, long width) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    __mmask16 strange = 0;
    for (long i = 0; i < width; i += 16) {
        __m512 value = _mm512_mask_loadu_ps(most, lanes_before(width - i), x + i);
        strange |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, value);
    }
    __m512 best = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long i = 0; i < width; i += 16) {
        __mmask16 lanes = lanes_before(width - i);
        __m512 value = _mm512_maskz_loadu_ps(lanes, x + i);
        __mmask16 found = strange ? _mm512_mask_cmp_ps_mask(lanes, value, value, _CMP_UNORD_Q)
                                  : _mm512_mask_cmp_ps_mask(lanes, value, best, _CMP_EQ_OQ);
        if (found) return i + __builtin_ctz(found);
    }
    return 0;
}

/* logits: [rows, width]; scale: [rows], or null for ones. best: [rows], the place of the first greatest logit; maximum:
   [rows], that one scaled, or `lowest` if it is less; total: [rows], the sum of exp(logit * scale - maximum). */
void native_vocabulary(const float *logits, const float *scale, long rows, long width, float lowest, int64_t *best,
                       float *maximum, float *total) {
#pragma omp parallel for if (rows > 1 && rows * width >= PARALLEL / 16)
    for (long r = 0; r < rows; r++) {
        const float *x = logits + r * width;
        best[r] = first_best(x, width);
        float by = scale ? scale[r] : 1.0f, value = x[best[r]] * by;
        maximum[r] = value < lowest ? lowest : value;
        __m512 factor = _mm512_set1_ps(by), most = _mm512_set1_ps(maximum[r]), one = _mm512_setzero_ps(), two = one;
        for (long i = 0; i < width; i += 32) {
            __mmask16 low = lanes_before(width - i), high = i + 16 < width ? lanes_before(width - i - 16) : 0;
            __m512 first = _mm512_sub_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(low, x + i), factor), most);
            __m512 second = _mm512_sub_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(high, x + i + 16), factor), most);
            one = _mm512_mask_add_ps(one, low, one, exponential(first));
            two = _mm512_mask_add_ps(two, high, two, exponential(second));
        }
        total[r] = value != value ? value : _mm512_reduce_add_ps(_mm512_add_ps(one, two));
    }
}
