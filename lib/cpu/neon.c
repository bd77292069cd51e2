/* neon.c: the kernels for arm64's 128-bit registers, four registers being the 16 rows of a strip.
 *
 * Compiled twice: for every arm64 CPU, and with DOTPROD for those whose sdot multiplies and adds
 * four bytes a lane at once. A register block of S strips by T tokens is written once, as an
 * inlined function whose S, T and kind are constants where it is called. Compiles to nothing for
 * other machines. */
#if defined(__aarch64__)
#include "exp.h"
#include "kernels.h"
#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <string.h>

/* Register blocks, of 32 registers: 1 strip by 5 tokens of floats, 20 sums that 9 loads feed (of 6
 * tokens gcc keeps two of the sums in memory); 1 by 4 of codes, whose sums as floats wait in L1;
 * 1 by 2 of 16-bit codes, whose integers are two sums a token. */
enum { FLOAT_STRIPS = 1, FLOAT_TOKENS = 5, GROUP_STRIPS = 1, GROUP_TOKENS = 4, GROUP_ONCE = 4,
       WIDE_TOKENS = 2, WIDE_ONCE = 2 };
static const enum wide WIDE = PLANES;

enum { VALUE_LANES = 4, VALUE_WIDTH = 4, MOST_QUERIES = 4 }; // of a page, see blocks.h
/* What a query carries from page to page. */
struct softmax {
    float m;                 // the largest score so far
    float32x4_t lanes[4];    // sums of weights
    float scale;             // what this page does to earlier sums
    float w[PAGE_POSITIONS]; // scores, then weights
};
#include "blocks.h"

INLINE float32x4_t f16_to_four(uint16x4_t bits) {
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

/* Elements i to i + 3 of an array of floats of a kind, or of int8 codes. */
INLINE float32x4_t load4(const void *p, size_t i, enum store kind) {
    if (kind == F32) return vld1q_f32((const float *)p + i);
    if (kind == Q8) {
        uint32_t codes;
        memcpy(&codes, (const int8_t *)p + i, sizeof codes);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(codes)))));
    }
    const uint16x4_t half = vld1_u16((const uint16_t *)p + i);
    if (kind == F16) return f16_to_four(half);
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

/* The same where only N elements are left: zero in the other lanes. */
INLINE float32x4_t load_some(const void *p, size_t i, enum store kind, size_t n) {
    uint32_t rest[4] = {0};
    const size_t size = element_bytes(kind);
    if (n >= 4) return load4(p, i, kind);
    memcpy(rest, (const uint8_t *)p + i * size, n * size);
    return load4(rest, 0, kind);
}

INLINE void store_some(float *p, float32x4_t v, size_t n) {
    float rest[4];
    if (n >= 4) {
        vst1q_f32(p, v);
        return;
    }
    vst1q_f32(rest, v);
    memcpy(p, rest, n * sizeof *p);
}

INLINE size_t left(size_t n, size_t i) {
    return n > i ? n - i : 0;
}

INLINE float32x4_t broadcast(float x) {
    return vdupq_n_f32(x);
}

/* Lanes 0..3, 4..7, 8..11 and 12..15. */
INLINE float add_lanes(const float32x4_t v[4]) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}

/* The steps of exp.h. */
INLINE float32x4_t exp4(float32x4_t x) {
    x = vmaxq_f32(x, broadcast(EXP_LOW)); // of a NaN, max and min give NaN
    x = vminq_f32(x, broadcast(EXP_HIGH));
    float32x4_t k = vfmaq_f32(broadcast(EXP_ROUND), x, broadcast(EXP_LOG2E));
    k = vsubq_f32(k, broadcast(EXP_ROUND));
    float32x4_t r = vfmaq_f32(x, k, broadcast(-EXP_LN2_HIGH));
    r = vfmaq_f32(r, k, broadcast(-EXP_LN2_LOW));
    float32x4_t p = vfmaq_f32(broadcast(EXP_C5), broadcast(EXP_C6), r);
    p = vfmaq_f32(broadcast(EXP_C4), p, r);
    p = vfmaq_f32(broadcast(EXP_C3), p, r);
    p = vfmaq_f32(broadcast(EXP_C2), p, r);
    p = vfmaq_f32(broadcast(1), p, r);
    p = vfmaq_f32(broadcast(1), p, r);
    const int32x4_t bias = vdupq_n_s32(127);
    int32x4_t power = vcvtq_s32_f32(k), half = vshrq_n_s32(power, 1);
    power = vshlq_n_s32(vaddq_s32(vsubq_s32(power, half), bias), 23);
    half = vshlq_n_s32(vaddq_s32(half, bias), 23);
    p = vmulq_f32(p, vreinterpretq_f32_s32(half));
    return vmulq_f32(p, vreinterpretq_f32_s32(power));
}

