/* What statistics_native.py asks of a vocabulary's logits: the best one, and the sum of their weights. */

#include "native.h"

/* The first greatest of `width` values, NaN before all others; returns its place. */
static long first_best(const float *x, long width) {
    Floats most = v_all(-INFINITY);
    unsigned strange = 0;
    for (long i = 0; i < width; i += LANES) {
        Floats value = v_load_or(lanes_before(width - i), x + i, most);
        strange |= v_strange(value);
        most = v_max(most, value);
    }
    Floats best = v_all(v_most(most));
    for (long i = 0; i < width; i += LANES) {
        Mask lanes = lanes_before(width - i);
        Floats value = v_load_some(lanes, x + i);
        unsigned found = lane_bits(lanes) & (strange ? v_strange(value) : v_equal(value, best));
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
        Floats factor = v_all(by), most = v_all(maximum[r]), one = v_zero(), two = one;
        for (long i = 0; i < width; i += 2 * LANES) {
            Mask low = lanes_before(width - i), high = lanes_before(i + LANES < width ? width - i - LANES : 0);
            Floats first = v_sub(v_mul(v_load_some(low, x + i), factor), most);
            Floats second = v_sub(v_mul(v_load_some(high, x + i + LANES), factor), most);
            one = v_add_some(low, one, exponential(first));
            two = v_add_some(high, two, exponential(second));
        }
        total[r] = value != value ? value : v_sum(v_add(one, two));
    }
}
