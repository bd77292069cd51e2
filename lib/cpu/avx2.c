/* avx2.c: the kernels for 256-bit registers, two registers being the 16 rows of a strip.
 *
 * Compiled twice: for AVX2 with FMA and F16C, and with -mavxvnni for CPUs whose vpdpbusd works on
 * these registers; a third time for tests, with AVX-512's encoding of that instruction. A register
 * block of S strips by T tokens is written once, as an inlined function whose S, T and kind are
 * constants where it is called. Compiles to nothing for other machines. */
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "exp.h"
#include "kernels.h"
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

/* Register blocks, of 16 registers: 1 strip by 6 tokens of floats, 1 by 4 of codes, whose sums as
 * floats wait in L1. Of 16-bit codes in planes the integers are two sums a token: 1 by 2. */
enum { FLOAT_STRIPS = 1, FLOAT_TOKENS = 6, GROUP_STRIPS = 1, GROUP_TOKENS = 4, GROUP_ONCE = 4 };
#if defined(__AVXVNNI__)
#define DPBUSD _mm256_dpbusd_avx_epi32
#elif defined(__AVX512VNNI__)
#define DPBUSD _mm256_dpbusd_epi32
#endif
#if defined(DPBUSD)
static const enum wide WIDE = PLANES;
enum { WIDE_TOKENS = 2, WIDE_ONCE = 2 };
#else
static const enum wide WIDE = PAIRS;
enum { WIDE_TOKENS = 4, WIDE_ONCE = 4 };
#endif

enum { VALUE_LANES = 8, VALUE_WIDTH = 2, MOST_QUERIES = 4 }; // of a page, see blocks.h
/* What a query carries from page to page. */
struct softmax {
    float m;                // the largest score so far
    __m256 lanes[2];        // sums of weights
    __m256 scale;           // what this page does to earlier sums
    float w[PAGE_POSITIONS]; // scores, then weights
};
#include "blocks.h"

/* Elements i to i + 7 of an array of floats of a kind, or of int8 codes. */
INLINE __m256 load8(const void *p, size_t i, enum store kind) {
    if (kind == F32) return _mm256_loadu_ps((const float *)p + i);
    if (kind == Q8) {
        __m128i codes = _mm_loadl_epi64((const void *)((const int8_t *)p + i));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    }
    __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)p + i));
    if (kind == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The same where only N elements are left: zero in the other lanes. */
INLINE __m256 load_some(const void *p, size_t i, enum store kind, size_t n) {
    uint32_t rest[8] = {0};
    size_t size = element_bytes(kind);
    if (n >= 8) return load8(p, i, kind);
    memcpy(rest, (const uint8_t *)p + i * size, n * size);
    return load8(rest, 0, kind);
}

INLINE void store_some(float *p, __m256 v, size_t n) {
    float rest[8];
    if (n >= 8) {
        _mm256_storeu_ps(p, v);
        return;
    }
    _mm256_storeu_ps(rest, v);
    memcpy(p, rest, n * sizeof *p);
}

INLINE size_t left(size_t n, size_t i) {
    return n > i ? n - i : 0;
}

INLINE __m256 broadcast(float x) {
    return _mm256_set1_ps(x);
}

/* Lanes 0..7 and 8..15. */
INLINE float add_lanes(__m256 low, __m256 high) {
    __m256 eight = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float max_lane(__m256 v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE __m256 absolute(__m256 v) {
    return _mm256_andnot_ps(broadcast(-0.0f), v);
}

/* The steps of exp.h. */
INLINE __m256 exp8(__m256 x) {
    x = _mm256_max_ps(broadcast(EXP_LOW), x); // of a NaN, max and min give the second
    x = _mm256_min_ps(broadcast(EXP_HIGH), x);
    __m256 k = _mm256_fmadd_ps(x, broadcast(EXP_LOG2E), broadcast(EXP_ROUND));
    k = _mm256_sub_ps(k, broadcast(EXP_ROUND));
    __m256 r = _mm256_fmadd_ps(k, broadcast(-EXP_LN2_HIGH), x);
    r = _mm256_fmadd_ps(k, broadcast(-EXP_LN2_LOW), r);
    __m256 p = _mm256_fmadd_ps(broadcast(EXP_C6), r, broadcast(EXP_C5));
    p = _mm256_fmadd_ps(p, r, broadcast(EXP_C4));
    p = _mm256_fmadd_ps(p, r, broadcast(EXP_C3));
    p = _mm256_fmadd_ps(p, r, broadcast(EXP_C2));
    p = _mm256_fmadd_ps(p, r, broadcast(1));
    p = _mm256_fmadd_ps(p, r, broadcast(1));
    const __m256i bias = _mm256_set1_epi32(127);
    __m256i power = _mm256_cvtps_epi32(k), half = _mm256_srai_epi32(power, 1);
    power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(power, half), bias), 23);
    half = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(half));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

// ---- matmul: register blocks

enum { MOST_HALVES = 8, MOST_SUMS = 12 }; // 2 * S and 2 * S * T: a half is 8 rows of a strip

/* The sums of half H of the S strips, (8). */
INLINE float *half_sums(const struct matmul *m, const struct place *at, int h, int t) {
    return sums_at(m, at, h / 2, t) + h % 2 * 8;
}

INLINE void float_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int S, const int T) {
    const int H = 2 * S;
    const uint8_t *w = m->w + at->strip * m->strip_bytes; // (columns, 16), S of them
    const float *x = m->in->x + at->token * m->in->x_stride;
    __m256 acc[MOST_SUMS], column[MOST_HALVES];
    UNROLL for (int i = 0; i < H * T; i++)
        acc[i] = at->from ? _mm256_loadu_ps(half_sums(m, at, i % H, i / H)) : broadcast(0);
    for (size_t c = at->from; c < at->to; c++) {
        if (at->ahead)
            UNROLL for (int s = 0; s < S; s++)
                fetch(w + s * m->strip_bytes + at->ahead + c * TILE_ROWS * element_bytes(kind), 1);
        UNROLL for (int h = 0; h < H; h++)
            column[h] = load8(w + h / 2 * m->strip_bytes, c * TILE_ROWS + h % 2 * 8, kind);
        UNROLL for (int t = 0; t < T; t++) {
            __m256 value = broadcast(x[t * m->in->x_stride + c]);
            UNROLL for (int h = 0; h < H; h++)
                acc[t * H + h] = _mm256_fmadd_ps(column[h], value, acc[t * H + h]);
        }
    }
    UNROLL for (int i = 0; i < H * T; i++)
        _mm256_storeu_ps(half_sums(m, at, i % H, i / H), acc[i]);
}