// ---- matmul: register blocks

enum { MOST_QUARTERS = 8, MOST_SUMS = 24 }; // 4 * S and 4 * S * T: a quarter is 4 rows of a strip

/* The sums of quarter H of the S strips, (4). */
INLINE float *quarter_sums(const struct matmul *m, const struct place *at, int h, int t) {
    return sums_at(m, at, h / 4, t) + h % 4 * 4;
}

INLINE void float_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int S, const int T) {
    const int H = 4 * S;
    const uint8_t *w = m->w + at->strip * m->strip_bytes; // (columns, 16), S of them
    const float *x = m->in->x + at->token * m->in->x_stride;
    float32x4_t acc[MOST_SUMS], column[MOST_QUARTERS];
    UNROLL for (int i = 0; i < H * T; i++)
        acc[i] = at->from ? vld1q_f32(quarter_sums(m, at, i % H, i / H)) : broadcast(0);
    for (size_t c = at->from; c < at->to; c++) {
        if (at->ahead)
            UNROLL for (int s = 0; s < S; s++)
                fetch(w + s * m->strip_bytes + at->ahead + c * TILE_ROWS * element_bytes(kind), 1);
        UNROLL for (int h = 0; h < H; h++)
            column[h] = load4(w + h / 4 * m->strip_bytes, c * TILE_ROWS + h % 4 * 4, kind);
        UNROLL for (int t = 0; t < T; t++) {
            const float value = x[t * m->in->x_stride + c];
            UNROLL for (int h = 0; h < H; h++)
                acc[t * H + h] = vfmaq_n_f32(acc[t * H + h], column[h], value);
        }
    }
    UNROLL for (int i = 0; i < H * T; i++)
        vst1q_f32(quarter_sums(m, at, i % H, i / H), acc[i]);
}

/* Columns 4 * j to 4 * j + 3 of quarter H of a block; of q4 the levels. */
INLINE int8x16_t codes(const uint8_t *block, int j, int h, int8x16_t levels, enum store kind) {
    const uint8_t *q = block + 2 * TILE_ROWS + 16 * h; // the scales stand first
    if (kind == Q8) return vld1q_s8((const int8_t *)q + 64 * j);
    const uint8x16_t both = vld1q_u8(q + 64 * (j % 4));
    const uint8x16_t half = j < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
    return vqtbl1q_s8(levels, half);
}

/* s + the dot products of each lane's four weight codes with the four bytes of lane J of A; lanes
 * are named by constants. */
#if defined(DOTPROD)
INLINE int32x4_t dot(int32x4_t s, int8x16_t w, int8x16_t a, int j) {
    switch (j) {
    case 0: return vdotq_laneq_s32(s, w, a, 0);
    case 1: return vdotq_laneq_s32(s, w, a, 1);
    case 2: return vdotq_laneq_s32(s, w, a, 2);
    default: return vdotq_laneq_s32(s, w, a, 3);
    }
}

INLINE int32x4_t dot_low(int32x4_t s, int8x16_t w, int8x16_t a, int j) {
    return dot(s, w, a, j);
}
#else
INLINE int8x16_t four_of(int8x16_t a, int j) {
    const int32x4_t lanes = vreinterpretq_s32_s8(a);
    return vreinterpretq_s8_s32(j == 0   ? vdupq_laneq_s32(lanes, 0)
                                : j == 1 ? vdupq_laneq_s32(lanes, 1)
                                : j == 2 ? vdupq_laneq_s32(lanes, 2)
                                         : vdupq_laneq_s32(lanes, 3));
}

