/* fit.h: which scale, and at 4 bits which shift, serves a group of weights best.
 *
 * Plain C, without one intrinsic: each ISA file compiles it with its own flags, one row of a strip
 * being one lane, and no sum changes its order, so all find the same bits. Each try chooses the
 * nearest levels for a scale and a shift, then works out from five sums the best scale and shift
 * for those levels, rounded as they will be stored, and the error that these leave. */
#ifndef FIT_H
#define FIT_H
#include "quant.h"
#include <math.h>
#include <string.h>

typedef float lanes[TILE_ROWS];

struct fitting {
    const struct levels *levels;
    const lanes *x;           // (GROUP) columns of one group, each (TILE_ROWS)
    const float *importance;  // (GROUP)
    lanes w, wx, wxx;         // sums over the columns: of importance w, w x, w x^2
    lanes scale, shift;       // the best so far,
    lanes error;              // and the weighted squared error that it leaves
};

static inline float fit_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A scale as it can be stored, an f16 over Q4_SCALE whose fraction has 4 bits: half away from
 * zero, at most Q4_MOST_SCALE, below f16's normal numbers to its own even steps. */
static inline float fit_scale(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    const float normal = fit_bits((bits + 0x40000) & 0xfff80000u);
    const float small = scale + 0.75f - 0.75f; // steps of 2^-24
    scale = fabsf(scale) < 0x1p-14f / Q4_SCALE ? small : normal;
    scale = scale > Q4_MOST_SCALE ? Q4_MOST_SCALE : scale;
    return scale < -Q4_MOST_SCALE ? -Q4_MOST_SCALE : scale;
}

static inline float fit_shift(float shift) {
    shift = shift < Q4_LEAST_SHIFT ? Q4_LEAST_SHIFT : shift;
    shift = shift > Q4_MOST_SHIFT ? Q4_MOST_SHIFT : shift;
    return (shift * 0.5f + 0x1.8p23f - 0x1.8p23f) * 2; // even numbers only
}

/* 1 / scale; of a scale that is 0, 0. */
static inline float fit_inverse(float scale) {
    return fabsf(scale) < 0x1p-100f ? 0 : 1 / scale;
}

/* Keeps the scale and shift that suit the levels nearest to x * INVERSE - SHIFT, of the rows where
 * they leave less than what was kept. */
static inline void fit_try(struct fitting *f, const lanes inverse, const lanes shift) {
    lanes q1 = {0}, q2 = {0}, xq = {0}; // sums of w q, w q^2, w x q
    float steps[15], middles[15];
    for (int i = 0; i < 15; i++) {
        steps[i] = (float)(f->levels->at[i + 1] - f->levels->at[i]);
        middles[i] = f->levels->middles[i];
    }
    for (int c = 0; c < GROUP; c++) {
        const float w = f->importance[c];
        for (int r = 0; r < TILE_ROWS; r++) {
            const float y = f->x[c][r] * inverse[r] - shift[r];
            float q = f->levels->at[0];
            for (int i = 0; i < 15; i++)
                q += y > middles[i] ? steps[i] : 0;
            q1[r] += w * q;
            q2[r] += w * q * q;
            xq[r] += w * q * f->x[c][r];
        }
    }
    for (int r = 0; r < TILE_ROWS; r++) {
        const float w = f->w[r], wx = f->wx[r], det = w * q2[r] - q1[r] * q1[r];
        // least squares for x = scale q + offset, then the shift as stored, then its own scale
        float scale = det > 0 ? (w * xq[r] - q1[r] * wx) / det : 0;
        const float o = fit_shift((wx * fit_inverse(scale) - q1[r]) / (w > 0 ? w : 1));
        const float qq = q2[r] + 2 * o * q1[r] + o * o * w, xqo = xq[r] + o * wx;
        scale = fit_scale(qq > 0 ? xqo / qq : 0);
        const float error = f->wxx[r] - scale * (2 * xqo - scale * qq);
        const int better = error < f->error[r];
        f->scale[r] = better ? scale : f->scale[r];
        f->shift[r] = better ? o : f->shift[r];
        f->error[r] = better ? error : f->error[r];
    }
}

/* Tries from the rows' extremes: the levels, either way up, may lie around zero or around the
 * middle of the extremes, and reach a little less or more far than they do; the best is tried
 * again from where it came to. */
