/* scalar.c: every kernel in plain C, and the meaning of "right" for the others.
 *
 * The contracts stand in kernels.h; here each is followed step by step, one operation a line
 * where the rounding counts. Runs on any CPU. Nothing here is tuned, so that nothing here needs
 * trust: the fast kernels are tested against these to the last bit. */
#include "../fit.h"
#include "exp.h"
#include "kernels.h"
#include <math.h>
#include <string.h>

static float power_of_two(int k) { // -126 <= k <= 127
    uint32_t bits = (uint32_t)(k + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float exp_f32(float x) {
    if (x != x) return x;
    x = x < EXP_LOW ? EXP_LOW : x;
    x = x > EXP_HIGH ? EXP_HIGH : x;
    float k = fmaf(x, EXP_LOG2E, EXP_ROUND) - EXP_ROUND;
    float r = fmaf(k, -EXP_LN2_HIGH, x);
    r = fmaf(k, -EXP_LN2_LOW, r);
    float p = fmaf(EXP_C6, r, EXP_C5);
    p = fmaf(p, r, EXP_C4);
    p = fmaf(p, r, EXP_C3);
    p = fmaf(p, r, EXP_C2);
    p = fmaf(p, r, 1);
    p = fmaf(p, r, 1);
    int half = (int)floorf(k / 2);
    return p * power_of_two(half) * power_of_two((int)k - half);
}

static float add_lanes(const float lanes[16]) {
    float sum[16];
    memcpy(sum, lanes, sizeof sum);
    for (int step = 8; step >= 1; step /= 2)
        for (int j = 0; j < step; j++)
            sum[j] += sum[j + step];
    return sum[0];
}

static float load_f32(const void *p, size_t i) {
    float value;
    memcpy(&value, (const uint8_t *)p + 4 * i, sizeof value);
    return value;
}

static uint16_t load_u16(const void *p, size_t i) {
    uint16_t bits;
    memcpy(&bits, (const uint8_t *)p + 2 * i, sizeof bits);
    return bits;
}

static float load_f16(const void *p, size_t i) {
    return f16_to_f32(load_u16(p, i));
}

static float load_i8(const void *p, size_t i) {
    return ((const int8_t *)p)[i];
}

static float load_bf16(const void *p, size_t i) {
    return bf16_to_f32(load_u16(p, i));
}

// ---- matmul

typedef float load(const void *p, size_t i);

static void matmul_float(const struct matmul *m, size_t first, size_t last, load *weight) {
    const struct input *in = m->in;
    for (size_t strip = first; strip < last; strip++)
        for (size_t t = 0; t < in->n; t++) {
            const uint8_t *w = m->w + strip * m->strip_bytes; // (columns, TILE_ROWS)
            const float *x = in->x + t * in->x_stride;
            float acc[TILE_ROWS] = {0};
            for (size_t c = 0; c < in->columns; c++)
                for (size_t r = 0; r < TILE_ROWS; r++)
                    acc[r] = fmaf(weight(w, c * TILE_ROWS + r), x[c], acc[r]);
            memcpy(m->y + t * m->y_stride + strip * TILE_ROWS, acc, sizeof acc);
        }
}

static void matmul_f32(const struct matmul *m, size_t first, size_t last) {
    matmul_float(m, first, last, load_f32);
}

static void matmul_f16(const struct matmul *m, size_t first, size_t last) {
    matmul_float(m, first, last, load_f16);
}

static void matmul_bf16(const struct matmul *m, size_t first, size_t last) {
    matmul_float(m, first, last, load_bf16);
}

/* Code C of a group, of 8 or 16 bits. */
static int32_t code_of(const int8_t *q, int bits, int c) {
    const int8_t *high = q + c, *low = high + GROUP;
    return bits == 8 ? *high : 256 * *high + *low;
}

/* One group of one row: the sum of code * q over its columns. */
typedef int32_t dot(const void *block, size_t row, const int8_t *levels, const int8_t *q, int bits);

static int32_t dot_q8(const void *block, size_t row, const int8_t *levels, const int8_t *q,
                      int bits) {
    const struct block_q8 *b = block;
    (void)levels;
    int32_t sum = 0;
    for (int c = 0; c < GROUP; c++)
        sum += b->q[c / 4][row][c % 4] * code_of(q, bits, c);
    return sum;
}

static int32_t dot_q4(const void *block, size_t row, const int8_t *levels, const int8_t *q,
                      int bits) {
    const struct block_q4 *b = block;
    const int shift = q4_shift(b->d[row]);
    int32_t sum = 0;
    for (int c = 0; c < GROUP / 2; c++) {
        uint8_t byte = b->q[c / 4][row][c % 4];
        sum += (levels[byte & 15] + shift) * code_of(q, bits, c);
        sum += (levels[byte >> 4] + shift) * code_of(q, bits, c + GROUP / 2);
    }
    return sum;
}

/* One group of one row: its scale. */
typedef float scale(const void *block, size_t row);

static float scale_q8(const void *block, size_t row) {
    return load_f16(block, row); // d leads the block
}

static float scale_q4(const void *block, size_t row) {
    return f16_to_f32(load_u16(block, row) & Q4_SCALE_BITS) / Q4_SCALE;
}

static void matmul_groups(const struct matmul *m, size_t first, size_t last, dot *sum,
                          scale *scale_of, size_t block_bytes) {
    const struct input *in = m->in;
    const size_t groups = (in->columns + GROUP - 1) / GROUP;
    const size_t group_bytes = GROUP * (size_t)in->bits / 8;
    for (size_t strip = first; strip < last; strip++)
        for (size_t t = 0; t < in->n; t++) {
            const uint8_t *block = m->w + strip * m->strip_bytes;
            float acc[TILE_ROWS] = {0};
            for (size_t g = 0; g < groups; g++, block += block_bytes)
                for (size_t r = 0; r < TILE_ROWS; r++) {
                    const int8_t *q = in->q + (t * groups + g) * group_bytes;
                    float s = (float)sum(block, r, m->levels, q, in->bits);
                    float d = scale_of(block, r) * in->d[t * groups + g];
                    acc[r] = fmaf(s, d, acc[r]);
                }
            memcpy(m->y + t * m->y_stride + strip * TILE_ROWS, acc, sizeof acc);
        }
}

static void matmul_q8(const struct matmul *m, size_t first, size_t last) {
    matmul_groups(m, first, last, dot_q8, scale_q8, sizeof(struct block_q8));
}

static void matmul_q4(const struct matmul *m, size_t first, size_t last) {
    matmul_groups(m, first, last, dot_q4, scale_q4, sizeof(struct block_q4));
}

// ---- one row at a time

/* What stands for x (n) where codes go up to MOST: the scale of a code, and its inverse. */
struct scales { float d, inverse; };

static struct scales scales_for(const float *x, size_t n, float most) {
    float largest = 0;
    int finite = 1;
    for (size_t i = 0; i < n; i++) {
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        finite = finite && fabsf(x[i]) <= 0x1.fffffep127f;
    }
    if (!finite) return (struct scales){NAN, 0};
    if (largest < 0x1p-100f) return (struct scales){0, 0};
    return (struct scales){largest / most, most / largest};
}

static int32_t to_code(float x, float inverse) { // half to even
    return inverse == 0 ? 0 : (int32_t)(x * inverse + 0x1.8p23f - 0x1.8p23f);
}

static void to_q8(int8_t *out, size_t step, float *d, const float *x, size_t n) {
    const struct scales s = scales_for(x, n, 127);
    *d = s.d;
    for (size_t i = 0; i < n; i++)
        out[i * step] = (int8_t)to_code(x[i], s.inverse);
}

static void quantize_row(const float *x, size_t n, int bits, int8_t *q, float *d, int32_t *sum) {
    const size_t group_bytes = GROUP * (size_t)bits / 8;
    for (size_t i = 0, g = 0; i < n; i += GROUP, g++, q += group_bytes) {
        const size_t some = n - i < GROUP ? n - i : GROUP;
        const struct scales s = scales_for(x + i, some, bits == 8 ? 127 : 127 * 256);
        d[g] = s.d;
        sum[g] = 0;
        memset(q, 0, group_bytes);
        for (size_t j = 0; j < some; j++) {
            const int32_t code = to_code(x[i + j], s.inverse);
            const int32_t high = bits == 8 ? code : (code + 32768 + 128) / 256 - 128;
            sum[g] += code;
            q[j] = (int8_t)high;
            if (bits == 16) q[GROUP + j] = (int8_t)(code - 256 * high);
        }
    }
}

static void rotate_row(float *out, const float *x, size_t n) {
    memcpy(out, x, n * sizeof *out);
    for (size_t i = 0; i < n; i += GROUP) rotate_group(out + i, ROTATED_INPUT);
}

static void rms_norm(float *out, const float *x, const float *w, size_t n, float eps) {
    float lanes[16] = {0};
    for (size_t i = 0; i < n; i++)
        lanes[i % 16] = fmaf(x[i], x[i], lanes[i % 16]);
    float s = 1 / sqrtf(add_lanes(lanes) / (float)n + eps);
    for (size_t i = 0; i < n; i++)
        out[i] = w[i] * (x[i] * s);
}

static void rope(float *x, const float *cos, const float *sin, size_t n) {
    for (size_t i = 0; i < n / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = fmaf(a, cos[i], -(b * sin[i]));
        x[2 * i + 1] = fmaf(a, sin[i], b * cos[i]);
    }
}

static void swiglu(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++)
        gate[i] = gate[i] / (1 + exp_f32(-gate[i])) * up[i];
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = f32_to_f16(x[i]);
}

// ---- attention

/* One page for one query: folds N positions into OUT and the state (m, lanes). SCALED: codes,
 * with scales behind them. */
static void attend_page(const float *q, const uint8_t *k, const uint8_t *v, size_t n,
                        size_t head_dim, load *element, int scaled, float *m, float lanes[16],
                        float *out) {
    const uint8_t *k_scales = k + PAGE_POSITIONS * head_dim;
    const uint8_t *v_scales = v + PAGE_POSITIONS * head_dim;
    float s[PAGE_POSITIONS], before = *m;
    for (size_t p = 0; p < n; p++) {
        s[p] = 0;
        for (size_t i = 0; i < head_dim; i++) // k (PAGE_POSITIONS / 16, head_dim, 16)
            s[p] = fmaf(q[i], element(k, (p / 16 * head_dim + i) * 16 + p % 16), s[p]);
        if (scaled) s[p] *= load_f32(k_scales, p);
    }
    for (size_t p = 0; p < n; p++)
        *m = s[p] > *m ? s[p] : *m;
    float scale = before == -INFINITY ? 0 : exp_f32(before - *m);
    for (size_t j = 0; j < 16; j++)
        lanes[j] *= scale;
    for (size_t i = 0; i < head_dim; i++)
        out[i] *= scale;
    for (size_t p = 0; p < n; p++) {
        float w = exp_f32(s[p] - *m);
        lanes[p % 16] += w;
        if (scaled) w *= load_f32(v_scales, p);
        for (size_t i = 0; i < head_dim; i++) // v (PAGE_POSITIONS, head_dim)
            out[i] = fmaf(w, element(v, p * head_dim + i), out[i]);
    }
}

static void attend(const struct attention *a, load *element, size_t element_bytes, int scaled) {
    const size_t heads = a->n_heads * a->n_queries;
    const size_t scale_bytes = scaled ? sizeof(float) : 0;
    const size_t half = PAGE_POSITIONS * (a->head_dim * element_bytes + scale_bytes);
    for (size_t j = 0; j < a->n_rows * heads; j++) {
        const size_t row = j / heads, all = a->n_positions + row;
        const size_t end = all < a->most_positions ? all : a->most_positions;
        const size_t at = row * a->stride + j % heads * a->head_dim;
        const size_t offset = a->offset + 2 * half * (j % heads / a->n_queries);
        float *out = a->out + at, m = -INFINITY, lanes[16] = {0};
        memset(out, 0, a->head_dim * sizeof *out);
        for (size_t p = 0; p < end; p += PAGE_POSITIONS) {
            const uint8_t *keys = a->pages[p / PAGE_POSITIONS] + offset;
            size_t n = end - p < PAGE_POSITIONS ? end - p : PAGE_POSITIONS;
            attend_page(a->q + at, keys, keys + half, n, a->head_dim, element, scaled, &m, lanes,
                        out);
        }
        const float sum = add_lanes(lanes);
        if (a->marks) a->marks[row * a->mark_stride + j % heads] = (struct mark){m, sum};
        for (size_t i = 0; i < a->head_dim; i++)
            out[i] /= sum;
    }
}

static void attend_f32(const struct attention *a) {
    attend(a, load_f32, 4, 0);
}

static void attend_f16(const struct attention *a) {
    attend(a, load_f16, 2, 0);
}

static void attend_q8(const struct attention *a) {
    attend(a, load_i8, 1, 1);
}

void kernels_scalar(struct kernels *k) {
    *k = (struct kernels){
        .isa = "scalar",
        .wide = PLANES,
        .matmul_f32 = matmul_f32,
        .matmul_f16 = matmul_f16,
        .matmul_bf16 = matmul_bf16,
        .matmul_q8 = matmul_q8,
        .matmul_q4 = matmul_q4,
        .quantize_row = quantize_row,
        .rms_norm = rms_norm,
        .rope = rope,
        .swiglu = swiglu,
        .add = add,
        .attend_f32 = attend_f32,
        .attend_f16 = attend_f16,
        .attend_q8 = attend_q8,
        .to_f16 = to_f16,
        .to_q8 = to_q8,
        .rotate_row = rotate_row,
        .hadamard = hadamard,
        .fit_q8 = fit_q8,
        .fit_q4 = fit_q4,
    };
}