/* Two products are at most 2 * 128 * 127 = 32512: 16 bits hold their sum. */
INLINE int32x4_t dot(int32x4_t s, int8x16_t w, int8x16_t a, int j) {
    const int8x16_t four = four_of(a, j);
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four));
    return vpadalq_s16(s, vpaddq_s16(low, vmull_high_s8(w, four)));
}

/* The same with low bytes of 16, which may be -128 as a weight may: 16 bits hold one product. */
INLINE int32x4_t dot_low(int32x4_t s, int8x16_t w, int8x16_t a, int j) {
    const int8x16_t four = four_of(a, j);
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(four)));
    return vaddq_s32(s, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(w, four))));
}
#endif

/* What each row of quarter H of a q4 block adds to its levels. */
INLINE int32x4_t shifts(const uint8_t *block, int h) {
    const uint16x4_t d = vld1_u16((const void *)(block + 8 * h));
    const uint32x4_t twice = vshll_n_u16(vand_u16(d, vdup_n_u16(Q4_SHIFT_BITS)), 1);
    return vaddq_s32(vreinterpretq_s32_u32(twice), vdupq_n_s32(Q4_LEAST_SHIFT));
}

INLINE float32x4_t scales(const uint8_t *block, int h, enum store kind) {
    const uint16x4_t d = vld1_u16((const void *)(block + 8 * h));
    if (kind == Q8) return f16_to_four(d);
    return vmulq_n_f32(f16_to_four(vand_u16(d, vdup_n_u16(Q4_SCALE_BITS))), 1 / Q4_SCALE);
}

INLINE void group_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int bits, const int S, const int T) {
    const int H = 4 * S;
    const struct input *in = m->in;
    const size_t groups = count_groups(in), token = at->token * groups;
    const size_t group_bytes = GROUP * (size_t)bits / 8;
    const size_t bytes = kind == Q8 ? sizeof(struct block_q8) : sizeof(struct block_q4);
    const uint8_t *block = m->w + at->strip * m->strip_bytes + at->from * bytes;
    float32x4_t acc[MOST_SUMS];
    int32x4_t sum[MOST_SUMS], high[MOST_SUMS];
    int8x16_t w[MOST_QUARTERS];
    const int8x16_t levels = kind == Q4 ? vld1q_s8(m->levels) : vdupq_n_s8(0);
    UNROLL for (int i = 0; i < H * T; i++)
        acc[i] = at->from ? vld1q_f32(quarter_sums(m, at, i % H, i / H)) : broadcast(0);
    for (size_t g = at->from; g < at->to; g++, block += bytes) {
        if (at->ahead)
            UNROLL for (int s = 0; s < S; s++)
                fetch(block + s * m->strip_bytes + at->ahead, bytes);
        UNROLL for (int h = 0; h < H; h++) {
            const int32x4_t shift = kind == Q4 ? shifts(block + h / 4 * m->strip_bytes, h % 4)
                                               : vdupq_n_s32(0);
            UNROLL for (int t = 0; t < T; t++) {
                sum[t * H + h] = vmulq_n_s32(shift, in->sum[token + t * groups + g]);
                high[t * H + h] = vdupq_n_s32(0);
            }
        }
        UNROLL for (int j = 0; j < GROUP / 4; j++) {
            UNROLL for (int h = 0; h < H; h++)
                w[h] = codes(block + h / 4 * m->strip_bytes, j, h % 4, levels, kind);
            UNROLL for (int t = 0; t < T; t++) {
                const int8_t *q = in->q + (token + t * groups + g) * group_bytes + j / 4 * 16;
                if (bits == 16) {
                    UNROLL for (int h = 0; h < H; h++)
                        high[t * H + h] = dot(high[t * H + h], w[h], vld1q_s8(q), j % 4);
                    q += GROUP;
                }
                UNROLL for (int h = 0; h < H; h++)
                    sum[t * H + h] = bits == 8 ? dot(sum[t * H + h], w[h], vld1q_s8(q), j % 4)
                                               : dot_low(sum[t * H + h], w[h], vld1q_s8(q), j % 4);
            }
        }
        if (bits == 16)
            UNROLL for (int i = 0; i < H * T; i++)
                sum[i] = vaddq_s32(sum[i], vshlq_n_s32(high[i], 8));
        UNROLL for (int h = 0; h < H; h++) {
            const float32x4_t d = scales(block + h / 4 * m->strip_bytes, h % 4, kind);
            UNROLL for (int t = 0; t < T; t++) {
                const float32x4_t scale = vmulq_n_f32(d, in->d[token + t * groups + g]);
                const float32x4_t exact = vcvtq_f32_s32(sum[t * H + h]);
                acc[t * H + h] = vfmaq_f32(acc[t * H + h], exact, scale);
            }
        }
    }
    UNROLL for (int i = 0; i < H * T; i++)
        vst1q_f32(quarter_sums(m, at, i % H, i / H), acc[i]);
}

