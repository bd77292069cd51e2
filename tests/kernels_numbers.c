/* kernels_numbers.c: conversions, exp_f32 and the block encoders against plain arithmetic. */
#include "kernels_check.h"
#include <math.h>
#include <string.h>

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* All 65,536 values survive the way up and down; between two neighbours the nearer is taken, and
 * half way the even one. */
static void test_16_bits(const char *name, float (*up)(uint16_t), uint16_t (*down)(float),
                         uint16_t infinity) {
    size_t lost = 0, wrong = 0;
    for (uint32_t i = 0; i < 65536; i++) {
        uint16_t bits = (uint16_t)i, size = bits & 0x7fff;
        if (size > infinity) {
            lost += !isnan(up(bits)) || !isnan(up(down(up(bits))));
            continue;
        }
        lost += down(up(bits)) != bits;
        if (size + 1 >= infinity)
            continue;
        double middle = ((double)up(bits) + up(bits + 1)) / 2;
        float m = (float)middle; // exact
        wrong += down(m) != (uint16_t)(bits & 1 ? bits + 1 : bits);
        wrong += down(float_of(bits_of(m) - 1)) != bits;
        wrong += down(float_of(bits_of(m) + 1)) != (uint16_t)(bits + 1);
    }
    check(lost == 0, "%s: %zu values do not survive", name, lost);
    check(wrong == 0, "%s: %zu values round wrong", name, wrong);
}

static void test_conversions(void) {
    test_16_bits("f16", f16_to_f32, f32_to_f16, 0x7c00);
    test_16_bits("bf16", bf16_to_f32, f32_to_bf16, 0x7f80);
    check(f16_to_f32(0x3c00) == 1 && f16_to_f32(0xc000) == -2, "f16: 1 and -2");
    check(f16_to_f32(0x0001) == 0x1p-24f && f16_to_f32(0x7bff) == 65504, "f16: ends");
    check(bf16_to_f32(0x3f80) == 1 && bf16_to_f32(0x0001) == 0x1p-133f, "bf16: ends");
    check(f32_to_f16(65519.996f) == 0x7bff && f32_to_f16(65520) == 0x7c00, "f16: overflow");
    check(f32_to_f16(1e-30f) == 0 && f32_to_f16(-1e-30f) == 0x8000, "f16: underflow");
    check(f32_to_bf16(3.4e38f) == 0x7f80 && f32_to_bf16(-INFINITY) == 0xff80, "bf16: overflow");
#if defined(__FLT16_MANT_DIG__)
    size_t wrong = 0;
    for (uint64_t i = 0; i < 1u << 24; i += quick ? 61 : 1) {
        float x = float_of((uint32_t)(i * 257 + i % 256));
        _Float16 half = (_Float16)x;
        uint16_t bits;
        memcpy(&bits, &half, sizeof bits);
        wrong += f32_to_f16(x) != bits && !isnan(x);
    }
    check(wrong == 0, "f16: %zu values unlike _Float16's", wrong);
#endif
}

/* Over all floats in steps of 37, or quicker ones: no more than 2 ulp from exp in double. */
static void test_exp(void) {
    size_t finite = 0;
    double worst = 0;
    float at = 0;
    for (uint64_t i = 0; i < 0xff800000u; i += quick ? 3701 : 37) {
        float x = float_of((uint32_t)i);
        if (isnan(x))
            continue;
        double want = exp((double)x);
        if (want > 3.40282357e38) { // rounds to infinity
            finite += exp_f32(x) != INFINITY;
            continue;
        }
        int exponent;
        frexp(want, &exponent);
        double ulp = ldexp(1, exponent - 24 > -149 ? exponent - 24 : -149);
        double off = fabs(exp_f32(x) - want) / ulp;
        if (off > worst) {
            worst = off;
            at = x;
        }
    }
    check(finite == 0, "exp: %zu values do not overflow", finite);
    check(worst <= 2, "exp(%a) is off by %.3f ulp", at, worst);
    check(exp_f32(0) == 1 && exp_f32(-0.0f) == 1, "exp(0)");
    check(exp_f32(-INFINITY) == 0 && exp_f32(INFINITY) == INFINITY, "exp(infinity)");
    check(isnan(exp_f32(NAN)), "exp(NaN)");
}

/* How far one weight may come back off, as a share of the largest: OTHERWISE for all but 4 bits and
 * rotated kinds, where it pays for its whole group. */
static double tolerance(uint32_t kind, double otherwise) {
    if (kind == LLAMA_Q4 || kind == LLAMA_Q4E) return 0.17;
    return kind == LLAMA_Q4R ? 0.5 : kind == LLAMA_Q8R ? 0.03 : otherwise;
}

/* Encodes random rows of a size; the error must stay within half a step of the codes, or what the
 * search for a scale cuts off the largest weight where that serves the others. */