/* The levels of 4-bit codes, twice. */
INLINE __m256i levels_of(const struct matmul *m) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)m->levels));
}

/* Columns 4 * j to 4 * j + 3 of half H of a block, signed bytes; of q4 the levels. */
INLINE __m256i codes(const uint8_t *block, int j, int h, __m256i levels, enum store kind) {
    const uint8_t *q = block + 2 * TILE_ROWS + 32 * h; // the scales stand first
    if (kind == Q8) return _mm256_loadu_si256((const void *)(q + 64 * j));
    __m256i both = _mm256_loadu_si256((const void *)(q + 64 * (j % 4)));
    both = _mm256_and_si256(j < 4 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
    return _mm256_shuffle_epi8(levels, both);
}

/* s + the dot products of each lane's four weight codes with the four bytes of A. */
#if defined(DPBUSD)
/* vpdpbusd wants one factor unsigned: codes go OFFSET higher, and OFFSET times the sum of the
 * group's a is taken away before (first_sum). */
enum { OFFSET = 128 };
INLINE __m256i dot(__m256i s, __m256i w, __m256i a) {
    return DPBUSD(s, _mm256_xor_si256(w, _mm256_set1_epi8((char)OFFSET)), a);
}
#else
/* vpmaddubsw saturates at 16 bits: |w| times a with w's sign is at most 2 * 128 * 127 = 32512. */
enum { OFFSET = 0 };
INLINE __m256i dot(__m256i s, __m256i w, __m256i a) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

/* What each row of half H of a q4 block adds to its levels, less OFFSET. */
INLINE __m256i shifts(const uint8_t *block, int h) {
    __m256i d = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(block + 16 * h)));
    d = _mm256_slli_epi32(_mm256_and_si256(d, _mm256_set1_epi32(Q4_SHIFT_BITS)), 1);
    return _mm256_add_epi32(d, _mm256_set1_epi32(Q4_LEAST_SHIFT - OFFSET));
}