// ---- one row at a time

/* One whole group. */
INLINE void quantize_group(const float *x, int bits, int8_t *q, float *d, int32_t *sum) {
    const float most_code = bits == 8 ? 127 : 127 * 256;
    float32x4_t v[8], most = broadcast(0);
    int32x4_t code[8];
    UNROLL for (int i = 0; i < 8; i++) {
        v[i] = vld1q_f32(x + 4 * i);
        most = vmaxq_f32(most, vabsq_f32(v[i])); // a NaN stays
    }
    const float largest = vmaxvq_f32(most);
    const int finite = largest <= FLT_MAX;
    *sum = 0;
    *d = !finite ? NAN : largest < 0x1p-100f ? 0 : largest / most_code;
    if (!finite || largest < 0x1p-100f) {
        memset(q, 0, GROUP * (size_t)bits / 8);
        return;
    }
    UNROLL for (int i = 0; i < 8; i++) // half to even
        code[i] = vcvtnq_s32_f32(vmulq_n_f32(v[i], most_code / largest));
    UNROLL for (int i = 0; i < 8; i += 4) {
        const int16x8_t low = vmovn_high_s32(vmovn_s32(code[i]), code[i + 1]);
        const int16x8_t high = vmovn_high_s32(vmovn_s32(code[i + 2]), code[i + 3]);
        const int8x16_t bytes = vmovn_high_s16(vmovn_s16(low), high); // of 16 bits the low ones
        vst1q_s8(bits == 8 ? q + 4 * i : q + GROUP + 4 * i, bytes);
        if (bits == 16) // half up, as the low bytes are signed
            vst1q_s8(q + 4 * i, vrshrn_high_n_s16(vrshrn_n_s16(low, 8), high, 8));
        *sum += vaddlvq_s16(low) + vaddlvq_s16(high);
    }
}

/* Pairs of neighbours in eight lanes: their sums and differences, back in place. */
INLINE void turn_neighbours(float32x4_t v[2]) {
    const float32x4_t a = vuzp1q_f32(v[0], v[1]), b = vuzp2q_f32(v[0], v[1]);
    const float32x4_t sum = vaddq_f32(a, b), difference = vsubq_f32(a, b);
    v[0] = vzip1q_f32(sum, difference);
    v[1] = vzip2q_f32(sum, difference);
}

/* The same for pairs two lanes apart. */
INLINE void turn_halves(float32x4_t v[2]) {
    const float32x4_t a = vcombine_f32(vget_low_f32(v[0]), vget_low_f32(v[1]));
    const float32x4_t b = vcombine_f32(vget_high_f32(v[0]), vget_high_f32(v[1]));
    const float32x4_t sum = vaddq_f32(a, b), difference = vsubq_f32(a, b);
    v[0] = vcombine_f32(vget_low_f32(sum), vget_low_f32(difference));
    v[1] = vcombine_f32(vget_high_f32(sum), vget_high_f32(difference));
}

