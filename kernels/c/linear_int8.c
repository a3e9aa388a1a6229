/* y = x * W^T in integers (linear_int8.py): x is quantised to 8 bits by row and group of 32 inputs, as llama.cpp's Q8_1
   does, and multiplied with the codes of W, sixteen outputs at a time.

   A group's products are summed exactly; groups are added up in float32 in one order, whatever else is multiplied. So a
   row's result is its own, bit for bit. Needs AVX512_VNNI, which the rest of the library does not. */

#include "int8.h"

#define VNNI __attribute__((target("avx512vnni")))
#define INLINE static inline __attribute__((always_inline))
#define EACH(R) _Pragma("GCC unroll 16") for (int R = 0; R < rows; R++)

/* Rows that are multiplied together: two registers each. */
enum { MOST_ROWS = 12 };
/* Panels that a block of rows is multiplied with before the next one is, where there are several. */
enum { CHUNK = 4 };
/* Blocks of weights are fetched so many bytes before they are needed. */
enum { AHEAD = 6144 };

/* Absolute values as integers, which have the order of the numbers, NaN last: one makes the scale NaN, so that it is not
   lost. */
static inline __m512i magnitude(__m512 values) {
    return _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7FFFFFFF));
}

static void quantize_part(__m512 low, __m512 high, Part *to) {
    int most = _mm512_reduce_max_epi32(_mm512_max_epi32(magnitude(low), magnitude(high)));
    float size = read_float(&most), scale = size / 127.0f;
    /* The inverse of next to nothing would be infinite. */
    __m512 inverse = _mm512_set1_ps(size < 1e-30f ? 0.0f : 127.0f / size);
    __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    _mm_storeu_si128((__m128i *)to->codes, _mm512_cvtsepi32_epi8(first));
    _mm_storeu_si128((__m128i *)(to->codes + 16), _mm512_cvtsepi32_epi8(second));
    int sum = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    to->scale = scale, to->sum = scale * (float)sum, to->shift = -128 * sum;
}

void quantize_row(const float *x, long in, long rows, Part *to) {
    for (long i = 0; i < in; i += GROUP, to += rows)
        quantize_part(_mm512_maskz_loadu_ps(lanes_before(in - i), x + i),
                      i + 16 < in ? _mm512_maskz_loadu_ps(lanes_before(in - i - 16), x + i + 16) : _mm512_setzero_ps(),
                      to);
}

static long block_bytes(int format) { return format == CODES4 ? CODES4_BYTES : CODES8_BYTES; }

INLINE VNNI __m512i dot(__m512i sum, __m512i codes, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
}

/* `rows` rows with sixteen outputs. x: of the first row's first group, a group's parts are x_rows apart. */
INLINE VNNI void multiply(const int format, const int rows, const Part *x, long x_rows, long groups, const uint8_t *w,
                          __m512 bias, float *y, long y_stride, __mmask16 kept, int add) {
    const __m512i half = _mm512_set1_epi8(15);
    __m512 sum[MOST_ROWS];
    EACH(r) sum[r] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++, x += x_rows, w += block_bytes(format)) {
        __m512i found[MOST_ROWS];
        for (long line = 0; line < block_bytes(format); line += 64) _mm_prefetch((const char *)w + AHEAD + line, _MM_HINT_T0);
        if (format == CODES4) {
            EACH(r) found[r] = _mm512_setzero_si512();
            UNROLL for (int i = 0; i < GROUP / 8; i++) {
                __m512i both = _mm512_load_si512(w + 64 * i);
                __m512i low = _mm512_and_si512(both, half), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
                EACH(r) found[r] = dot(found[r], low, x[r].codes + 8 * i);
                EACH(r) found[r] = dot(found[r], high, x[r].codes + 8 * i + 4);
            }
            __m512 scale = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(w + 256)));
            __m512 offset = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(w + 288)));
            EACH(r) {
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(found[r]), scale);
                sum[r] = _mm512_fmadd_ps(value, _mm512_set1_ps(x[r].scale), sum[r]);
                sum[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x[r].sum), sum[r]);
            }
        } else {
            EACH(r) found[r] = _mm512_set1_epi32(x[r].shift);
            UNROLL for (int i = 0; i < GROUP / 4; i++) {
                __m512i codes = _mm512_load_si512(w + 64 * i);
                EACH(r) found[r] = dot(found[r], codes, x[r].codes + 4 * i);
            }
            __m512 scale = _mm512_load_ps(w + 512);
            EACH(r) {
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(found[r]), scale);
                sum[r] = _mm512_fmadd_ps(value, _mm512_set1_ps(x[r].scale), sum[r]);
            }
        }
    }
    EACH(r) {
        float *at = y + r * y_stride;
        __m512 value = _mm512_add_ps(sum[r], bias);
        if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(kept, at));
        _mm512_mask_storeu_ps(at, kept, value);
    }
}