/* Where a group's sum starts, SUM being that of its a: of 8-bit ones at most 32 * 127, for which 16
 * bits are enough. */
INLINE __m256i first_sum(__m256i shift, int32_t sum, enum store kind, const int bits) {
    if (kind == Q8) return _mm256_set1_epi32(-OFFSET * sum);
    if (bits == 8) return _mm256_madd_epi16(shift, _mm256_set1_epi32(sum & 0xffff));
    return _mm256_mullo_epi32(shift, _mm256_set1_epi32(sum));
}

INLINE __m256 scales(const uint8_t *block, int h, enum store kind) {
    __m128i d = _mm_loadu_si128((const void *)(block + 16 * h));
    if (kind == Q8) return _mm256_cvtph_ps(d);
    d = _mm_and_si128(d, _mm_set1_epi16((short)Q4_SCALE_BITS));
    return _mm256_mul_ps(_mm256_cvtph_ps(d), broadcast(1 / Q4_SCALE));
}

INLINE __m256i broadcast4(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm256_set1_epi32(four);
}

/* With the int16 pairs that the even and the odd bytes meet. */
INLINE __m256i dot_pairs(__m256i s, __m256i w, const int8_t *q) {
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
    s = _mm256_add_epi32(s, _mm256_madd_epi16(even, broadcast4(q)));
    return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_srai_epi16(w, 8), broadcast4(q + 4)));
}

INLINE void group_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int bits, const int S, const int T) {
    const int H = 2 * S, planes = bits == 16 && WIDE == PLANES ? 2 : 1;
    const struct input *in = m->in;
    const size_t groups = count_groups(in), token = at->token * groups;
    const size_t group_bytes = GROUP * (size_t)bits / 8;
    const size_t bytes = kind == Q8 ? sizeof(struct block_q8) : sizeof(struct block_q4);
    const uint8_t *block = m->w + at->strip * m->strip_bytes + at->from * bytes;
    __m256 acc[MOST_SUMS];
    __m256i sum[MOST_SUMS], high[MOST_SUMS], w[MOST_HALVES], shift[MOST_HALVES];
    const __m256i levels = kind == Q4 ? levels_of(m) : _mm256_setzero_si256();
    UNROLL for (int i = 0; i < H * T; i++)
        acc[i] = at->from ? _mm256_loadu_ps(half_sums(m, at, i % H, i / H)) : broadcast(0);
    for (size_t g = at->from; g < at->to; g++, block += bytes) {
        if (at->ahead)
            UNROLL for (int s = 0; s < S; s++)
                fetch(block + s * m->strip_bytes + at->ahead, bytes);
        UNROLL for (int h = 0; h < H; h++)
            shift[h] = kind == Q4 ? shifts(block + h / 2 * m->strip_bytes, h % 2)
                                  : _mm256_setzero_si256();
        UNROLL for (int i = 0; i < H * T; i++) {
            sum[i] = first_sum(shift[i % H], in->sum[token + i / H * groups + g], kind, bits);
            high[i] = _mm256_setzero_si256();
        }
        UNROLL for (int j = 0; j < GROUP / 4; j++) {
            UNROLL for (int h = 0; h < H; h++)
                w[h] = codes(block + h / 2 * m->strip_bytes, j, h % 2, levels, kind);
            UNROLL for (int i = 0; i < H * T; i++) {
                const int8_t *q = in->q + (token + i / H * groups + g) * group_bytes;
                if (bits == 16 && WIDE == PAIRS) {
                    sum[i] = dot_pairs(sum[i], w[i % H], q + 8 * j);
                    continue;
                }
                if (planes == 2) high[i] = dot(high[i], w[i % H], broadcast4(q + 4 * j));
                sum[i] = dot(sum[i], w[i % H], broadcast4(q + (planes - 1) * GROUP + 4 * j));
            }
        }
        if (planes == 2)
            UNROLL for (int i = 0; i < H * T; i++)
                sum[i] = _mm256_add_epi32(sum[i], _mm256_slli_epi32(high[i], 8));
        UNROLL for (int i = 0; i < H * T; i++) {
            const int h = i % H, t = i / H;
            __m256 scale = scales(block + h / 2 * m->strip_bytes, h % 2, kind);
            __m256 exact = _mm256_cvtepi32_ps(sum[i]);
            scale = _mm256_mul_ps(scale, broadcast(in->d[token + t * groups + g]));
            acc[i] = _mm256_fmadd_ps(exact, scale, acc[i]);
        }
    }
    UNROLL for (int i = 0; i < H * T; i++)
        _mm256_storeu_ps(half_sums(m, at, i % H, i / H), acc[i]);
}