static void rotate_row(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += GROUP) {
        float32x4_t v[8];
        UNROLL for (int j = 0; j < 8; j++) v[j] = vld1q_f32(x + i + 4 * j);
        UNROLL for (int j = 0; j < 8; j += 2) {
            turn_neighbours(v + j);
            turn_halves(v + j);
        }
        UNROLL for (int h = 1; h < 8; h *= 2)
            UNROLL for (int j = 0; j < 8; j++)
                if (!(j & h)) {
                    const float32x4_t a = v[j], b = v[j + h];
                    v[j] = vaddq_f32(a, b);
                    v[j + h] = vsubq_f32(a, b);
                }
        UNROLL for (int j = 0; j < 8; j++)
            vst1q_f32(out + i + 4 * j, vmulq_n_f32(v[j], ROTATED_INPUT));
    }
}

static void rms_norm(float *out, const float *x, const float *w, size_t n, float eps) {
    float32x4_t lanes[4] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
    for (size_t i = 0; i < n; i += 16)
        UNROLL for (int h = 0; h < 4; h++) {
            const float32x4_t v = load_some(x, i + 4 * h, F32, left(n, i + 4 * h));
            lanes[h] = vfmaq_f32(lanes[h], v, v);
        }
    const float s = 1 / sqrtf(add_lanes(lanes) / (float)n + eps);
    for (size_t i = 0; i < n; i += 4) {
        const float32x4_t scaled = vmulq_n_f32(load_some(x, i, F32, left(n, i)), s);
        store_some(out + i, vmulq_f32(load_some(w, i, F32, left(n, i)), scaled), left(n, i));
    }
}

static void rope(float *x, const float *cos, const float *sin, size_t n) {
    size_t i = 0;
    for (; n - i >= 8; i += 8) { // four pairs
        const float32x4_t c = vld1q_f32(cos + i / 2), s = vld1q_f32(sin + i / 2);
        float32x4x2_t v = vld2q_f32(x + i);
        const float32x4_t a = v.val[0], b = v.val[1];
        v.val[0] = vfmaq_f32(vnegq_f32(vmulq_f32(b, s)), a, c);
        v.val[1] = vfmaq_f32(vmulq_f32(b, c), a, s);
        vst2q_f32(x + i, v);
    }
    rope_rest(x, cos, sin, i, n);
}

static void swiglu(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 4) {
        float32x4_t g = load_some(gate, i, F32, left(n, i));
        g = vdivq_f32(g, vaddq_f32(broadcast(1), exp4(vnegq_f32(g))));
        store_some(gate + i, vmulq_f32(g, load_some(up, i, F32, left(n, i))), left(n, i));
    }
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i += 4) {
        const float32x4_t a = load_some(x, i, F32, left(n, i));
        store_some(x + i, vaddq_f32(a, load_some(y, i, F32, left(n, i))), left(n, i));
    }
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 4) {
        uint16_t half[4];
        vst1_u16(half, vreinterpret_u16_f16(vcvt_f16_f32(load_some(x, i, F32, left(n, i)))));
        memcpy(out + i, half, left(n, i) < 4 ? left(n, i) * sizeof *half : sizeof half);
    }
}

// ---- attention

enum { QUARTERS = PAGE_POSITIONS / 4 }; // a quarter is 4 positions of a tile of 16

INLINE void begin(struct softmax *state) {
    state->m = -INFINITY;
    for (int i = 0; i < 4; i++) state->lanes[i] = broadcast(0);
}

INLINE void score_page(const struct head_page *p, struct query *of, enum store kind, const int Q) {
    for (size_t j = 0; j < PAGE_POSITIONS; j += 16) {
        float32x4_t s[MOST_QUERIES * 4], tile[4];
        UNROLL for (int i = 0; i < Q * 4; i++)
            s[i] = broadcast(0);
        for (size_t i = 0; i < p->head_dim; i++) {
            const size_t at = j * p->head_dim + i * 16;
            fetch(p->next_k + at * element_bytes(kind), 16 * element_bytes(kind));
            UNROLL for (int d = 0; d < 4; d++)
                tile[d] = load4(p->k, at + 4 * d, kind);
            UNROLL for (int h = 0; h < Q; h++)
                UNROLL for (int d = 0; d < 4; d++)
                    s[4 * h + d] = vfmaq_n_f32(s[4 * h + d], tile[d], of[h].q[i]);
        }
        UNROLL for (int i = 0; i < Q * 4; i++) {
            if (kind == Q8)
                s[i] = vmulq_f32(s[i], load4(scales_of(p->k, p->head_dim), j + i % 4 * 4, F32));
            vst1q_f32(of[i / 4].state.w + j + i % 4 * 4, s[i]);
        }
    }
}

