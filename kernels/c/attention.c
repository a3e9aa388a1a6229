/* Staircase attention (attention.py): a query attends to the slots [0, a) and [b, c) of its sequence, in this order.

   Nothing is computed of slots that a query does not see, and a query's result depends on no other, bit for bit. */

#include "native.h"

/* Query heads, of those that share keys, that run together, as many as there are registers for; slots whose scores are
   found together; registers of a head that are mixed together; queries of a block; slots of a tile. */
enum { HEADS = LANES == 16 ? 4 : 3, SLOTS = 4, VECTORS = 4, QUERIES = 8, TILE = 64 };

typedef struct {
    const float *cache; /* of the head: slot 0 of page 0 */
    const int32_t *pages;
    long stride; /* values from slot to slot */
    int shift;   /* a page has 1 << shift slots */
} Store;

static inline const float *at(const Store *store, long slot) {
    long within = slot & ((1L << store->shift) - 1);
    return store->cache + (((long)store->pages[slot >> store->shift] << store->shift) + within) * store->stride;
}

/* Scores of `heads` queries ([heads, size]) with the slots [first, last), to `scores` of each head, `room` apart. */
INLINE void score(const int heads, const float *q, long size, const Store *keys,
                                                        long first, long last, float scale, float *scores, long room) {
    for (long slot = first; slot < last; slot += SLOTS, scores += SLOTS) {
        long count = last - slot < SLOTS ? last - slot : SLOTS;
        const float *key[SLOTS];
        for (int s = 0; s < SLOTS; s++) key[s] = at(keys, slot + (s < count ? s : count - 1));
        Floats sum[HEADS][SLOTS];
        UNROLL for (int h = 0; h < heads; h++) {
            UNROLL for (int s = 0; s < SLOTS; s++) sum[h][s] = v_zero();
        }
        for (long i = 0; i < size; i += LANES) {
            Floats values[SLOTS];
            UNROLL for (int s = 0; s < SLOTS; s++) values[s] = v_load(key[s] + i);
            UNROLL for (int h = 0; h < heads; h++) {
                Floats query = v_load(q + h * size + i);
                UNROLL for (int s = 0; s < SLOTS; s++) sum[h][s] = v_fma(query, values[s], sum[h][s]);
            }
        }
        UNROLL for (int h = 0; h < heads; h++) {
            __m128 found = _mm_mul_ps(sums_of(sum[h][0], sum[h][1], sum[h][2], sum[h][3]), _mm_set1_ps(scale));
            store_first(scores + h * room, (int)count, found);
        }
    }
}

/* Turn `count` scores into weights; returns their sum. */
static float weigh(float *scores, long count) {
    Floats most = v_all(-INFINITY), total = v_zero();
    for (long i = 0; i < count; i += LANES)
        most = v_max(most, v_load_or(lanes_before(count - i), scores + i, most));
    most = v_all(v_most(most));
    for (long i = 0; i < count; i += LANES) {
        Mask lanes = lanes_before(count - i);
        Floats weight = exponential(v_sub(v_load_some(lanes, scores + i), most));
        total = v_add_some(lanes, total, weight);
        v_store_some(scores + i, lanes, weight);
    }
    return v_sum(total);
}

/* `vectors` registers of `heads` heads: values of the slots [first, last) by their weights, added to out. Heads are `size`
   apart in it. */
INLINE void mix_columns(const int heads, const int vectors, long size, const Store *values, long column, long first,
                        long last, const float *weights, long room, float *out) {
    Floats sum[HEADS][VECTORS];
    UNROLL for (int h = 0; h < heads; h++) {
        UNROLL for (int v = 0; v < vectors; v++) sum[h][v] = v_load(out + h * size + column + LANES * v);
    }
    for (long slot = first; slot < last; slot++) {
        const float *from = at(values, slot) + column;
        Floats value[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) value[v] = v_load(from + LANES * v);
        UNROLL for (int h = 0; h < heads; h++) {
            Floats weight = v_all(weights[h * room + slot - first]);
            UNROLL for (int v = 0; v < vectors; v++) sum[h][v] = v_fma(weight, value[v], sum[h][v]);
        }
    }
    UNROLL for (int h = 0; h < heads; h++) {
        UNROLL for (int v = 0; v < vectors; v++) v_store(out + h * size + column + LANES * v, sum[h][v]);
    }
}

/* All columns of `heads` heads ([heads, size]). */
INLINE void mix(const int heads, long size, const Store *values, long first, long last, const float *weights, long room,
                float *out) {
    long column = 0;
    for (; column + LANES * VECTORS <= size; column += LANES * VECTORS)
        mix_columns(heads, VECTORS, size, values, column, first, last, weights, room, out);
    for (; column < size; column += LANES)
        mix_columns(heads, 1, size, values, column, first, last, weights, room, out);
}

typedef struct {
    long a, b, c, last; /* what it sees: [0, a) and [b, c), nothing from `last` on */
} Sight;

static inline long least(long x, long y) { return x < y ? x : y; }