// ---- one row at a time

/* The sum of the eight. */
INLINE int32_t add_all(__m256i v) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* Bytes of columns 0 to 15 and 16 to 31 of a group, from 16 bits each, after packing within 128
 * bits left 4-byte pieces 0 2 4 6 | 1 3 5 7. */
INLINE __m256i pack(__m256i first, __m256i second) {
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* One whole group. */
INLINE void quantize_group(const float *x, int bits, int8_t *q, float *d, int32_t *sum) {
    const float most_code = bits == 8 ? 127 : 127 * 256;
    __m256 v[4], most = broadcast(0), finite = broadcast(0);
    __m256i code[4], half[2], high[2];
    UNROLL for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        most = _mm256_max_ps(most, absolute(v[i]));
        // x - x is 0 for finite x and NaN for others
        finite = _mm256_or_ps(finite, _mm256_sub_ps(v[i], v[i]));
    }
    int ordered = _mm256_movemask_ps(_mm256_cmp_ps(finite, finite, _CMP_ORD_Q)) == 0xff;
    float largest = max_lane(most);
    *sum = 0;
    *d = !ordered ? NAN : largest < 0x1p-100f ? 0 : largest / most_code;
    if (!ordered || largest < 0x1p-100f) {
        memset(q, 0, GROUP * (size_t)bits / 8);
        return;
    }
    UNROLL for (int i = 0; i < 4; i++) // half to even
        code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], broadcast(most_code / largest)));
    *sum = add_all(_mm256_add_epi32(_mm256_add_epi32(code[0], code[1]),
                                    _mm256_add_epi32(code[2], code[3])));
    UNROLL for (int i = 0; i < 2; i++) { // packing within 128 bits leaves 8-byte pieces 0 2 1 3
        half[i] = _mm256_packs_epi32(code[2 * i], code[2 * i + 1]);
        if (bits == 16 && WIDE == PAIRS) { // in order, but that columns 1 and 2 of four are not
            __m256i pairs = _mm256_permute4x64_epi64(half[i], 0xd8);
            pairs = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(pairs, 0xd8), 0xd8);
            _mm256_storeu_si256((void *)(q + GROUP * i), pairs);
        } else if (bits == 16) {
            high[i] = _mm256_srai_epi16(_mm256_add_epi16(half[i], _mm256_set1_epi16(128)), 8);
            half[i] = _mm256_sub_epi16(half[i], _mm256_slli_epi16(high[i], 8));
        }
    }
    if (bits == 16 && WIDE == PAIRS) return;
    if (bits == 16) _mm256_storeu_si256((void *)q, pack(high[0], high[1]));
    _mm256_storeu_si256((void *)(bits == 16 ? q + GROUP : q), pack(half[0], half[1]));
}

INLINE __m256 rotate8(__m256 v) {
    __m256 p = _mm256_permute_ps(v, 0xb1); // each lane's partner
    v = _mm256_blend_ps(_mm256_add_ps(p, v), _mm256_sub_ps(p, v), 0xaa);
    p = _mm256_permute_ps(v, 0x4e);
    v = _mm256_blend_ps(_mm256_add_ps(p, v), _mm256_sub_ps(p, v), 0xcc);
    p = _mm256_permute2f128_ps(v, v, 1);
    return _mm256_blend_ps(_mm256_add_ps(p, v), _mm256_sub_ps(p, v), 0xf0);
}

static void rotate_row(float *out, const float *x, size_t n) {
    const __m256 size = broadcast(ROTATED_INPUT);
    for (size_t i = 0; i < n; i += GROUP) {
        __m256 v[4];
        UNROLL for (int j = 0; j < 4; j++) v[j] = rotate8(_mm256_loadu_ps(x + i + 8 * j));
        for (int h = 1; h < 4; h *= 2)
            UNROLL for (int j = 0; j < 4; j++)
                if (!(j & h)) {
                    const __m256 a = v[j], b = v[j + h];
                    v[j] = _mm256_add_ps(a, b);
                    v[j + h] = _mm256_sub_ps(a, b);
                }
        UNROLL for (int j = 0; j < 4; j++)
            _mm256_storeu_ps(out + i + 8 * j, _mm256_mul_ps(v[j], size));
    }
}