/* A page's scores turned into weights, zero from N on; in q8 times the values' scales. */
INLINE void weigh(struct softmax *state, const struct head_page *p, enum store kind) {
    static const uint32_t lane[4] = {0, 1, 2, 3};
    const float before = state->m;
    float32x4_t most = broadcast(before);
    uint32x4_t valid[QUARTERS];
    UNROLL for (int i = 0; i < QUARTERS; i++) {
        valid[i] = vcltq_u32(vaddq_u32(vld1q_u32(lane), vdupq_n_u32(4 * i)),
                             vdupq_n_u32((uint32_t)p->n));
        const float32x4_t s = vld1q_f32(state->w + 4 * i);
        most = vmaxnmq_f32(most, vbslq_f32(valid[i], s, most)); // as if a NaN were not there
    }
    state->m = vmaxnmvq_f32(most);
    const float32x4_t m = broadcast(state->m);
    state->scale = 1;
    if (state->m > before) { // as on few pages
        const float32x4_t scale = exp4(vsubq_f32(broadcast(before), m)); // 0 after -infinity
        state->scale = vgetq_lane_f32(scale, 0);
        for (int i = 0; i < 4; i++)
            state->lanes[i] = vmulq_f32(state->lanes[i], scale);
    }
    for (int i = 0; i < QUARTERS; i++) {
        float32x4_t w = exp4(vsubq_f32(vld1q_f32(state->w + 4 * i), m));
        w = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(w), valid[i]));
        state->lanes[i % 4] = vaddq_f32(state->lanes[i % 4], w);
        if (kind == Q8) w = vmulq_f32(w, load4(scales_of(p->v, p->head_dim), 4 * i, F32));
        vst1q_f32(state->w + 4 * i, w);
    }
}

INLINE void weigh_page(const struct head_page *p, struct query *of, enum store kind, const int Q) {
    score_page(p, of, kind, Q);
    for (int h = 0; h < Q; h++)
        weigh(&of[h].state, p, kind);
}

INLINE void add_values(const struct head_page *p, struct query *of, size_t i, size_t some,
                       enum store kind, const int Q, const int D) {
    float32x4_t acc[MOST_QUERIES * 4], value[4];
    UNROLL for (int j = 0; j < Q * D; j++) {
        acc[j] = load_some(of[j / D].out, i + j % D * 4, F32, some);
        acc[j] = vmulq_n_f32(acc[j], of[j / D].state.scale);
    }
    for (size_t n = 0; n < p->n; n++) {
        const size_t at = n * p->head_dim + i;
        fetch(p->next_v + at * element_bytes(kind), 4 * D * element_bytes(kind));
        UNROLL for (int d = 0; d < D; d++)
            value[d] = load_some(p->v, at + d * 4, kind, some);
        UNROLL for (int h = 0; h < Q; h++)
            UNROLL for (int d = 0; d < D; d++)
                acc[h * D + d] = vfmaq_n_f32(acc[h * D + d], value[d], of[h].state.w[n]);
    }
    UNROLL for (int j = 0; j < Q * D; j++)
        store_some(of[j / D].out + i + j % D * 4, acc[j], some);
}

INLINE void finish(struct query *of, size_t head_dim) {
    const struct mark mark = {of->state.m, add_lanes(of->state.lanes)};
    const float32x4_t sum = broadcast(mark.sum);
    if (of->mark) *of->mark = mark;
    for (size_t i = 0; i < head_dim; i += 4) {
        const float32x4_t value = load_some(of->out, i, F32, left(head_dim, i));
        store_some(of->out + i, vdivq_f32(value, sum), left(head_dim, i));
    }
}

#if defined(DOTPROD)
void kernels_neondot(struct kernels *k) {
    fill_table(k, "neondot");
}
#else
void kernels_neon(struct kernels *k) {
    fill_table(k, "neon");
}
#endif
#endif
