/* What statistics_native.py asks of a vocabulary's logits: the best ones, and the sum of their weights. */

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

/* The sum of exp(x * factor - most). */
static float weight_of(const float *x, long width, float factor, float most) {
    Floats by = v_all(factor), from = v_all(most), one = v_zero(), two = one;
    for (long i = 0; i < width; i += 2 * LANES) {
        Mask low = lanes_before(width - i), high = lanes_before(i + LANES < width ? width - i - LANES : 0);
        Floats first = v_sub(v_mul(v_load_some(low, x + i), by), from);
        Floats second = v_sub(v_mul(v_load_some(high, x + i + LANES), by), from);
        one = v_add_some(low, one, exponential(first));
        two = v_add_some(high, two, exponential(second));
    }
    return v_sum(v_add(one, two));
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
        total[r] = value != value ? value : weight_of(x, width, by, maximum[r]);
    }
}

/* Put x, of the place `id`, into the `held` greatest values so far, which are sorted; at the end those before it are as
   great. `held` is less than their room, or the last one gives way. */
static void insert(float x, int64_t id, long held, float *values, int64_t *ids) {
    long at = held;
    for (; at > 0 && values[at - 1] < x; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = x, ids[at] = id;
}

/* The `count` greatest of `width` values, at most as many as there are; NaN counts as the least. */
static void find_top(const float *x, long width, long count, float *values, int64_t *ids) {
    for (long i = 0; i < count; i++) insert(x[i] == x[i] ? x[i] : -INFINITY, i, i, values, ids);
    Floats least = v_all(values[count - 1]);
    for (long i = count; i < width; i += LANES) {
        unsigned found = v_greater(v_load_or(lanes_before(width - i), x + i, v_all(-INFINITY)), least);
        for (; found; found &= found - 1) {
            long at = i + __builtin_ctz(found);
            if (x[at] > values[count - 1]) insert(x[at], at, count - 1, values, ids);
        }
        least = v_all(values[count - 1]);
    }
}

/* The `count` (at most width) greatest logits of each row, best first, the lower place first where they are equal: ids,
   [rows, count]. covered: [rows], their probability; 0 where that is no number. */
void native_top(const float *logits, long rows, long width, long count, int64_t *ids, float *covered) {
#pragma omp parallel for if (rows > 1 && rows * width >= PARALLEL / 16)
    for (long r = 0; r < rows; r++) {
        const float *x = logits + r * width;
        float values[count];
        find_top(x, width, count, values, ids + r * count);
        float share = weight_of(values, count, 1.0f, values[0]) / weight_of(x, width, 1.0f, values[0]);
        covered[r] = share >= 0.0f ? share : 0.0f;
    }
}