/* Scores, or with `mixing` their mixtures, of a query with what it sees of the slots [first, last). */
INLINE void part(const int heads, int mixing, const float *q, long size,
                                                       const Store *store, Sight sight, long first, long last,
                                                       float scale, float *scores, long room, float *out) {
    long ends[2][2] = {{first, least(last, sight.a)}, {first > sight.b ? first : sight.b, least(last, sight.c)}};
    for (int i = 0; i < 2; i++) {
        long from = ends[i][0], to = ends[i][1];
        if (from >= to) continue;
        float *place = scores + (i ? sight.a + from - sight.b : from);
        if (mixing)
            mix(heads, size, store, from, to, place, room, out);
        else
            score(heads, q, size, store, from, to, scale, place, room);
    }
}

/* `heads` heads of `count` queries, `stride` values apart. Slots are taken a tile at a time by all of them, as many as
   stay in the first-level cache; of this a query's result does not depend. */
INLINE void attend(const int heads, int count, const float *q, long stride,
                                                         long size, const Store *keys, const Store *values,
                                                         const Sight *sights, float scale, float *scores, long room,
                                                         float *out) {
    long last = 0, each = room * heads;
    for (int n = 0; n < count; n++) {
        last = sights[n].last > last ? sights[n].last : last;
        for (long i = 0; i < heads * size; i++) out[n * stride + i] = 0.0f;
    }
    for (long slot = 0; slot < last; slot += TILE)
        for (int n = 0; n < count; n++)
            part(heads, 0, q + n * stride, size, keys, sights[n], slot, slot + TILE, scale, scores + n * each, room, 0);
    float total[QUERIES * HEADS];
    for (int n = 0; n < count; n++)
        for (int h = 0; h < heads; h++)
            total[n * heads + h] = weigh(scores + n * each + h * room, sights[n].a + sights[n].c - sights[n].b);
    for (long slot = 0; slot < last; slot += TILE)
        for (int n = 0; n < count; n++)
            part(heads, 1, 0, size, values, sights[n], slot, slot + TILE, scale, scores + n * each, room, out + n * stride);
    for (int n = 0; n < count; n++)
        for (long i = 0; sights[n].last && i < heads * size; i++) out[n * stride + i] /= total[n * heads + i / size];
}

/* q, out: [tokens, heads, size], size a multiple of 16; caches: [pages, page_size, kv_heads, size], page_size a power of
   two; page_table: [rows, table_stride]; query_start: [rows + 1]; visible, scratch_start, scratch_end: [tokens], the
   latter two may be null. most: a bound of the slots that a query sees. Tokens of no row get zeros. Returns 0, or 1 where
   memory ran out. */
int native_attention(const float *q, const float *k_cache, const float *v_cache, long page_size, long kv_heads,
                     long heads, long size, const int32_t *page_table, long table_stride, const int32_t *query_start,
                     long rows, long tokens, const int32_t *visible, const int32_t *scratch_start,
                     const int32_t *scratch_end, long most, float scale, float *out) {
    int shift = __builtin_ctzl((unsigned long)page_size);
    long group = heads / kv_heads, room = (most + 15) / 16 * 16, failed = 0, stride = heads * size;
    long covered = least(query_start[rows], tokens);
    memset(out + covered * stride, 0, (size_t)((tokens - covered) * stride) * sizeof *out);
    /* Blocks of queries, each of one row: where they begin. */
    long count = 0, *firsts = malloc((size_t)(covered + 1) * sizeof *firsts);
    if (!firsts) return 1;
    for (long row = 0, token = 0; row < rows; row++)
        for (; token < query_start[row + 1]; token = least(token + QUERIES, query_start[row + 1])) firsts[count++] = token;
    firsts[count] = covered;
#pragma omp parallel if (2 * covered * stride * most >= PARALLEL)
    {
        float *scores = aligned_alloc(64, (size_t)(room * HEADS * QUERIES) * sizeof *scores + 64);
#pragma omp for schedule(dynamic) collapse(2) reduction(|| : failed)
        for (long block = 0; block < count; block++) {
            for (long head = 0; head < kv_heads; head++) {
                if (!scores) {
                    failed = 1;
                    continue;
                }
                long token = firsts[block], row = 0;
                int queries = (int)(firsts[block + 1] - token);
                while (query_start[row + 1] <= token) row++;
                Sight sights[QUERIES];
                for (int n = 0; n < queries; n++) {
                    Sight *s = sights + n;
                    *s = (Sight){visible[token + n], 0, 0, visible[token + n]};
                    if (scratch_end && scratch_end[token + n] > scratch_start[token + n])
                        s->b = scratch_start[token + n], s->c = s->last = scratch_end[token + n];
                }
                const int32_t *pages = page_table + row * table_stride;
                Store keys = {k_cache + head * size, pages, kv_heads * size, shift};
                Store values = {v_cache + head * size, pages, kv_heads * size, shift};
                for (long first = 0; first < group; first += HEADS) {
                    long at = token * stride + (head * group + first) * size;
#define ATTEND(N) attend(N, queries, q + at, stride, size, &keys, &values, sights, scale, scores, room, out + at)
                    switch (group - first) {
                    case 1: ATTEND(1); break;
                    case 2: ATTEND(2); break;
                    case 3: ATTEND(3); break;
                    default: ATTEND(HEADS);
                    }
                }
            }
        }
        free(scores);
    }
    free(firsts);
    return (int)failed;
}
