/* y = x * W^T for few rows of x, on weights kept in the few bits that they came with (linear_native.py).

   A tile of four outputs is expanded to float32 in the first-level cache and multiplied with all rows while the next
   tile's bytes are on their way. Lanes run along the inputs, and every row is added up in the same order whatever else
   is multiplied: a row's result is its own, bit for bit, whatever the format. */

#include "native.h"

/* Outputs of a tile, rows that are multiplied with it together (their sums are all registers), inputs of a group, registers
   that hold a group. */
enum { TILE = 4, MOST_ROWS = LANES == 16 ? 6 : 3, GROUP = 32, PARTS = GROUP / LANES };

/* Formats. Values are those of a float16 checkpoint, so grids are rounded to float16 before they are used.
   HALF: [out, in] float16.
   GRID4: groups of 32 inputs: 16 bytes (low halves: the first 16 values), then scale and offset in float32.
   GRID8: groups of 32 inputs: 32 int8, then the scale in float32. */
enum { HALF, GRID4, GRID8 };
enum { HALF_BYTES = 64, GRID4_BYTES = 24, GRID8_BYTES = 36 }; /* of a group */
/* Bytes that are fetched before they are needed. */
enum { AHEAD = 1536 };

static long row_bytes(int format, long in) {
    return format == HALF ? 2 * in : in / GROUP * (format == GRID4 ? GRID4_BYTES : GRID8_BYTES);
}

/* A group's 32 values. The product of a code and a scale, which is a float16, is exact. */
static inline void decode_GRID4(const uint8_t *from, Floats values[PARTS]) {
    Floats scale = v_all(read_float(from + 16)), offset = v_all(read_float(from + 20));
#ifdef __AVX512F__
    const Floats steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Floats levels = v_rounded(v_fma(steps, scale, offset));
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    /* A permutation reads the low four bits of an index. */
    values[0] = _mm512_permutexvar_ps(codes, levels);
    values[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), levels);
#else
    const __m256i nibble = _mm256_set1_epi32(15);
    UNROLL for (int i = 0; i < 2; i++) {
        __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8 * i)));
        __m256i low = _mm256_and_si256(codes, nibble), high = _mm256_srli_epi32(codes, 4);
        values[i] = v_rounded(v_fma(_mm256_cvtepi32_ps(low), scale, offset));
        values[2 + i] = v_rounded(v_fma(_mm256_cvtepi32_ps(high), scale, offset));
    }
#endif
}

static inline void decode_HALF(const uint8_t *from, Floats values[PARTS]) {
    UNROLL for (int p = 0; p < PARTS; p++) values[p] = v_from_half(from + 2 * LANES * p);
}

static inline void decode_GRID8(const uint8_t *from, Floats values[PARTS]) {
    Floats scale = v_all(read_float(from + GROUP));
    UNROLL for (int p = 0; p < PARTS; p++) values[p] = v_rounded(v_mul(v_from_bytes(from + LANES * p), scale));
}

/* One output's weights as float32, zeros up to a multiple of LANES. ahead: bytes to the tile that is fetched meanwhile. */
static void expand(int format, const uint8_t *from, long in, long ahead, float *to) {
    if (format == HALF) {
        long i = 0;
        for (; i + LANES <= in; i += LANES, from += 2 * LANES) {
            _mm_prefetch((const char *)from + ahead, _MM_HINT_T0);
            v_store(to + i, v_from_half(from));
        }
        if (i < in) {
            uint16_t last[LANES] = {0};
            memcpy(last, from, (size_t)(2 * (in - i)));
            v_store(to + i, v_from_half(last));
        }
        return;
    }
    for (long i = 0; i < in; i += GROUP, from += format == GRID4 ? GRID4_BYTES : GRID8_BYTES) {
        Floats values[PARTS];
        _mm_prefetch((const char *)from + ahead, _MM_HINT_T0);
        if (format == GRID4)
            decode_GRID4(from, values);
        else
            decode_GRID8(from, values);
        UNROLL for (int p = 0; p < PARTS; p++) v_store(to + i + LANES * p, values[p]);
    }
}

