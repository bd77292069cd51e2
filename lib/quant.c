/* quant.c: the table of block kinds, and the plain way in and out of each.
 *
 * Clear rather than fast: kernels never come here. Decoding serves embedding rows and checks;
 * encoding serves quantize.py, once a model. Both are exact about rounding, because what they
 * write is what every kernel on every machine reads. */
#include "fit.h"
#include "llama.h"
#include <float.h>
#include <math.h>
#include <string.h>

static uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* f16:   sign 1 | exponent 5, bias 15  | fraction 10
 * bf16:  sign 1 | exponent 8, bias 127 | fraction 7     (the upper half of an f32)
 * f32:   sign 1 | exponent 8, bias 127 | fraction 23 */
float f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31;
    uint32_t fraction = bits & 0x3ff;
    if (exponent == 31) // infinity, or NaN made quiet as the hardware does
        return bits_float(sign | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    if (exponent == 0) // zero and subnormals: units of 2^-24
        return bits_float(sign | float_bits((float)fraction * 0x1p-24f));
    return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t f32_to_f16(float value) {
    uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff));
    if (bits >= 0x477ff000) // 65520, half way past the largest, rounds to infinity
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) // below 2^-14: 0.5 + x has steps of 2^-24, the subnormals' unit
        return (uint16_t)(sign | (float_bits(bits_float(bits) + 0.5f) - 0x3f000000));
    bits += 0xfff + (bits >> 13 & 1); // half way goes to even
    return (uint16_t)(sign | (bits - 0x38000000) >> 13);
}

float bf16_to_f32(uint16_t bits) {
    return bits_float((uint32_t)bits << 16);
}

