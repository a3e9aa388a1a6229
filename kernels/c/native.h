/* What the files of this folder share. They are compiled together on the machine that runs them (`native.py`). */

#include "vector.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Multiplications below which one thread is as fast as several: some twenty microseconds. */
enum { PARALLEL = 1 << 20 };

static inline float read_float(const void *at) {
    float value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Before a loop over a small constant: what it indexes then stays in registers. */
#define UNROLL _Pragma("GCC unroll 16")

/* Weights for floats; packed: in one of linear.c's formats. */
typedef struct {
    const uint8_t *packed;
    const float *bias; /* [out] or null */
    long in, out;
    int format;
} FloatWeight;

/* The kernels that are used by another file, each defined in its own. */
void native_linear(const float *x, long x_stride, long rows, const uint8_t *weight, int format, long in, long out,
                   const float *bias, float *y, long y_stride, int add);
void native_rms_norm(const float *x, const float *residual, long rows, long size, const float *weight, float eps,
                     float *total, float *out);
void native_silu_and_mul(const float *gate_up, long rows, long size, float *out);
void native_rope(const float *q, long q_stride, const float *k, long k_stride, const float *v, long v_stride,
                 const float *table, long half, const int32_t *positions, const int32_t *slots, long tokens,
                 long heads, long kv_heads, long size, float *k_cache, float *v_cache, float *out);
int native_attention(const float *q, const float *k_cache, const float *v_cache, long page_size, long kv_heads,
                     long heads, long size, const int32_t *page_table, long table_stride, const int32_t *query_start,
                     long rows, long tokens, const int32_t *visible, const int32_t *scratch_start,
                     const int32_t *scratch_end, long most, float scale, float *out);