static void test_encoder(uint32_t kind, float size) {
    const struct kind *k = kind_find(kind);
    float x[TILE_ROWS * GROUP], y[TILE_ROWS * GROUP];
    uint8_t block[sizeof(struct block_q8)];
    double worst = 0, square = 0, error = 0;
    const double step = 127 * 0x1p-25 * (k->rotated ? GROUP * ROTATED_INPUT : 1); // a scale's
    for (int round = 0; round < (quick ? 20 : 200); round++) {
        fill(x, TILE_ROWS * GROUP, size);
        memset(x + 32, 0, 32 * sizeof *x); // row 1: zeros; row 2: one weight
        memset(x + 64, 0, 31 * sizeof *x);
        kind_encode(k, x, block);
        kind_decode(k, block, y);
        for (size_t r = 0; r < TILE_ROWS; r++) {
            float most = 0;
            for (size_t c = 0; c < GROUP; c++)
                most = fmaxf(most, fabsf(x[r * GROUP + c]));
            for (size_t c = 0; c < GROUP; c++) {
                double off = fabs((double)x[r * GROUP + c] - y[r * GROUP + c]);
                worst = fmax(worst, (off - step) / (most + 1e-30));
                square += (double)x[r * GROUP + c] * x[r * GROUP + c];
                error += off * off;
            }
        }
    }
    double relative = sqrt(error / square);
    // even numbers, rotated, crowd around their middle, which q8's even steps serve less well
    const double rms = kind == LLAMA_Q8 ? 0.0036 : kind == LLAMA_Q8R ? 0.0065 : 0.09;
    check(worst <= tolerance(kind, 0.012) && relative <= rms, "%s of size %g: off by %g, rms %g",
          k->name, size, worst, relative);
}

static void test_extremes(uint32_t kind) {
    const struct kind *k = kind_find(kind);
    float x[TILE_ROWS * GROUP] = {0}, y[TILE_ROWS * GROUP];
    uint8_t block[sizeof(struct block_q8)];
    size_t wrong = 0;
    for (uint32_t i = 0; i < TILE_ROWS * k->columns; i += 7)
        x[i] = i % 2 ? -k->limit : k->limit;
    kind_encode(k, x, block);
    kind_decode(k, block, y);
    for (uint32_t i = 0; i < TILE_ROWS * k->columns; i++)
        wrong += !(fabs((double)x[i] - y[i]) <= k->limit * tolerance(kind, 0));
    check(wrong == 0, "%s: %zu weights at the limit come back wrong", k->name, wrong);
    for (uint32_t i = 0; i < TILE_ROWS * k->columns; i++)
        x[i] = i % 2 ? 1e-40f : -1e-45f; // too small for any f16 scale
    kind_encode(k, x, block);
    kind_decode(k, block, y);
    for (uint32_t i = 0; i < TILE_ROWS * k->columns; i++)
        wrong += fabsf(y[i]) > 1.01e-40f;
    check(wrong == 0, "%s: %zu tiny weights come back wrong", k->name, wrong);
}

/* Rows of a matrix come back from their strips, whatever the sizes. */
static void test_decode_row(uint32_t kind) {
    const struct kind *k = kind_find(kind);
    enum { ROWS = 35, COLUMNS = 77 };
    static float x[48][96], row[COLUMNS];
    size_t strip = kind_strip_bytes(k, COLUMNS), wrong = 0;
    uint8_t *data = guarded(kind_matrix_bytes(k, ROWS, COLUMNS));
    memset(x, 0, sizeof x);
    for (size_t r = 0; r < ROWS; r++)
        fill(x[r], COLUMNS, 1);
    for (size_t s = 0; s < 3; s++)
        for (size_t c = 0; c < COLUMNS; c += k->columns) {
            float values[TILE_ROWS * GROUP];
            for (size_t r = 0; r < TILE_ROWS; r++)
                memcpy(values + r * k->columns, &x[s * 16 + r][c], k->columns * sizeof *values);
            kind_encode(k, values, data + s * strip + c / k->columns * k->block_bytes);
        }
    for (size_t r = 0; r < ROWS; r++) {
        kind_decode_row(k, data, COLUMNS, r, row);
        for (size_t c = 0; c < COLUMNS; c++)
            wrong += !(fabsf(row[c] - x[r][c]) <= tolerance(kind, kind == 0 ? 0 : 0.012));
    }
    check(wrong == 0, "%s: %zu elements of decoded rows wrong", k->name, wrong);
    release_all();
}

void test_numbers(void) {
    test_conversions();
    test_exp();
    for (uint32_t kind = 0; kind <= LLAMA_Q4E; kind++) {
        if (!kind_find(kind)) continue;
        test_extremes(kind);
        test_decode_row(kind);
    }
    for (float size = 1e-2f; size < 1e5f; size *= 10) {
        test_encoder(LLAMA_Q8, size);
        test_encoder(LLAMA_Q8R, size);
        if (size < 2e4f) test_encoder(LLAMA_Q4, size);
        if (size < 2e4f) test_encoder(LLAMA_Q4R, size);
        if (size < 2e4f) test_encoder(LLAMA_Q4E, size);
    }
    check(!kind_find(4) && !kind_find(LLAMA_Q4E + 1), "kinds 4 or %d exist", LLAMA_Q4E + 1);
}
