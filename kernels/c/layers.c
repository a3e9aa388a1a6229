/* All layers of a Llama in one call (layers_native.py), on weights for integers or for floats: for few rows, what is
   between the kernels costs as much as they do. */

#include "int8.h"

/* A weight for floats and, or null, the two halves of an adapter beside it. */
typedef struct {
    const FloatWeight *base, *down, *up;
} FloatProjection;

/* One of both: `integers.base` or `floats.base` is null. */
typedef struct {
    Projection integers;
    FloatProjection floats;
} Either;

typedef struct {
    const float *input_norm, *post_norm; /* [hidden] */
    const float *q_norm, *k_norm;        /* [size], of each head, or null */
    Either qkv, output, gate_up, down;
} Layer;

typedef struct {
    const Layer *layers;
    long count, hidden, intermediate, heads, kv_heads, size;
    const float *table; /* [positions, 2 * half], of rope.c */
    long half;
    float eps, scale;
} Layers;

/* What rows of a forward are and see; of attention.c and rope.c. noisy: rows that adapters act on. */
typedef struct {
    long tokens;
    const int32_t *positions, *slots;
    long page_size;
    const int32_t *page_table;
    long table_stride, rows;
    const int32_t *query_start, *visible, *scratch_start, *scratch_end;
    long most;
    const int64_t *noisy;
    long noisy_count;
} Rows;

/* What a projection reads: `rows` rows, x_stride apart, or quantised. */
typedef struct {
    Part *parts;
    const float *x;
    long x_stride;
} Input;

/* RMS norms of x ([rows, size]), quantised, or in `to`. */
static Input norm_rows(const Either *by, const float *x, long rows, long size, const float *weight, float eps,
                       Part *parts, float *to) {
#pragma omp parallel for if (rows * size >= MANY_VALUES)
    for (long r = 0; r < rows; r++) {
        float *normed = to + r * size;
        native_rms_norm(x + r * size, 0, 1, size, weight, eps, 0, normed);
        if (by->integers.base) quantize_row(normed, size, rows, parts + r);
    }
    return (Input){parts, to, size};
}

/* silu(gate) * up of gate_up ([rows, 2 * size]), in its first half, and quantised. */
static Input gate_rows(const Either *by, float *gate_up, long rows, long size, Part *parts) {
#pragma omp parallel for if (rows * size >= MANY_VALUES)
    for (long r = 0; r < rows; r++) {
        float *gated = gate_up + r * 2 * size;
        native_silu_and_mul(gated, 1, size, gated);
        if (by->integers.base) quantize_row(gated, size, rows, parts + r);
    }
    return (Input){parts, gate_up, 2 * size};
}

static Input attended_rows(const Either *by, const float *attended, long rows, long size, Part *parts) {
    if (by->integers.base) quantize_rows(attended, size, rows, size, parts);
    return (Input){parts, attended, size};
}

/* y += (x * down^T) * up^T of the rows that `noisy` lists. Returns 1 without memory. */
static int add_adapter(const FloatProjection *by, const Input *input, const int64_t *noisy, long count, float *y,
                       long y_stride) {
    long in = by->base->in, out = by->base->out, rank = by->down->out;
    float *x = malloc((size_t)(count * (in + rank + out)) * sizeof *x), *between = x + count * in;
    float *found = between + count * rank;
    if (!x) return 1;
    for (long r = 0; r < count; r++)
        memcpy(x + r * in, input->x + noisy[r] * input->x_stride, (size_t)in * sizeof *x);
    native_linear(x, in, count, by->down->packed, by->down->format, in, rank, 0, between, rank, 0);
    native_linear(between, rank, count, by->up->packed, by->up->format, rank, out, 0, found, out, 0);
    for (long r = 0; r < count; r++)
        for (long o = 0; o < out; o++) y[noisy[r] * y_stride + o] += found[r * out + o];
    free(x);
    return 0;
}

/* y = the projection of `rows` rows of its input, or y += it. Returns 1 without memory. */
static int project(const Either *by, Input input, const Rows *rows, float *y, long y_stride, int add) {
    if (by->integers.base)
        return int8_project(input.parts, rows->tokens, &by->integers, rows->noisy, rows->noisy_count, y, y_stride, add);
    const FloatWeight *base = by->floats.base;
    native_linear(input.x, input.x_stride, rows->tokens, base->packed, base->format, base->in, base->out, base->bias, y,
                  y_stride, add);
    if (!rows->noisy_count || !by->floats.down) return 0;
    return add_adapter(&by->floats, &input, rows->noisy, rows->noisy_count, y, y_stride);
}

/* residual: [tokens, hidden], embeddings that become the last layer's output. keys, values: of each layer, [slots,
   kv_heads, size]. Returns 1 without memory. */
int native_layers(const Layers *all, const Rows *rows, float *const *keys, float *const *values, float *residual) {
    long tokens = rows->tokens, hidden = all->hidden, inner = all->intermediate, size = all->size;
    long queries = all->heads * size, fused = queries + 2 * all->kv_heads * size;
    long widest = groups_of(hidden > inner ? hidden > queries ? hidden : queries : inner > queries ? inner : queries);
    /* What is wide is one after the other: queries, keys and values with their results; gate and up. */
    long wide = fused + 2 * queries > 2 * inner ? fused + 2 * queries : 2 * inner;
    Part *parts = malloc((size_t)(tokens * widest + 1) * sizeof *parts);
    float *normed = malloc((size_t)(tokens * (hidden + wide) + 1) * sizeof *normed), *qkv = normed + tokens * hidden;
    float *q = qkv + tokens * fused, *attended = q + tokens * queries, *gate_up = qkv;
    int failed = !parts || !normed;
    for (long i = 0; i < all->count && !failed; i++) {
        const Layer *layer = all->layers + i;
        Input input = norm_rows(&layer->qkv, residual, tokens, hidden, layer->input_norm, all->eps, parts, normed);
        failed |= project(&layer->qkv, input, rows, qkv, fused, 0);
        for (long t = 0; layer->q_norm && t < tokens; t++) {
            float *at = qkv + t * fused, *k = at + queries;
            native_rms_norm(at, 0, all->heads, size, layer->q_norm, all->eps, 0, at);
            native_rms_norm(k, 0, all->kv_heads, size, layer->k_norm, all->eps, 0, k);
        }
        native_rope(qkv, fused, qkv + queries, fused, qkv + fused - all->kv_heads * size, fused, all->table, all->half,
                    rows->positions, rows->slots, tokens, all->heads, all->kv_heads, size, keys[i], values[i], q);
        failed |= native_attention(q, keys[i], values[i], rows->page_size, all->kv_heads, all->heads, size,
                                   rows->page_table, rows->table_stride, rows->query_start, rows->rows, tokens,
                                   rows->visible, rows->scratch_start, rows->scratch_end, rows->most, all->scale, attended);
        input = attended_rows(&layer->output, attended, tokens, queries, parts);
        failed |= project(&layer->output, input, rows, residual, hidden, 1);
        input = norm_rows(&layer->gate_up, residual, tokens, hidden, layer->post_norm, all->eps, parts, normed);
        failed |= project(&layer->gate_up, input, rows, gate_up, 2 * inner, 0);
        input = gate_rows(&layer->down, gate_up, tokens, inner, parts);
        failed |= project(&layer->down, input, rows, residual, hidden, 1);
    }
    free(parts);
    free(normed);
    return failed;
}