uint16_t f32_to_bf16(float value) {
    uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Half to even, for |x| < 2^22: at 1.5 * 2^23 the step of a float is 1. */
static float round_even(float x) {
    return x + 0x1.8p23f - 0x1.8p23f;
}

// ---- f32, f16, bf16: a block is one column of TILE_ROWS values

static void decode_row_f32(const void *block, uint32_t row, float *values) {
    memcpy(values, (const uint8_t *)block + 4 * row, sizeof *values);
}

static uint16_t load_u16(const void *block, uint32_t i) {
    uint16_t bits;
    memcpy(&bits, (const uint8_t *)block + 2 * i, sizeof bits);
    return bits;
}

static void decode_row_f16(const void *block, uint32_t row, float *values) {
    *values = f16_to_f32(load_u16(block, row));
}

static void decode_row_bf16(const void *block, uint32_t row, float *values) {
    *values = bf16_to_f32(load_u16(block, row));
}

static void encode_f32(const float *values, void *block) {
    memcpy(block, values, TILE_ROWS * sizeof *values);
}

static void encode_f16(const float *values, void *block) {
    for (int r = 0; r < TILE_ROWS; r++) {
        uint16_t bits = f32_to_f16(values[r]);
        memcpy((uint8_t *)block + 2 * r, &bits, sizeof bits);
    }
}

static void encode_bf16(const float *values, void *block) {
    for (int r = 0; r < TILE_ROWS; r++) {
        uint16_t bits = f32_to_bf16(values[r]);
        memcpy((uint8_t *)block + 2 * r, &bits, sizeof bits);
    }
}

// ---- q8

static void decode_row_q8(const void *block, uint32_t row, float *values) {
    const struct block_q8 *b = block;
    float d = f16_to_f32(b->d[row]);
    for (int c = 0; c < GROUP; c++)
        values[c] = d * (float)b->q[c / 4][row][c % 4];
}

void q8_pack(const float *values, const float *scale, struct block_q8 *b) {
    for (int r = 0; r < TILE_ROWS; r++) {
        b->d[r] = f32_to_f16(scale[r]);
        for (int c = 0; c < GROUP; c++) {
            float code = scale[r] > 0 ? values[c * TILE_ROWS + r] / scale[r] : 0;
            code = round_even(code < -127 ? -127 : code > 127 ? 127 : code);
            b->q[c / 4][r][c % 4] = (int8_t)code;
        }
    }
}

static void turn(const float *values, float turned[GROUP * TILE_ROWS]) {
    for (int c = 0; c < GROUP; c++)
        for (int r = 0; r < TILE_ROWS; r++) turned[c * TILE_ROWS + r] = values[r * GROUP + c];
}

static void encode_q8(const float *values, void *block) {
    float turned[GROUP * TILE_ROWS], scale[TILE_ROWS];
    turn(values, turned);
    fit_q8(turned, scale);
    q8_pack(turned, scale, block);
}

// ---- q4

static float q4_scale(uint16_t d) { return f16_to_f32(d & Q4_SCALE_BITS) / Q4_SCALE; }

/* Those that, each group with its best scale and shift, leave the least squared error of the
 * matrices of a small Llama (Lloyd's method). */
static const struct levels q4_levels = {
    {-127, -101, -80, -63, -48, -34, -22, -10, 2, 13, 26, 38, 53, 68, 85, 107},
    {-114, -90.5f, -71.5f, -55.5f, -41, -28, -16, -4, 7.5f, 19.5f, 32, 45.5f, 60.5f, 76.5f, 96},
};
static const struct levels q4e_levels = {
    {-120, -104, -88, -72, -56, -40, -24, -8, 8, 24, 40, 56, 72, 88, 104, 120},
    {-112, -96, -80, -64, -48, -32, -16, 0, 16, 32, 48, 64, 80, 96, 112},
};

static void decode_row_levels(const struct levels *levels, const void *block, uint32_t row,
                              float *values) {
    const struct block_q4 *b = block;
    const float scale = q4_scale(b->d[row]);
    const int shift = q4_shift(b->d[row]);
    for (int c = 0; c < GROUP / 2; c++) {
        const uint8_t byte = b->q[c / 4][row][c % 4];
        values[c] = scale * (float)(levels->at[byte & 15] + shift);
        values[c + GROUP / 2] = scale * (float)(levels->at[byte >> 4] + shift);
    }
}

static void decode_row_q4(const void *block, uint32_t row, float *values) {
    decode_row_levels(&q4_levels, block, row, values);
}

static void decode_row_q4e(const void *block, uint32_t row, float *values) {
    decode_row_levels(&q4e_levels, block, row, values);
}

void q4_pack(const struct levels *levels, const float *values, const float *scale,
             const float *shift, struct block_q4 *b) {
    for (int r = 0; r < TILE_ROWS; r++) {
        b->d[r] = (uint16_t)(f32_to_f16(scale[r] * Q4_SCALE) |
                             ((int)shift[r] - Q4_LEAST_SHIFT) / 2);
        for (int c = 0; c < GROUP; c++) {
            const int code = q4_code(levels, values[c * TILE_ROWS + r], scale[r], shift[r]);
            uint8_t *byte = &b->q[c % 16 / 4][r][c % 4];
            *byte = c < GROUP / 2 ? (uint8_t)code : (uint8_t)(*byte | code << 4);
        }
    }
}

static void encode_levels(const struct levels *levels, const float *values, void *block) {
    float turned[GROUP * TILE_ROWS], importance[GROUP], scale[TILE_ROWS], shift[TILE_ROWS];
    for (int c = 0; c < GROUP; c++) importance[c] = 1;
    turn(values, turned);
    fit_q4(levels, turned, importance, scale, shift);
    q4_pack(levels, turned, scale, shift, block);
}

static void encode_q4(const float *values, void *block) {
    encode_levels(&q4_levels, values, block);
}

static void encode_q4e(const float *values, void *block) {
    encode_levels(&q4e_levels, values, block);
}

// ---- rotated

void hadamard(float *x, size_t n) {
    for (size_t h = 1; n % (2 * h) == 0; h *= 2)
        for (size_t j = 0; j < n; j++)
            if (!(j & h)) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
}

void rotate_group(float *x, float size) {
    hadamard(x, GROUP);
    for (int j = 0; j < GROUP; j++) x[j] *= size;
}

// ---- the table

enum { Q8_BYTES = sizeof(struct block_q8), Q4_BYTES = sizeof(struct block_q4) };
#define Q8_LIMIT (127 * 65504.0f)
#define Q4_LIMIT (107 * Q4_MOST_SCALE)
#define Q4E_LIMIT (120 * Q4_MOST_SCALE)
#define ROTATED_MOST (GROUP * ROTATED_WEIGHT) // what rotation makes of 32 weights of 1, at most

static const struct kind kinds[] = {
    // by their numbers in llama.h; 4 was a kind of 16 equal steps
    {"f32", 1, 64, FLT_MAX, decode_row_f32, encode_f32, 0, NULL},
    {"f16", 1, 32, 65504, decode_row_f16, encode_f16, 0, NULL},
    {"bf16", 1, 32, 0x1.fep127f, decode_row_bf16, encode_bf16, 0, NULL},
    {"q8", GROUP, Q8_BYTES, Q8_LIMIT, decode_row_q8, encode_q8, 0, NULL},
    [LLAMA_Q4] = {"q4", GROUP, Q4_BYTES, Q4_LIMIT, decode_row_q4, encode_q4, 0,
                  &q4_levels},
    {"q8r", GROUP, Q8_BYTES, Q8_LIMIT / ROTATED_MOST, decode_row_q8, encode_q8, 1, NULL},
    {"q4r", GROUP, Q4_BYTES, Q4_LIMIT / ROTATED_MOST, decode_row_q4, encode_q4, 1, &q4_levels},
    {"q4e", GROUP, Q4_BYTES, Q4E_LIMIT, decode_row_q4e, encode_q4e, 0, &q4e_levels},
};

const struct kind *kind_find(uint32_t kind) {
    return kind < sizeof kinds / sizeof *kinds && kinds[kind].name ? &kinds[kind] : NULL;
}

uint64_t kind_strip_bytes(const struct kind *kind, uint64_t columns) {
    return (columns + kind->columns - 1) / kind->columns * kind->block_bytes;
}

uint64_t kind_matrix_bytes(const struct kind *kind, uint64_t rows, uint64_t columns) {
    return (rows + TILE_ROWS - 1) / TILE_ROWS * kind_strip_bytes(kind, columns);
}

void kind_encode(const struct kind *kind, const float *values, void *block) {
    float rotated[TILE_ROWS * GROUP];
    if (kind->rotated) {
        memcpy(rotated, values, sizeof rotated);
        for (int r = 0; r < TILE_ROWS; r++) rotate_group(rotated + r * GROUP, ROTATED_WEIGHT);
        values = rotated;
    }
    kind->encode(values, block);
}

static void decode_row(const struct kind *kind, const void *block, uint32_t row, float *values) {
    kind->decode_row(block, row, values);
    if (kind->rotated) rotate_group(values, ROTATED_INPUT);
}

void kind_decode(const struct kind *kind, const void *block, float *values) {
    for (uint32_t r = 0; r < TILE_ROWS; r++)
        decode_row(kind, block, r, values + r * kind->columns);
}

void kind_decode_row(const struct kind *kind, const void *data, uint64_t columns, uint64_t row,
                     float *out) {
    const uint8_t *block = (const uint8_t *)data
                           + row / TILE_ROWS * kind_strip_bytes(kind, columns);
    uint64_t whole = columns / kind->columns, rest = columns % kind->columns;
    float last[GROUP];
    for (uint64_t i = 0; i < whole; i++, block += kind->block_bytes, out += kind->columns)
        decode_row(kind, block, row % TILE_ROWS, out);
    if (rest) {
        decode_row(kind, block, row % TILE_ROWS, last);
        memcpy(out, last, rest * sizeof *out);
    }
}
