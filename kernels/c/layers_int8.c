/* All layers of a Llama in one call, on weights for integers (layers_int8.py): for few rows, what is between the kernels
   costs as much as they do. */

#include "int8.h"

typedef struct {
    const float *input_norm, *post_norm; /* [hidden] */
    Projection qkv, output, gate_up, down;
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

/* RMS norms of x ([rows, size]), quantised. */
static void norm_rows(const float *x, long rows, long size, const float *weight, float eps, Part *parts) {
#pragma omp parallel for if (rows * size >= MANY_VALUES)
    for (long r = 0; r < rows; r++) {
        float normed[size];
        native_rms_norm(x + r * size, 0, 1, size, weight, eps, 0, normed);
        quantize_row(normed, size, rows, parts + r);
    }
}

/* silu(gate) * up of gate_up ([rows, 2 * size]), quantised. */
static void gate_rows(const float *gate_up, long rows, long size, Part *parts) {
#pragma omp parallel for if (rows * size >= MANY_VALUES)
    for (long r = 0; r < rows; r++) {
        float gated[size];
        native_silu_and_mul(gate_up + r * 2 * size, 1, size, gated);
        quantize_row(gated, size, rows, parts + r);
    }
}

/* residual: [tokens, hidden], embeddings that become the last layer's output. keys, values: of each layer, [slots,
   kv_heads, size]. Returns 1 without memory. */
int native_int8_layers(const Layers *all, const Rows *rows, float *const *keys, float *const *values, float *residual) {
    long tokens = rows->tokens, hidden = all->hidden, inner = all->intermediate, size = all->size;
    long queries = all->heads * size, fused = queries + 2 * all->kv_heads * size;
    long widest = groups_of(hidden > inner ? hidden > queries ? hidden : queries : inner > queries ? inner : queries);
    /* What is wide is one after the other: queries, keys and values with their results; gate and up. */
    long wide = fused + 2 * queries > 2 * inner ? fused + 2 * queries : 2 * inner;
    Part *parts = malloc((size_t)(tokens * widest + 1) * sizeof *parts);
    float *qkv = malloc((size_t)(tokens * wide + 1) * sizeof *qkv), *gate_up = qkv;
    float *q = qkv + tokens * fused, *attended = q + tokens * queries;
    int failed = !parts || !qkv;
    for (long i = 0; i < all->count && !failed; i++) {
        const Layer *layer = all->layers + i;
        norm_rows(residual, tokens, hidden, layer->input_norm, all->eps, parts);
        failed |= int8_project(parts, tokens, &layer->qkv, rows->noisy, rows->noisy_count, qkv, fused, 0);
        native_rope(qkv, fused, qkv + queries, fused, qkv + fused - all->kv_heads * size, fused, all->table, all->half,
                    rows->positions, rows->slots, tokens, all->heads, all->kv_heads, size, keys[i], values[i], q);
        failed |= native_attention(q, keys[i], values[i], rows->page_size, all->kv_heads, all->heads, size,
                                   rows->page_table, rows->table_stride, rows->query_start, rows->rows, tokens,
                                   rows->visible, rows->scratch_start, rows->scratch_end, rows->most, all->scale, attended);
        quantize_rows(attended, queries, tokens, queries, parts);
        failed |= int8_project(parts, tokens, &layer->output, rows->noisy, rows->noisy_count, residual, hidden, 1);
        norm_rows(residual, tokens, hidden, layer->post_norm, all->eps, parts);
        failed |= int8_project(parts, tokens, &layer->gate_up, rows->noisy, rows->noisy_count, gate_up, 2 * inner, 0);
        gate_rows(gate_up, tokens, inner, parts);
        failed |= int8_project(parts, tokens, &layer->down, rows->noisy, rows->noisy_count, residual, hidden, 1);
    }
    free(parts);
    free(qkv);
    return failed;
}
