/* Staircase attention (attention.py): a query attends to the slots [0, a) and [b, c) of its sequence, in this order.

   Nothing is computed of slots that a query does not see, and a query's result depends on no other, bit for bit. */

#include "native.h"
#include <stdlib.h>

/* Query heads, of those that share keys, that run together; slots whose scores are found together. */
enum { HEADS = 4, SLOTS = 4, VECTORS = 4 };

typedef struct {
    const float *cache; /* of the head: slot 0 of page 0 */
    const int32_t *pages;
    long page_size, stride; /* slots of a page; values from slot to slot */
} Store;

static inline const float *at(const Store *store, long slot) {
    return store->cache + (store->pages[slot / store->page_size] * store->page_size + slot % store->page_size) * store->stride;
}

/* Scores of `heads` queries ([heads, size]) with the slots [first, last), to `scores` of each head, `room` apart. */
static inline __attribute__((always_inline)) void score(const int heads, const float *q, long size, const Store *keys,
                                                        long first, long last, float scale, float *scores, long room) {
    for (long slot = first; slot < last; slot += SLOTS, scores += SLOTS) {
        long count = last - slot < SLOTS ? last - slot : SLOTS;
        const float *key[SLOTS];
        for (int s = 0; s < SLOTS; s++) key[s] = at(keys, slot + (s < count ? s : count - 1));
        __m512 sum[HEADS][SLOTS];
        UNROLL for (int h = 0; h < heads; h++) {
            UNROLL for (int s = 0; s < SLOTS; s++) sum[h][s] = _mm512_setzero_ps();
        }
        for (long i = 0; i < size; i += 16) {
            __m512 values[SLOTS];
            UNROLL for (int s = 0; s < SLOTS; s++) values[s] = _mm512_loadu_ps(key[s] + i);
            UNROLL for (int h = 0; h < heads; h++) {
                __m512 query = _mm512_loadu_ps(q + h * size + i);
                UNROLL for (int s = 0; s < SLOTS; s++) sum[h][s] = _mm512_fmadd_ps(query, values[s], sum[h][s]);
            }
        }
        UNROLL for (int h = 0; h < heads; h++) {
            __m128 found = _mm_mul_ps(sums_of(sum[h][0], sum[h][1], sum[h][2], sum[h][3]), _mm_set1_ps(scale));
            _mm_mask_storeu_ps(scores + h * room, (__mmask8)((1 << count) - 1), found);
        }
    }
}

/* Turn `count` scores into weights; returns their sum. */
static float weigh(float *scores, long count) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (long i = 0; i < count; i += 16)
        most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, lanes_before(count - i), scores + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long i = 0; i < count; i += 16) {
        __mmask16 lanes = lanes_before(count - i);
        __m512 weight = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + i), most));
        total = _mm512_mask_add_ps(total, lanes, total, weight);
        _mm512_mask_storeu_ps(scores + i, lanes, weight);
    }
    return _mm512_reduce_add_ps(total);
}

/* Values of the slots [first, last) by their weights, added to out ([heads, size]), 16 * VECTORS columns at a time. */
static inline __attribute__((always_inline)) void mix(const int heads, long size, const Store *values, long first,
                                                      long last, const float *weights, long room, float *out) {
    for (long column = 0; column < size; column += 16 * VECTORS) {
        __mmask16 lanes[VECTORS];
        __m512 sum[HEADS][VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) {
            lanes[v] = column + 16 * v < size ? 0xFFFF : 0;
            UNROLL for (int h = 0; h < heads; h++)
                sum[h][v] = _mm512_maskz_loadu_ps(lanes[v], out + h * size + column + 16 * v);
        }
        for (long slot = first; slot < last; slot++) {
            const float *from = at(values, slot) + column;
            __m512 value[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) value[v] = _mm512_maskz_loadu_ps(lanes[v], from + 16 * v);
            UNROLL for (int h = 0; h < heads; h++) {
                __m512 weight = _mm512_set1_ps(weights[h * room + slot - first]);
                UNROLL for (int v = 0; v < VECTORS; v++) sum[h][v] = _mm512_fmadd_ps(weight, value[v], sum[h][v]);
            }
        }
        UNROLL for (int h = 0; h < heads; h++) {
            UNROLL for (int v = 0; v < VECTORS; v++)
                _mm512_mask_storeu_ps(out + h * size + column + 16 * v, lanes[v], sum[h][v]);
        }
    }
}

static inline __attribute__((always_inline)) void attend(const int heads, const float *q, long size, const Store *keys,
                                                         const Store *values, long a, long b, long c, float scale,
                                                         float *scores, long room, float *out) {
    long count = a + c - b;
    memset(out, 0, (size_t)(heads * size) * sizeof *out);
    if (!count) return;
    score(heads, q, size, keys, 0, a, scale, scores, room);
    score(heads, q, size, keys, b, c, scale, scores + a, room);
    float total[HEADS];
    for (int h = 0; h < heads; h++) total[h] = weigh(scores + h * room, count);
    mix(heads, size, values, 0, a, scores, room, out);
    mix(heads, size, values, b, c, scores + a, room, out);
    for (int h = 0; h < heads; h++)
        for (long i = 0; i < size; i++) out[h * size + i] /= total[h];
}

/* q, out: [tokens, heads, size], size a multiple of 16; caches: [pages, page_size, kv_heads, size]; page_table: [rows,
   table_stride]; query_start: [rows + 1]; visible, scratch_start, scratch_end: [tokens], the latter two may be null.
   most: a bound of the slots that a query sees. Tokens of no row get zeros. Returns 0, or 1 where memory ran out. */
int native_attention(const float *q, const float *k_cache, const float *v_cache, long page_size, long kv_heads,
                     long heads, long size, const int32_t *page_table, long table_stride, const int32_t *query_start,
                     long rows, long tokens, const int32_t *visible, const int32_t *scratch_start,
                     const int32_t *scratch_end, long most, float scale, float *out) {
    long group = heads / kv_heads, room = (most + 15) / 16 * 16, failed = 0;
#pragma omp parallel if (tokens * heads * size * most >= PARALLEL)
    {
        float *scores = aligned_alloc(64, (size_t)(room * HEADS) * sizeof *scores + 64);
#pragma omp for schedule(static, 1) collapse(2) reduction(|| : failed)
        for (long token = 0; token < tokens; token++) {
            for (long head = 0; head < kv_heads; head++) {
                if (!scores) {
                    failed = 1;
                    continue;
                }
                long row = 0;
                while (row < rows && query_start[row + 1] <= token) row++;
                long a = row < rows ? visible[token] : 0, b = 0, c = 0;
                if (row < rows && scratch_end && scratch_end[token] > scratch_start[token])
                    b = scratch_start[token], c = scratch_end[token];
                const int32_t *pages = page_table + (row < rows ? row : 0) * table_stride;
                Store keys = {k_cache + head * size, pages, page_size, kv_heads * size};
                Store values = {v_cache + head * size, pages, page_size, kv_heads * size};
                for (long first = 0; first < group; first += HEADS) {
                    long place = (token * heads + head * group + first) * size;
#define ATTEND(N) attend(N, q + place, size, &keys, &values, a, b, c, scale, scores, room, out + place)
                    switch (group - first) {
                    case 1: ATTEND(1); break;
                    case 2: ATTEND(2); break;
                    case 3: ATTEND(3); break;
                    default: ATTEND(4);
                    }
                }
            }
        }
        free(scores);
    }
    return (int)failed;
}
