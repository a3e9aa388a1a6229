/* Rotary positions and the write of keys and values; the arithmetic of rope.py's torch path, bit for bit. */

#include "native.h"

/* x * cos + rotate_half(x) * sin over the first 2 * half values of a head of `size`. */
static void rotate(const float *x, const float *cosines, const float *sines, long half, long size, float *out) {
    for (long i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        out[i] = low * cosines[i] + high * -sines[i];
        out[i + half] = high * cosines[i] + low * sines[i];
    }
    for (long i = 2 * half; i < size; i++) out[i] = x[i];
}

/* q: [tokens, heads, size], k and v: [tokens, kv_heads, size], tokens a stride apart; table: [positions, 2 * half];
   k_cache, v_cache: [slots, kv_heads, size]; out: [tokens, heads, size]. */
void native_rope(const float *q, long q_stride, const float *k, long k_stride, const float *v, long v_stride,
                 const float *table, long half, const int32_t *positions, const int32_t *slots, long tokens,
                 long heads, long kv_heads, long size, float *k_cache, float *v_cache, float *out) {
    for (long t = 0; t < tokens; t++) {
        const float *cosines = table + positions[t] * 2 * half, *sines = cosines + half;
        long at = (long)slots[t] * kv_heads * size;
        for (long h = 0; h < heads; h++)
            rotate(q + t * q_stride + h * size, cosines, sines, half, size, out + (t * heads + h) * size);
        for (long h = 0; h < kv_heads; h++)
            rotate(k + t * k_stride + h * size, cosines, sines, half, size, k_cache + at + h * size);
        memcpy(v_cache + at, v + t * v_stride, (size_t)(kv_heads * size) * sizeof *v);
    }
}
