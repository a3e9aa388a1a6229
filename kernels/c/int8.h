/* Rows quantised to 8 bits, and weights that are multiplied with them (linear_int8.c). */

#include "native.h"

enum { GROUP = 32, PANEL = LANES };

/* A group of a row: values are codes * scale; sum: that of the values; shift: -128 times that of the codes. Rows are
   quantised to [groups, rows] of these, so that those of a group are neighbours. */
typedef struct {
    int8_t codes[GROUP];
    float scale, sum;
    int32_t shift;
} Part;

/* Weights: [panels, groups] blocks of PANEL outputs and 32 inputs, four inputs of an output side by side, zeros beyond the
   last output or input.
   CODES4: value = code * scale + offset. Codes of 0 to 15 (a low half is an input, the high half the one four further),
   then scales and offsets, one an output, in float16.
   CODES8: value = (code - 128) * scale. Codes, then scales in float32. */
enum { CODES4, CODES8 };
enum { CODES4_BYTES = (GROUP / 2 + 4) * PANEL, CODES8_BYTES = (GROUP + 4) * PANEL };

typedef struct {
    const uint8_t *blocks;
    const float *bias; /* [out] or null */
    long in, out;
    int format;
} Int8Weight;

/* A weight and, or null, the two halves of an adapter beside it: x * base^T + (x * down^T) * up^T. */
typedef struct {
    const Int8Weight *base, *down, *up;
} Projection;

static inline long groups_of(long in) { return (in + GROUP - 1) / GROUP; }

/* Values from which on rows are quantised by several threads. */
enum { MANY_VALUES = 1 << 13 };

/* One row, whose groups are put `rows` parts apart; all of [rows, in], a stride apart. */
void quantize_row(const float *x, long in, long rows, Part *to);
void quantize_rows(const float *x, long x_stride, long rows, long in, Part *to);
/* y = the projection of `rows` quantised rows, or y += it; with the adapter's part on the `count` rows that `noisy` lists.
   Returns 1 without memory. */
int int8_project(const Part *x, long rows, const Projection *by, const int64_t *noisy, long count, float *y,
                 long y_stride, int add);
int native_int8_linear(const float *x, long x_stride, long rows, const Int8Weight *base, const Int8Weight *down,
                       const Int8Weight *up, const int64_t *noisy, long count, float *y, long y_stride);