/* ROWS rows of x with a tile; out: how many of its outputs there are. Loops are unrolled so that sums are registers. */
#define MULTIPLY(ROWS)                                                                                                 \
    static void multiply_##ROWS(const float *x, long x_stride, long in, const float *tile, long tile_stride,           \
                                const float *bias, float *y, long y_stride, int out, int add) {                        \
        Floats sum[ROWS][TILE];                                                                                        \
        UNROLL for (int r = 0; r < ROWS; r++) {                                                                        \
            UNROLL for (int o = 0; o < TILE; o++) sum[r][o] = v_zero();                                                \
        }                                                                                                              \
        Mask lanes = lanes_before(LANES);                                                                              \
        for (long i = 0; i < in; i += LANES) {                                                                         \
            if (in - i < LANES) lanes = lanes_before(in - i);                                                          \
            Floats weights[TILE];                                                                                      \
            UNROLL for (int o = 0; o < TILE; o++) weights[o] = v_load_aligned(tile + o * tile_stride + i);             \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                                    \
                Floats values = v_load_some(lanes, x + r * x_stride + i);                                              \
                UNROLL for (int o = 0; o < TILE; o++) sum[r][o] = v_fma(values, weights[o], sum[r][o]);                \
            }                                                                                                          \
        }                                                                                                              \
        __m128 shift = bias ? load_first(out, bias) : _mm_setzero_ps();                                                \
        UNROLL for (int r = 0; r < ROWS; r++) {                                                                        \
            float *at = y + r * y_stride;                                                                              \
            __m128 found = _mm_add_ps(sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), shift);                     \
            if (add) found = _mm_add_ps(found, load_first(out, at));                                                   \
            store_first(at, out, found);                                                                               \
        }                                                                                                              \
    }
#ifdef __AVX512F__
MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5) MULTIPLY(6)
#define MULTIPLIES {0, multiply_1, multiply_2, multiply_3, multiply_4, multiply_5, multiply_6}
#else
MULTIPLY(1) MULTIPLY(2) MULTIPLY(3)
#define MULTIPLIES {0, multiply_1, multiply_2, multiply_3}
#endif

typedef void Multiply(const float *, long, long, const float *, long, const float *, float *, long, int, int);
static Multiply *const multiply[MOST_ROWS + 1] = MULTIPLIES;

/* A few rows, which are what decoding has: a few outputs' weights go from their bytes to the sums without a stop in the
   cache, in the same order as a tile. */
enum { FEW_ROWS = 12 };

/* Outputs that run together: as many as there are registers for with so many rows. */
#define OUTPUTS_OF(ROWS) (LANES == 16 || (ROWS) <= 6 ? 2 : 1)