typedef void Multiply(const Part *, long, long, const uint8_t *, __m512, float *, long, __mmask16, int);
#define SOME(FORMAT, ROWS)                                                                                             \
    VNNI static void FORMAT##_##ROWS(const Part *x, long x_rows, long groups, const uint8_t *w, __m512 bias, float *y,  \
                                     long y_stride, __mmask16 kept, int add) {                                         \
        multiply(FORMAT, ROWS, x, x_rows, groups, w, bias, y, y_stride, kept, add);                                    \
    }
#define ALL_OF(FORMAT)                                                                                                 \
    SOME(FORMAT, 1) SOME(FORMAT, 2) SOME(FORMAT, 3) SOME(FORMAT, 4) SOME(FORMAT, 5) SOME(FORMAT, 6)                    \
    SOME(FORMAT, 7) SOME(FORMAT, 8) SOME(FORMAT, 9) SOME(FORMAT, 10) SOME(FORMAT, 11) SOME(FORMAT, 12)
#define NAMES(F) {0, F##_1, F##_2, F##_3, F##_4, F##_5, F##_6, F##_7, F##_8, F##_9, F##_10, F##_11, F##_12}
ALL_OF(CODES4)
ALL_OF(CODES8)
static Multiply *const some_rows[][MOST_ROWS + 1] = {[CODES4] = NAMES(CODES4), [CODES8] = NAMES(CODES8)};

/* y (+)= x * weight^T + bias. x: `rows` of x_rows quantised rows. */
static void int8_product(const Part *x, long x_rows, long rows, const Int8Weight *weight, float *y, long y_stride,
                         int add) {
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
                __mmask16 kept = lanes_before(weight->out - o);
                __m512 bias = weight->bias ? _mm512_maskz_loadu_ps(kept, weight->bias + o) : _mm512_setzero_ps();
                some_rows[weight->format][some](x + row, x_rows, groups, weight->blocks + p * bytes, bias,
                                                y + row * y_stride + o, y_stride, kept, add);
            }
            row += some;
        }
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

/* y += (x * down^T) * up^T on the rows that `noisy` lists. Returns 1 without memory. */
static int add_low_rank(const Part *x, long x_rows, const int64_t *noisy, long count, const Projection *of, float *y,
                        long y_stride) {
    long groups = groups_of(of->down->in), rank = of->down->out, out = of->up->out;
    Part *some = malloc((size_t)(count * groups) * sizeof *some), *parts = 0;
    float *between = malloc((size_t)(count * (rank + out)) * sizeof *between), *found = between + count * rank;
    if (some && between) {
        for (long g = 0; g < groups; g++)
            for (long r = 0; r < count; r++) some[g * count + r] = x[g * x_rows + noisy[r]];
        int8_product(some, count, count, of->down, between, rank, 0);
        parts = quantize(between, rank, count, rank);
    }
    if (parts) {
        int8_product(parts, count, count, of->up, found, out, 0);
        for (long r = 0; r < count; r++, found += out)
            for (long o = 0; o < out; o++) y[noisy[r] * y_stride + o] += found[o];
    }
    free(some);
    free(between);
    free(parts);
    return !parts;
}

int int8_project(const Part *x, long rows, const Projection *by, const int64_t *noisy, long count, float *y,
                 long y_stride, int add) {
    int8_product(x, rows, rows, by->base, y, y_stride, add);
    return count && by->down && add_low_rank(x, rows, noisy, count, by, y, y_stride);
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
