/* Root-mean-square norms and the gated activation; the arithmetic of norm.py's torch path, row by row. */

#include "native.h"

/* out = rms_norm(x + residual) * weight; [rows, size] each. residual may be null; else total takes the sum. */
void native_rms_norm(const float *x, const float *residual, long rows, long size, const float *weight, float eps,
                     float *total, float *out) {
    for (long r = 0; r < rows; r++, x += size, out += size) {
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < size; i += 16) {
            __mmask16 lanes = lanes_before(size - i);
            __m512 value = _mm512_maskz_loadu_ps(lanes, x + i);
            if (residual) {
                value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, residual + i));
                _mm512_mask_storeu_ps(total + i, lanes, value);
            }
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float *from = residual ? total : x;
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + eps));
        for (long i = 0; i < size; i += 16) {
            __mmask16 lanes = lanes_before(size - i);
            __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, from + i), scale);
            _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, weight + i)));
        }
        if (residual) residual += size, total += size;
    }
}

/* out = silu(gate) * up; gate_up: [rows, 2 * size], gate first; out: [rows, size]. */
void native_silu_and_mul(const float *gate_up, long rows, long size, float *out) {
    for (long r = 0; r < rows; r++, gate_up += 2 * size, out += size) {
        for (long i = 0; i < size; i += 16) {
            __mmask16 lanes = lanes_before(size - i);
            __m512 gate = _mm512_maskz_loadu_ps(lanes, gate_up + i);
            __m512 up = _mm512_maskz_loadu_ps(lanes, gate_up + size + i);
            __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
            _mm512_mask_storeu_ps(out + i, lanes, _mm512_mul_ps(_mm512_div_ps(gate, below), up));
        }
    }
}