static void rms_norm(float *out, const float *x, const float *w, size_t n, float eps) {
    __m256 low = broadcast(0), high = low;
    for (size_t i = 0; i < n; i += 16) {
        __m256 a = load_some(x, i, F32, left(n, i)), b = load_some(x, i + 8, F32, left(n, i + 8));
        low = _mm256_fmadd_ps(a, a, low);
        high = _mm256_fmadd_ps(b, b, high);
    }
    __m256 s = broadcast(1 / sqrtf(add_lanes(low, high) / (float)n + eps));
    for (size_t i = 0; i < n; i += 8) {
        __m256 scaled = _mm256_mul_ps(load_some(x, i, F32, left(n, i)), s);
        scaled = _mm256_mul_ps(load_some(w, i, F32, left(n, i)), scaled);
        store_some(out + i, scaled, left(n, i));
    }
}

static void rope(float *x, const float *cos, const float *sin, size_t n) {
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    size_t i = 0;
    for (; n - i >= 8; i += 8) { // four pairs
        __m256 c = _mm256_castps128_ps256(_mm_loadu_ps(cos + i / 2));
        __m256 s = _mm256_castps128_ps256(_mm_loadu_ps(sin + i / 2));
        c = _mm256_permutevar8x32_ps(c, twice);
        s = _mm256_permutevar8x32_ps(s, twice);
        __m256 cs = _mm256_blend_ps(c, s, 0xaa), sc = _mm256_blend_ps(s, c, 0xaa);
        __m256 v = _mm256_loadu_ps(x + i);
        __m256 a = _mm256_moveldup_ps(v), b = _mm256_movehdup_ps(v);
        // even lanes: a cos - b sin; odd lanes: a sin + b cos
        _mm256_storeu_ps(x + i, _mm256_fmaddsub_ps(a, cs, _mm256_mul_ps(b, sc)));
    }
    rope_rest(x, cos, sin, i, n);
}

static void swiglu(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        __m256 g = load_some(gate, i, F32, left(n, i));
        __m256 e = exp8(_mm256_xor_ps(g, broadcast(-0.0f)));
        g = _mm256_div_ps(g, _mm256_add_ps(broadcast(1), e));
        g = _mm256_mul_ps(g, load_some(up, i, F32, left(n, i)));
        store_some(gate + i, g, left(n, i));
    }
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        __m256 a = load_some(x, i, F32, left(n, i)), b = load_some(y, i, F32, left(n, i));
        store_some(x + i, _mm256_add_ps(a, b), left(n, i));
    }
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        uint16_t half[8];
        __m256 v = load_some(x, i, F32, left(n, i));
        _mm_storeu_si128((void *)half, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        memcpy(out + i, half, left(n, i) < 8 ? left(n, i) * sizeof *half : sizeof half);
    }
}

// ---- attention

enum { HALVES = PAGE_POSITIONS / 8 }; // a half is 8 positions of a tile of 16

INLINE void begin(struct softmax *state) {
    state->m = -INFINITY;
    state->lanes[0] = state->lanes[1] = broadcast(0);
}

INLINE void score_page(const struct head_page *p, struct query *of, enum store kind, const int Q) {
    for (size_t j = 0; j < PAGE_POSITIONS; j += 16) {
        __m256 s[MOST_QUERIES * 2];
        UNROLL for (int i = 0; i < Q * 2; i++)
            s[i] = broadcast(0);
        for (size_t i = 0; i < p->head_dim; i++) {
            const size_t at = j * p->head_dim + i * 16;
            __m256 low = load8(p->k, at, kind), high = load8(p->k, at + 8, kind);
            fetch(p->next_k + at * element_bytes(kind), 16 * element_bytes(kind));
            UNROLL for (int h = 0; h < Q; h++) {
                __m256 value = broadcast(of[h].q[i]);
                s[2 * h] = _mm256_fmadd_ps(value, low, s[2 * h]);
                s[2 * h + 1] = _mm256_fmadd_ps(value, high, s[2 * h + 1]);
            }
        }
        UNROLL for (int i = 0; i < Q * 2; i++) {
            if (kind == Q8)
                s[i] = _mm256_mul_ps(s[i], load8(scales_of(p->k, p->head_dim), j + i % 2 * 8, F32));
            _mm256_storeu_ps(of[i / 2].state.w + j + i % 2 * 8, s[i]);
        }
    }
}

