/* Drafts of a draft head, one behind the other (draft_native.py; the head: engine/models/draft_head.py). For few rows,
   twenty calls of torch for each draft took many times as long as what they compute. */

#include "int8.h"

/* Of the head's two layers: for integers, or, where that is null, for floats. */
typedef struct {
    const Int8Weight *integers;
    const FloatWeight *floats;
} Layer;

typedef struct {
    Layer inputs, outputs;     /* [hidden, 2 * hidden] and [hidden, hidden] */
    const float *words, *head; /* [vocab, hidden] */
    long vocab, hidden;
} DraftHead;

/* What `native_draft` returns. */
enum { DONE, NO_MEMORY, NO_SUCH_ID };

/* Returns 1 without memory. */
static int multiply(const Layer *by, const float *x, long rows, long in, long out, float *y) {
    if (by->integers) return native_int8_linear(x, in, rows, by->integers, 0, 0, 0, 0, y, out);
    native_linear(x, in, rows, by->floats->packed, by->floats->format, in, out, 0, y, out, 0);
    return 0;
}

static void to_unit_rms(const float *x, long size, float *to) {
    Floats squares = v_zero();
    for (long i = 0; i < size; i += LANES) {
        Floats value = v_load_some(lanes_before(size - i), x + i);
        squares = v_fma(value, value, squares);
    }
    float mean = v_sum(squares) / (float)size;
    Floats scale = v_all(1.0f / sqrtf(mean < 1e-12f ? 1e-12f : mean));
    for (long i = 0; i < size; i += LANES) {
        Mask lanes = lanes_before(size - i);
        v_store_some(to + i, lanes, v_mul(v_load_some(lanes, x + i), scale));
    }
}

/* Products of x with the rows `ids` of `table`, [count]. */
static void score(const float *x, const float *table, long size, const int64_t *ids, long count, float *scores) {
    for (long k = 0; k < count; k += 4) {
        int some = count - k < 4 ? (int)(count - k) : 4;
        const float *row[4];
        Floats sum[4];
        UNROLL for (int j = 0; j < 4; j++) row[j] = table + ids[j < some ? k + j : k] * size, sum[j] = v_zero();
        for (long i = 0; i < size; i += LANES) {
            Mask lanes = lanes_before(size - i);
            Floats value = v_load_some(lanes, x + i);
            UNROLL for (int j = 0; j < 4; j++) sum[j] = v_fma(value, v_load_some(lanes, row[j] + i), sum[j]);
        }
        store_first(scores + k, some, sums_of(sum[0], sum[1], sum[2], sum[3]));
    }
}

/* The place of the first greatest score, and its probability among them; 0 where that is no number. */
static long choose(const float *scores, long count, float *probability) {
    long best = 0;
    for (long k = 1; k < count; k++) best = scores[k] > scores[best] ? k : best;
    Floats total = v_zero(), most = v_all(scores[best]);
    for (long k = 0; k < count; k += LANES) {
        Mask lanes = lanes_before(count - k);
        total = v_add_some(lanes, total, exponential(v_sub(v_load_some(lanes, scores + k), most)));
    }
    float found = 1.0f / v_sum(total);
    *probability = found <= 1.0f ? found : 0.0f;
    return best;
}

/* Drafts for `rows` rows of `masks` masks each. normed: [rows, masks, hidden]; top: [rows, masks, count], candidates;
   covered: [rows, masks], their probability; last: [rows], ids that stand before the first ones. token, confidence:
   [rows, masks]. */
int native_draft(const DraftHead *head, const float *normed, const int64_t *top, const float *covered, long rows,
                 long masks, long count, const int64_t *last, int64_t *token, float *confidence) {
    long size = head->hidden;
    for (long r = 0; r < rows; r++)
        if (last[r] < 0 || last[r] >= head->vocab) return NO_SUCH_ID;
    float *beside = malloc((size_t)(4 * rows * size + 1) * sizeof *beside);
    if (!beside) return NO_MEMORY;
    float *between = beside + 2 * rows * size, *refined = between + rows * size;
    int failed = 0;
    for (long m = 0; m < masks && !failed; m++) {
        for (long r = 0; r < rows; r++) {
            long at = r * masks + m;
            memcpy(beside + 2 * r * size, normed + at * size, (size_t)size * sizeof *beside);
            to_unit_rms(head->words + (m ? token[at - 1] : last[r]) * size, size, beside + (2 * r + 1) * size);
        }
        failed = multiply(&head->inputs, beside, rows, 2 * size, size, between);
        for (long i = 0; i < rows * size; i += LANES) {
            Mask lanes = lanes_before(rows * size - i);
            v_store_some(between + i, lanes, silu(v_load_some(lanes, between + i)));
        }
        failed = failed || multiply(&head->outputs, between, rows, size, size, refined);
#pragma omp parallel for if (rows > 1 && rows * count * size >= PARALLEL / 4)
        for (long r = 0; r < rows; r++) {
            long at = r * masks + m;
            float scores[count], probability, *x = refined + r * size;
            for (long i = 0; i < size; i += LANES) {
                Mask lanes = lanes_before(size - i);
                v_store_some(x + i, lanes, v_add(v_load_some(lanes, x + i), v_load_some(lanes, normed + at * size + i)));
            }
            score(x, head->head, size, top + at * count, count, scores);
            token[at] = top[at * count + choose(scores, count, &probability)];
            confidence[at] = probability * covered[at];
        }
    }
    free(beside);
    return failed ? NO_MEMORY : DONE;
}
