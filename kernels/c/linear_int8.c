/* y = x * W^T in integers (linear_int8.py): x is quantised to 8 bits by row and group of 32 inputs, as llama.cpp's Q8_1
   does, and multiplied with the codes of W, a panel of outputs at a time.

   A group's products are summed exactly; groups are added up in float32 in one order, whatever else is multiplied. So a
   row's result is its own, bit for bit. With AVX-512 it needs VNNI as well, which the rest of the library does not. */

#include "codes.h"

#define EACH(R) _Pragma("GCC unroll 16") for (int R = 0; R < rows; R++)

/* Rows that are multiplied together: two registers each. */
enum { MOST_ROWS = LANES == 16 ? 12 : 6 };
/* Panels that a block of rows is multiplied with before the next one is, where there are several. */
enum { CHUNK = 4 };
/* Blocks of weights are fetched so many bytes before they are needed. */
enum { AHEAD = 6144 };

/* Absolute values are compared as integers, which have the order of the numbers, NaN last: one makes the scale NaN, so that
   it is not lost. */
static void quantize_part(const Floats values[PARTS], Part *to) {
    Codes most = c_magnitude(values[0]), found[PARTS], all = c_zero();
    UNROLL for (int p = 1; p < PARTS; p++) most = c_max(most, c_magnitude(values[p]));
    int bits = c_most(most);
    float size = read_float(&bits), scale = size / 127.0f;
    /* The inverse of next to nothing would be infinite. */
    Floats inverse = v_all(size < 1e-30f ? 0.0f : 127.0f / size);
    UNROLL for (int p = 0; p < PARTS; p++) all = c_add(all, found[p] = c_from_floats(v_mul(values[p], inverse)));
    c_store(to->codes, found);
    int sum = c_sum(all);
    to->scale = scale, to->sum = scale * (float)sum, to->shift = (int)(-128u * (unsigned)sum);
}

void quantize_row(const float *x, long in, long rows, Part *to) {
    for (long i = 0; i < in; i += GROUP, to += rows) {
        Floats values[PARTS];
        UNROLL for (int p = 0; p < PARTS; p++) {
            long at = i + LANES * p;
            values[p] = at < in ? v_load_some(lanes_before(in - at), x + at) : v_zero();
        }
        quantize_part(values, to);
    }
}

static long block_bytes(int format) { return format == CODES4 ? CODES4_BYTES : CODES8_BYTES; }

/* `rows` rows with a panel of outputs. x: of the first row's first group, a group's parts are x_rows apart. */
INLINE VNNI void multiply(const int format, const int rows, const Part *x, long x_rows, long groups, const uint8_t *w,
                          Floats bias, float *y, long y_stride, Mask kept, int add) {
    Floats sum[MOST_ROWS];
    EACH(r) sum[r] = v_zero();
    for (long g = 0; g < groups; g++, x += x_rows, w += block_bytes(format)) {
        Codes found[MOST_ROWS];
        for (long line = 0; line < block_bytes(format); line += 64) _mm_prefetch((const char *)w + AHEAD + line, _MM_HINT_T0);
        if (format == CODES4) {
            EACH(r) found[r] = c_zero();
            UNROLL for (int i = 0; i < GROUP / 8; i++) {
                Codes both = c_load(w + 4 * PANEL * i), low = c_low_halves(both), high = c_high_halves(both);
                EACH(r) found[r] = dot4(found[r], low, x[r].codes + 8 * i);
                EACH(r) found[r] = dot4(found[r], high, x[r].codes + 8 * i + 4);
            }
            Floats scale = v_from_half(w + 16 * PANEL), offset = v_from_half(w + 18 * PANEL);
            EACH(r) {
                Floats value = v_mul(c_to_floats(c_total4(found[r])), scale);
                sum[r] = v_fma(value, v_all(x[r].scale), sum[r]);
                sum[r] = v_fma(offset, v_all(x[r].sum), sum[r]);
            }
        } else {
            EACH(r) found[r] = c_start8(x[r].shift);
            UNROLL for (int i = 0; i < GROUP / 4; i++) {
                Codes codes = c_load(w + 4 * PANEL * i);
                EACH(r) found[r] = dot8(found[r], codes, x[r].codes + 4 * i);
            }
            Floats scale = v_load_aligned((const float *)(w + 32 * PANEL));
            EACH(r) {
                Floats value = v_mul(c_to_floats(found[r]), scale);
                sum[r] = v_fma(value, v_all(x[r].scale), sum[r]);
            }
        }
    }
    EACH(r) {
        float *at = y + r * y_stride;
        Floats value = v_add(sum[r], bias);
        if (add) value = v_add(value, v_load_some(kept, at));
        v_store_some(at, kept, value);
    }
}

typedef void Multiply(const Part *, long, long, const uint8_t *, Floats, float *, long, Mask, int);
#define SOME(FORMAT, ROWS)                                                                                             \
    VNNI static void FORMAT##_##ROWS(const Part *x, long x_rows, long groups, const uint8_t *w, Floats bias, float *y,  \
                                     long y_stride, Mask kept, int add) {                                         \
        multiply(FORMAT, ROWS, x, x_rows, groups, w, bias, y, y_stride, kept, add);                                    \
    }