/* A page's scores turned into weights, zero from N on; in q8 times the values' scales. */
INLINE void weigh(struct softmax *state, const struct head_page *p, enum store kind) {
    const __m256 lane = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 before = broadcast(state->m);
    __m256 most = before, valid[HALVES];
    UNROLL for (int i = 0; i < HALVES; i++) {
        valid[i] = _mm256_cmp_ps(lane, broadcast((float)p->n - 8.f * (float)i), _CMP_LT_OQ);
        __m256 s = _mm256_loadu_ps(state->w + 8 * i);
        most = _mm256_max_ps(_mm256_blendv_ps(most, s, valid[i]), most);
    }
    state->scale = broadcast(1);
    if (_mm256_movemask_ps(_mm256_cmp_ps(most, before, _CMP_GT_OQ))) { // as on few pages
        state->m = max_lane(most);
        state->scale = exp8(_mm256_sub_ps(before, broadcast(state->m))); // 0 after -infinity
        for (int i = 0; i < 2; i++)
            state->lanes[i] = _mm256_mul_ps(state->lanes[i], state->scale);
    }
    const __m256 m = broadcast(state->m);
    for (int i = 0; i < HALVES; i++) {
        __m256 w = exp8(_mm256_sub_ps(_mm256_loadu_ps(state->w + 8 * i), m));
        w = _mm256_and_ps(w, valid[i]);
        state->lanes[i % 2] = _mm256_add_ps(state->lanes[i % 2], w);
        if (kind == Q8) w = _mm256_mul_ps(w, load8(scales_of(p->v, p->head_dim), 8 * i, F32));
        _mm256_storeu_ps(state->w + 8 * i, w);
    }
}

INLINE void weigh_page(const struct head_page *p, struct query *of, enum store kind, const int Q) {
    score_page(p, of, kind, Q);
    for (int h = 0; h < Q; h++)
        weigh(&of[h].state, p, kind);
}

INLINE void add_values(const struct head_page *p, struct query *of, size_t i, size_t some,
                       enum store kind, const int Q, const int D) {
    __m256 acc[MOST_QUERIES * 2], value[2];
    UNROLL for (int j = 0; j < Q * D; j++) {
        acc[j] = load_some(of[j / D].out, i + j % D * 8, F32, some);
        acc[j] = _mm256_mul_ps(acc[j], of[j / D].state.scale);
    }
    for (size_t n = 0; n < p->n; n++) {
        const size_t at = n * p->head_dim + i;
        fetch(p->next_v + at * element_bytes(kind), 8 * D * element_bytes(kind));
        UNROLL for (int d = 0; d < D; d++)
            value[d] = load_some(p->v, at + d * 8, kind, some);
        UNROLL for (int h = 0; h < Q; h++) {
            __m256 w = broadcast(of[h].state.w[n]);
            UNROLL for (int d = 0; d < D; d++)
                acc[h * D + d] = _mm256_fmadd_ps(w, value[d], acc[h * D + d]);
        }
    }
    UNROLL for (int j = 0; j < Q * D; j++)
        store_some(of[j / D].out + i + j % D * 8, acc[j], some);
}

INLINE void finish(struct query *of, size_t head_dim) {
    const struct mark mark = {of->state.m, add_lanes(of->state.lanes[0], of->state.lanes[1])};
    const __m256 sum = broadcast(mark.sum);
    if (of->mark) *of->mark = mark;
    for (size_t i = 0; i < head_dim; i += 8) {
        __m256 value = load_some(of->out, i, F32, left(head_dim, i));
        store_some(of->out + i, _mm256_div_ps(value, sum), left(head_dim, i));
    }
}

#if defined(__AVXVNNI__)
void kernels_avxvnni(struct kernels *k) {
    fill_table(k, "avxvnni");
}
#elif defined(__AVX512VNNI__)
void kernels_evexvnni(struct kernels *k) {
    fill_table(k, "evexvnni");
}
#else
void kernels_avx2(struct kernels *k) {
    fill_table(k, "avx2");
}
#endif
#endif
