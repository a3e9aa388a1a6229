/* Root-mean-square norms and the gated activation; the arithmetic of norm.py's torch path, row by row. */

#include "native.h"

/* out = rms_norm(x + residual) * weight; [rows, size] each. residual may be null; else total takes the sum. */
void native_rms_norm(const float *x, const float *residual, long rows, long size, const float *weight, float eps,
                     float *total, float *out) {
    for (long r = 0; r < rows; r++, x += size, out += size) {
        Floats squares = v_zero();
        for (long i = 0; i < size; i += LANES) {
            Mask lanes = lanes_before(size - i);
            Floats value = v_load_some(lanes, x + i);
            if (residual) {
                value = v_add(value, v_load_some(lanes, residual + i));
                v_store_some(total + i, lanes, value);
            }
            squares = v_fma(value, value, squares);
        }
        const float *from = residual ? total : x;
        Floats scale = v_all(1.0f / sqrtf(v_sum(squares) / (float)size + eps));
        for (long i = 0; i < size; i += LANES) {
            Mask lanes = lanes_before(size - i);
            Floats value = v_mul(v_load_some(lanes, from + i), scale);
            v_store_some(out + i, lanes, v_mul(value, v_load_some(lanes, weight + i)));
        }
        if (residual) residual += size, total += size;
    }
}

/* out = silu(gate) * up; gate_up: [rows, 2 * size], gate first; out: [rows, size]. */
void native_silu_and_mul(const float *gate_up, long rows, long size, float *out) {
    for (long r = 0; r < rows; r++, gate_up += 2 * size, out += size) {
        for (long i = 0; i < size; i += LANES) {
            Mask lanes = lanes_before(size - i);
            Floats gate = v_load_some(lanes, gate_up + i);
            Floats up = v_load_some(lanes, gate_up + size + i);
            v_store_some(out + i, lanes, v_mul(silu(gate), up));
        }
    }
}