#define SIX_OF(F) SOME(F, 1) SOME(F, 2) SOME(F, 3) SOME(F, 4) SOME(F, 5) SOME(F, 6)
#define SIX_NAMES(F) 0, F##_1, F##_2, F##_3, F##_4, F##_5, F##_6
#ifdef __AVX512F__
#define ALL_OF(F) SIX_OF(F) SOME(F, 7) SOME(F, 8) SOME(F, 9) SOME(F, 10) SOME(F, 11) SOME(F, 12)
#define NAMES(F) {SIX_NAMES(F), F##_7, F##_8, F##_9, F##_10, F##_11, F##_12}
#else
#define ALL_OF SIX_OF
#define NAMES(F) {SIX_NAMES(F)}
#endif
ALL_OF(CODES4)
ALL_OF(CODES8)
static Multiply *const some_rows[][MOST_ROWS + 1] = {[CODES4] = NAMES(CODES4), [CODES8] = NAMES(CODES8)};

/* What an adapter adds to some rows: rows quantised between its halves, and its second half. */
typedef struct {
    const Part *parts; /* [groups, count] */
    const int64_t *rows;
    long count;
    const Int8Weight *up;
} Addition;

/* Of a panel of outputs, to what stands there. */
static void add_panel(const Addition *of, long panel, Mask kept, float *y, long y_stride) {
    long groups = groups_of(of->up->in);
    const uint8_t *blocks = of->up->blocks + panel * groups * block_bytes(of->up->format);
    for (long row = 0, some; row < of->count; row += some) {
        float found[MOST_ROWS * PANEL];
        some = of->count - row < MOST_ROWS ? of->count - row : MOST_ROWS;
        some_rows[of->up->format][some](of->parts + row, of->count, groups, blocks, v_zero(), found, PANEL,
                                        lanes_before(PANEL), 0);
        for (long r = 0; r < some; r++) {
            float *at = y + of->rows[row + r] * y_stride + panel * PANEL;
            v_store_some(at, kept, v_add(v_load_some(kept, at), v_load(found + r * PANEL)));
        }
    }
}

/* y (+)= x * weight^T + bias, and then the addition, if there is one. x: `rows` of x_rows quantised rows. */
static void int8_product(const Part *x, long x_rows, long rows, const Int8Weight *weight, const Addition *addition,
                         float *y, long y_stride, int add) {
    long groups = groups_of(weight->in), panels = (weight->out + PANEL - 1) / PANEL;
    long bytes = groups * block_bytes(weight->format), blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    long chunk = blocks > 1 ? CHUNK : 1;
    /* Static: each thread reads one stretch of memory. */
#pragma omp parallel for schedule(static) if (weight->out * weight->in * (rows + 3) >= PARALLEL)
    for (long from = 0; from < panels; from += chunk) {
        long to = from + chunk < panels ? from + chunk : panels;
        /* Blocks of rows are as even as they can be. One stays in the first-level cache for the chunk's panels. */
        for (long b = 0, row = 0; b < blocks; b++) {
            long some = (rows - row + blocks - b - 1) / (blocks - b);
            for (long p = from, o = from * PANEL; p < to; p++, o += PANEL) {
                Mask kept = lanes_before(weight->out - o);
                Floats bias = weight->bias ? v_load_some(kept, weight->bias + o) : v_zero();
                some_rows[weight->format][some](x + row, x_rows, groups, weight->blocks + p * bytes, bias,
                                                y + row * y_stride + o, y_stride, kept, add);
            }
            row += some;
        }
        if (addition)
            for (long p = from; p < to; p++) add_panel(addition, p, lanes_before(weight->out - p * PANEL), y, y_stride);
    }
}

void quantize_rows(const float *x, long x_stride, long rows, long in, Part *to) {
#pragma omp parallel for if (rows * in >= MANY_VALUES)
    for (long r = 0; r < rows; r++) quantize_row(x + r * x_stride, in, rows, to + r);
}

static Part *quantize(const float *x, long x_stride, long rows, long in) {
    Part *parts = malloc((size_t)(rows * groups_of(in) + 1) * sizeof *parts);
    if (parts) quantize_rows(x, x_stride, rows, in, parts);
    return parts;
}

/* x * down^T of the rows that `noisy` lists, quantised; null without memory. */
static Part *low_rank(const Part *x, long x_rows, const int64_t *noisy, long count, const Int8Weight *down) {
    long groups = groups_of(down->in);
    Part *some = malloc((size_t)(count * groups) * sizeof *some), *parts = 0;
    float *between = malloc((size_t)(count * down->out) * sizeof *between);
    if (some && between) {
        for (long g = 0; g < groups; g++)
            for (long r = 0; r < count; r++) some[g * count + r] = x[g * x_rows + noisy[r]];
        int8_product(some, count, count, down, 0, between, down->out, 0);
        parts = quantize(between, down->out, count, down->out);
    }
    free(some);
    free(between);
    return parts;
}

int int8_project(const Part *x, long rows, const Projection *by, const int64_t *noisy, long count, float *y,
                 long y_stride, int add) {
    if (!count || !by->down) {
        int8_product(x, rows, rows, by->base, 0, y, y_stride, add);
        return 0;
    }
    Part *parts = low_rank(x, rows, noisy, count, by->down);
    if (parts) int8_product(x, rows, rows, by->base, &(Addition){parts, noisy, count, by->up}, y, y_stride, add);
    free(parts);
    return !parts;
}

/* y = x * base^T + bias, and an adapter's part on the `count` rows that `noisy` lists. x: [rows, in], y: [rows, out], rows
   a stride apart. Returns 1 without memory. */
int native_int8_linear(const float *x, long x_stride, long rows, const Int8Weight *base, const Int8Weight *down,
                       const Int8Weight *up, const int64_t *noisy, long count, float *y, long y_stride) {
    Part *parts = quantize(x, x_stride, rows, base->in);
    int failed = !parts || int8_project(parts, rows, &(Projection){base, down, up}, noisy, count, y, y_stride, 0);
    free(parts);
    return failed;
}