#define FEW(FORMAT, ROWS)                                                                                              \
    static void few_##FORMAT##_##ROWS(const float *x, long x_stride, long in, const uint8_t *const *weights, float *y, \
                                      long y_stride, __m128 shift, int kept, int add) {                                \
        enum { OUTPUTS = OUTPUTS_OF(ROWS), TOGETHER = 4 / OUTPUTS };                                                   \
        Floats sum[ROWS][OUTPUTS], values[PARTS];                                                                      \
        const uint8_t *from[OUTPUTS];                                                                                  \
        UNROLL for (int o = 0; o < OUTPUTS; o++) {                                                                     \
            from[o] = weights[o];                                                                                      \
            UNROLL for (int r = 0; r < ROWS; r++) sum[r][o] = v_zero();                                                \
        }                                                                                                              \
        for (long i = 0; i < in; i += GROUP) {                                                                         \
            UNROLL for (int o = 0; o < OUTPUTS; o++) _mm_prefetch((const char *)from[o] + AHEAD, _MM_HINT_T0);         \
            UNROLL for (int o = 0; o < OUTPUTS; o++) {                                                                 \
                decode_##FORMAT(from[o], values);                                                                      \
                from[o] += FORMAT##_BYTES;                                                                             \
                UNROLL for (int p = 0; p < PARTS; p++) {                                                               \
                    UNROLL for (int r = 0; r < ROWS; r++)                                                              \
                        sum[r][o] = v_fma(v_load(x + r * x_stride + i + LANES * p), values[p], sum[r][o]);             \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < ROWS; r += TOGETHER) {                                                              \
            Floats four[4];                                                                                            \
            UNROLL for (int n = 0; n < 4; n++)                                                                         \
                four[n] = sum[r + n / OUTPUTS < ROWS ? r + n / OUTPUTS : r][n % OUTPUTS];                              \
            __m128 all = sums_of(four[0], four[1], four[2], four[3]);                                                  \
            UNROLL for (int n = 0; n < TOGETHER; n++) {                                                                \
                if (r + n == ROWS) break;                                                                              \
                float *at = y + (r + n) * y_stride;                                                                    \
                __m128 found = _mm_add_ps(all, shift);                                                                 \
                if (add) found = _mm_add_ps(found, load_first(kept, at));                                              \
                store_first(at, kept, found);                                                                          \
                all = OUTPUTS == 2 ? _mm_movehl_ps(all, all) : _mm_shuffle_ps(all, all, 0x39);                         \
            }                                                                                                          \
        }                                                                                                              \
    }
#define FEW_OF(F)                                                                                                      \
    FEW(F, 1) FEW(F, 2) FEW(F, 3) FEW(F, 4) FEW(F, 5) FEW(F, 6)                                                        \
    FEW(F, 7) FEW(F, 8) FEW(F, 9) FEW(F, 10) FEW(F, 11) FEW(F, 12)
#define FEW_NAMES(F)                                                                                                   \
    {0, few_##F##_1, few_##F##_2, few_##F##_3, few_##F##_4, few_##F##_5, few_##F##_6,                                  \
     few_##F##_7, few_##F##_8, few_##F##_9, few_##F##_10, few_##F##_11, few_##F##_12}
FEW_OF(HALF)
FEW_OF(GRID4)
FEW_OF(GRID8)

typedef void Few(const float *, long, long, const uint8_t *const *, float *, long, __m128, int, int);
static Few *const few[][FEW_ROWS + 1] = {[HALF] = FEW_NAMES(HALF), [GRID4] = FEW_NAMES(GRID4), [GRID8] = FEW_NAMES(GRID8)};

static void few_rows(const float *x, long x_stride, long rows, const uint8_t *weight, int format, long in, long out,
                     const float *bias, float *y, long y_stride, int add) {
    long bytes = row_bytes(format, in), outputs = OUTPUTS_OF(rows);
#pragma omp parallel for schedule(dynamic, 16) if (out * in * (rows + 3) >= PARALLEL)
    for (long first = 0; first < out; first += outputs) {
        int kept = (int)(out - first < outputs ? out - first : outputs);
        const uint8_t *weights[2];
        /* Behind the last output stands a copy of it, which is not stored. */
        for (int o = 0; o < outputs; o++) weights[o] = weight + (first + (o < kept ? o : kept - 1)) * bytes;
        __m128 shift = bias ? load_first(kept, bias + first) : _mm_setzero_ps();
        few[format][rows](x, x_stride, in, weights, y + first, y_stride, shift, kept, add);
    }
}

/* x: [rows, in], rows x_stride apart; weight: [out] rows of `format`; bias: [out] or null; y: [rows, out], rows y_stride
   apart, which is added to if `add`. */
void native_linear(const float *x, long x_stride, long rows, const uint8_t *weight, int format, long in, long out,
                   const float *bias, float *y, long y_stride, int add) {
    if (rows && rows <= FEW_ROWS && in % GROUP == 0) {
        few_rows(x, x_stride, rows, weight, format, in, out, bias, y, y_stride, add);
        return;
    }
    long stride = (in + LANES - 1) / LANES * LANES, bytes = row_bytes(format, in);
    long tiles = (out + TILE - 1) / TILE, blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
#pragma omp parallel if (out * in * (rows + 3) >= PARALLEL)
    {
        float tile[TILE * stride] __attribute__((aligned(64)));
#pragma omp for schedule(dynamic, 8)
        for (long t = 0; t < tiles; t++) {
            long first = t * TILE;
            int count = (int)(out - first < TILE ? out - first : TILE);
            for (int o = 0; o < TILE; o++) {
                /* Behind the last output stands a copy of it, which is not stored. */
                long from = first + (o < count ? o : count - 1);
                expand(format, weight + from * bytes, in, 2 * TILE * bytes, tile + o * stride);
            }
            /* Blocks of rows are as even as they can be. */
            for (long b = 0, row = 0; b < blocks; b++) {
                long some = (rows - row + blocks - b - 1) / (blocks - b);
                multiply[some](x + row * x_stride, x_stride, in, tile, stride, bias ? bias + first : 0,
                               y + row * y_stride + first, y_stride, count, add);
                row += some;
            }
        }
    }
}

/* y += (x * down^T) * up^T, in float32. down: [rank, in], up: [out, rank], formats as above. Returns 1 without memory. */
int native_low_rank(const float *x, long x_stride, long rows, const uint8_t *down, int down_format, const uint8_t *up,
                    int up_format, long in, long rank, long out, float *y, long y_stride) {
    float *between = malloc((size_t)(rows * rank + 1) * sizeof *between);
    if (!between) return 1;
    native_linear(x, x_stride, rows, down, down_format, in, rank, 0, between, rank, 0);
    native_linear(between, rank, rows, up, up_format, rank, out, 0, y, y_stride, 1);
    free(between);
    return 0;
}

/* Bytes that `native_pack` writes. */
long native_packed_bytes(int format, long in, long out) { return out * row_bytes(format, in); }

static float half_of(float value) { return _cvtsh_ss(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }

/* A float16 so many steps from `value`, away from zero. */
static float half_step(float value, int steps) {
    return _cvtsh_ss((unsigned short)(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT) + steps));
}

/* A group's codes for a scale; whether they give the values back, every bit. */
static int encode(const float *w, float scale, float offset, int least, int most, int8_t *codes) {
    int same = 1;
    for (int i = 0; i < GROUP; i++) {
        float code = scale == 0.0f ? 0.0f : rintf((w[i] - offset) / scale);
        code = code < least ? least : code > most ? most : code;
        float product = code * scale;
        same &= half_of(product + offset) == w[i];
        codes[i] = (int8_t)code;
    }
    return same;
}

/* Find the scale from the extremes: what float16 has rounded away is a few of its steps. */
static int encode_group(int format, const float *w, float *scale, float *offset, int8_t *codes) {
    float low = w[0], high = w[0];
    for (int i = 1; i < GROUP; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    float range = high - low, most = 15.0f;
    *offset = low;
    if (format == GRID8) {
        range = -low > high ? -low : high, most = 127.0f;
        *offset = 0.0f;
    }
    if (!(range <= 65504.0f)) return 0;
    float middle = half_of(range / most);
    for (int turn = 0; turn < 9; turn++) {
        int steps = turn % 2 ? (turn + 1) / 2 : -turn / 2;
        *scale = half_step(middle, middle == 0.0f && steps < 0 ? 0 : steps);
        if (encode(w, *scale, *offset, format == GRID8 ? -127 : 0, (int)most, codes)) return 1;
    }
    return 0;
}

/* Pack weight ([out, in] float32, all of it values of float16). Returns whether the format holds every value exactly. */
int native_pack(int format, const float *weight, long in, long out, uint8_t *to) {
    int all = format == HALF || in % GROUP == 0;
    long bytes = row_bytes(format, in);
    for (long o = 0; all && o < out; o++) {
        const float *w = weight + o * in;
        uint8_t *at = to + o * bytes;
        if (format == HALF) {
            for (long i = 0; i < in; i++) ((uint16_t *)at)[i] = _cvtss_sh(w[i], _MM_FROUND_TO_NEAREST_INT);
            continue;
        }
        for (long i = 0; all && i < in; i += GROUP) {
            float scale = 0, offset = 0;
            int8_t codes[GROUP];
            all = encode_group(format, w + i, &scale, &offset, codes);
            if (format == GRID4) {
                for (int c = 0; c < 16; c++) at[c] = (uint8_t)(codes[c] | codes[c + 16] << 4);
                memcpy(at + 16, &scale, 4);
                memcpy(at + 20, &offset, 4);
                at += GRID4_BYTES;
            } else {
                memcpy(at, codes, GROUP);
                memcpy(at + GROUP, &scale, 4);
                at += GRID8_BYTES;
            }
        }
    }
    return all;
}