static void fit_q4(const struct levels *levels, const float *values, const float *importance,
                   float *scale, float *shift) {
    // values (GROUP, TILE_ROWS), importance (GROUP), scale and shift (TILE_ROWS)
    static const float reaches[] = {0.74f, 0.82f, 0.88f, 0.93f, 0.98f, 1.03f, 1.09f, 1.18f};
    static const float centres[] = {0, 0.5f, 1};
    const float top = levels->at[15], bottom = levels->at[0];
    struct fitting f = {.levels = levels, .x = (const lanes *)(const void *)values,
                        .importance = importance};
    lanes most, least, inverse, start;
    for (int r = 0; r < TILE_ROWS; r++) most[r] = -INFINITY, least[r] = INFINITY;
    for (int c = 0; c < GROUP; c++) {
        const float w = importance[c];
        for (int r = 0; r < TILE_ROWS; r++) {
            const float x = f.x[c][r];
            f.w[r] += w;
            f.wx[r] += w * x;
            f.wxx[r] += w * x * x;
            most[r] = w > 0 && x > most[r] ? x : most[r];
            least[r] = w > 0 && x < least[r] ? x : least[r];
        }
    }
    for (int r = 0; r < TILE_ROWS; r++) f.error[r] = f.wxx[r]; // of scale 0
    for (int way = 1; way >= -1; way -= 2)
        for (size_t m = 0; m < sizeof centres / sizeof *centres; m++)
            for (size_t i = 0; i < sizeof reaches / sizeof *reaches; i++) {
                const float high = way > 0 ? top : -bottom, low = way > 0 ? bottom : -top;
                for (int r = 0; r < TILE_ROWS; r++) {
                    // around zero the farther extreme decides; around the middle, their distance
                    const float up = most[r] / high, down = least[r] / low;
                    const float zero = up > down ? up : down;
                    const float middle = (most[r] - least[r]) / (high - low);
                    const float s = (zero + centres[m] * (middle - zero)) * reaches[i];
                    const float at = centres[m] * 0.5f * (most[r] + least[r] - s * (high + low));
                    inverse[r] = (float)way * fit_inverse(s);
                    start[r] = at * inverse[r];
                }
                fit_try(&f, inverse, start);
            }
    for (int again = 0; again < 3; again++) {
        for (int r = 0; r < TILE_ROWS; r++) inverse[r] = fit_inverse(f.scale[r]);
        memcpy(start, f.shift, sizeof start);
        fit_try(&f, inverse, start);
    }
    memcpy(scale, f.scale, sizeof f.scale);
    memcpy(shift, f.shift, sizeof f.shift);
}

/* A scale as f16 holds it, half to even. */
static inline float fit_f16(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    const float normal = fit_bits((bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000u);
    const float small = scale + 0.75f - 0.75f; // below f16's normal numbers: steps of 2^-24
    scale = scale < 0x1p-14f ? small : normal;
    return scale > 65504 ? 65504 : scale;
}

/* q8: scales from a little more than what the largest weight needs down to a tenth less, which cuts
 * it off and serves the others better. Of the weights' squared error 0.80 to 0.92 is left. */
static void fit_q8(const float *values, float *scale) {
    // values (GROUP, TILE_ROWS), scale (TILE_ROWS)
    enum { TRIES = 24 };
    const lanes *x = (const lanes *)(const void *)values;
    lanes largest = {0}, inverse, gain = {0}, best = {0};
    for (int c = 0; c < GROUP; c++)
        for (int r = 0; r < TILE_ROWS; r++)
            largest[r] = fabsf(x[c][r]) > largest[r] ? fabsf(x[c][r]) : largest[r];
    for (int i = 0; i <= TRIES; i++) {
        lanes xq = {0}, qq = {0};
        for (int r = 0; r < TILE_ROWS; r++)
            inverse[r] = i == TRIES ? fit_inverse(best[r])
                                    : fit_inverse(largest[r]) * (125.7f + 0.65f * (float)i);
        for (int c = 0; c < GROUP; c++)
            for (int r = 0; r < TILE_ROWS; r++) {
                float q = x[c][r] * inverse[r] + 0x1.8p23f - 0x1.8p23f;
                q = q > 127 ? 127 : q;
                q = q < -127 ? -127 : q;
                xq[r] += x[c][r] * q;
                qq[r] += q * q;
            }
        for (int r = 0; r < TILE_ROWS; r++) {
            // the codes' best scale leaves x^2 - (xq)^2 / q^2; the one that is stored a bit more
            const float s = fit_f16(qq[r] > 0 ? xq[r] / qq[r] : 0);
            const float won = s * (2 * xq[r] - s * qq[r]);
            const int better = won > gain[r];
            gain[r] = better ? won : gain[r];
            best[r] = better ? s : best[r];
        }
    }
    memcpy(scale, best, sizeof best);
}
#endif
