/* avx512.c: the kernels for 512-bit registers, one register being the 16 rows of a strip.
 *
 * Compiled three times: without more, with -mavx512vnni, whose vpdpbusd multiplies and adds four
 * bytes a lane at once, and with -mavx512vbmi too, whose vpermb looks levels up by six bits. A
 * register block of S strips by T tokens is written once, as an inlined function whose S, T and
 * kind are constants where it is called. Compiles to nothing for other machines. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "exp.h"
#include "kernels.h"
#include <immintrin.h>
#include <math.h>
#include <string.h>

/* Register blocks, of 32 registers: 4 strips by 6 tokens of floats, whose 10 loads feed 24 fma (95%
 * of the FMA peak; 2 by 12 had 14, and twelve rows a power of two apart fight for the 8 ways of
 * L1: 83%); 2 by 6 of codes, whose sums are kept twice, as integers and as floats; or 1 by 8. Of
 * 16-bit codes in planes the integers are two sums a token: 2 by 4. */
enum { FLOAT_STRIPS = 4, FLOAT_TOKENS = 6, GROUP_STRIPS = 2, GROUP_TOKENS = 6, GROUP_ONCE = 8 };
#if defined(__AVX512VNNI__)
static const enum wide WIDE = PLANES;
enum { WIDE_TOKENS = 4, WIDE_ONCE = 8 };
#else
static const enum wide WIDE = PAIRS;
enum { WIDE_TOKENS = 6, WIDE_ONCE = 8 };
#endif

enum { VALUE_LANES = 16, VALUE_WIDTH = 4, MOST_QUERIES = 8 }; // of a page, see blocks.h
/* What a query carries from page to page. */
struct softmax {
    __m512 m;               // the largest score so far, in every lane
    __m512 lanes;           // sums of weights
    __m512 scale;           // what this page does to earlier sums
    float w[PAGE_POSITIONS];
};
#include "blocks.h"

enum { ALL = 0xffff };

/* Elements i to i + 15 of an array of floats of a kind, or of int8 codes: the lanes of MASK, zero
 * in the others. */
INLINE __m512 load16(const void *p, size_t i, enum store kind, __mmask16 mask) {
    if (kind == F32) return _mm512_maskz_loadu_ps(mask, (const float *)p + i);
    if (kind == Q8) {
        __m128i codes = _mm_maskz_loadu_epi8(mask, (const int8_t *)p + i);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    }
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + i);
    if (kind == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __mmask16 lanes_below(size_t n) {
    return (__mmask16)(n < 16 ? (1u << n) - 1 : ALL);
}

INLINE float add_lanes(__m512 lanes) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* The steps of exp.h. scalef multiplies by 2^k with the one rounding that the halves have. */
INLINE __m512 exp16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1), round = _mm512_set1_ps(EXP_ROUND);
    x = _mm512_max_ps(_mm512_set1_ps(EXP_LOW), x); // of a NaN, max and min give the second
    x = _mm512_min_ps(_mm512_set1_ps(EXP_HIGH), x);
    __m512 k = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(EXP_LOG2E), round), round);
    __m512 r = _mm512_fmadd_ps(k, _mm512_set1_ps(-EXP_LN2_HIGH), x);
    r = _mm512_fmadd_ps(k, _mm512_set1_ps(-EXP_LN2_LOW), r);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(EXP_C6), r, _mm512_set1_ps(EXP_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C2));
    p = _mm512_fmadd_ps(p, r, one);
    p = _mm512_fmadd_ps(p, r, one);
    return _mm512_scalef_ps(p, k);
}

// ---- matmul: register blocks

enum { MOST_STRIPS = 4, MOST_SUMS = 24 }; // S, and S * T

INLINE void float_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int S, const int T) {
    const uint8_t *w = m->w + at->strip * m->strip_bytes; // (columns, 16), S of them
    const float *x = m->in->x + at->token * m->in->x_stride;
    __m512 acc[MOST_SUMS], column[MOST_STRIPS];
    UNROLL for (int i = 0; i < S * T; i++)
        acc[i] = at->from ? _mm512_loadu_ps(sums_at(m, at, i % S, i / S)) : _mm512_setzero_ps();
    for (size_t c = at->from; c < at->to; c++) {
        if (at->ahead)
            UNROLL for (int s = 0; s < S; s++)
                fetch(w + s * m->strip_bytes + at->ahead + c * TILE_ROWS * element_bytes(kind), 1);
        UNROLL for (int s = 0; s < S; s++)
            column[s] = load16(w + s * m->strip_bytes, c * TILE_ROWS, kind, ALL);
        UNROLL for (int t = 0; t < T; t++) {
            __m512 value = _mm512_set1_ps(x[t * m->in->x_stride + c]);
            UNROLL for (int s = 0; s < S; s++)
                acc[t * S + s] = _mm512_fmadd_ps(column[s], value, acc[t * S + s]);
        }
    }
    UNROLL for (int i = 0; i < S * T; i++)
        _mm512_storeu_ps(sums_at(m, at, i % S, i / S), acc[i]);
}

/* s + the dot products of each lane's four weight codes, signed, with the four bytes of A. */
#if defined(__AVX512VNNI__)
/* vpdpbusd wants one factor unsigned: codes come OFFSET higher, and OFFSET times the sum of the
 * group's a is taken away before (first_sum). */
enum { OFFSET = 128 };
INLINE __m512i dot(__m512i s, __m512i w, __m512i a) {
    return _mm512_dpbusd_epi32(s, w, a);
}
#else
/* vpmaddubsw saturates at 16 bits: |w| times a with w's sign is at most 2 * 128 * 127 = 32512. */
enum { OFFSET = 0 };
INLINE __m512i dot(__m512i s, __m512i w, __m512i a) {
    a = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w), _mm512_setzero_si512(), a);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), a);
    return _mm512_add_epi32(s, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

/* The levels of 4-bit codes, OFFSET higher, four times. */
INLINE __m512i levels_of(const struct matmul *m) {
    const __m128i four = _mm_loadu_si128((const void *)m->levels);
    return _mm512_xor_si512(_mm512_broadcast_i32x4(four), _mm512_set1_epi8((char)OFFSET));
}

/* Columns 4 * j to 4 * j + 3 of a block, OFFSET higher; of q4 the levels. */
INLINE __m512i codes(const uint8_t *block, int j, __m512i levels, enum store kind) {
    const uint8_t *q = block + 2 * TILE_ROWS; // the scales stand first
    const __m512i offset = _mm512_set1_epi8((char)OFFSET);
    if (kind == Q8) return _mm512_xor_si512(_mm512_loadu_si512(q + 64 * j), offset);
    __m512i both = _mm512_loadu_si512(q + 64 * (j % 4));
    if (j >= 4) both = _mm512_srli_epi16(both, 4);
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(both, levels); // the levels stand there four times
#else
    return _mm512_shuffle_epi8(levels, _mm512_and_si512(both, _mm512_set1_epi8(15)));
#endif
}

/* What each row of a q4 block adds to its levels, less OFFSET; for 8-bit a in the lower half of
 * its lane. */
INLINE __m512i shifts(const uint8_t *block, const int bits) {
    __m256i d = _mm256_loadu_si256((const void *)block);
    d = _mm256_and_si256(d, _mm256_set1_epi16(Q4_SHIFT_BITS));
    d = _mm256_add_epi16(_mm256_add_epi16(d, d), _mm256_set1_epi16(Q4_LEAST_SHIFT - OFFSET));
    return bits == 8 ? _mm512_cvtepu16_epi32(d) : _mm512_cvtepi16_epi32(d);
}

/* Where a group's sum starts, SUM being that of its a: of 8-bit ones at most 32 * 127, for which 16
 * bits are enough. */
INLINE __m512i first_sum(__m512i shift, int32_t sum, enum store kind, const int bits) {
    if (kind == Q8) return _mm512_set1_epi32(-OFFSET * sum);
    if (bits == 8) return _mm512_madd_epi16(shift, _mm512_set1_epi32(sum));
    return _mm512_mullo_epi32(shift, _mm512_set1_epi32(sum));
}

INLINE __m512 scales(const uint8_t *block, enum store kind) {
    __m256i d = _mm256_loadu_si256((const void *)block);
    if (kind == Q8) return _mm512_cvtph_ps(d);
    d = _mm256_and_si256(d, _mm256_set1_epi16((short)Q4_SCALE_BITS));
    return _mm512_mul_ps(_mm512_cvtph_ps(d), _mm512_set1_ps(1 / Q4_SCALE));
}

INLINE __m512i broadcast4(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm512_set1_epi32(four);
}

/* With the int16 pairs that the even and the odd bytes meet. */
INLINE __m512i dot_pairs(__m512i s, __m512i w, const int8_t *q) {
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8);
    s = _mm512_add_epi32(s, _mm512_madd_epi16(even, broadcast4(q)));
    return _mm512_add_epi32(s, _mm512_madd_epi16(_mm512_srai_epi16(w, 8), broadcast4(q + 4)));
}

INLINE void group_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int bits, const int S, const int T) {
    const struct input *in = m->in;
    const int planes = bits == 16 && WIDE == PLANES ? 2 : 1;
    const size_t groups = count_groups(in), token = at->token * groups;
    const size_t group_bytes = GROUP * (size_t)bits / 8;
    const size_t bytes = kind == Q8 ? sizeof(struct block_q8) : sizeof(struct block_q4);
    const uint8_t *block = m->w + at->strip * m->strip_bytes + at->from * bytes;
    __m512 acc[MOST_SUMS];
    __m512i sum[MOST_SUMS], high[MOST_SUMS], w[MOST_STRIPS], shift[MOST_STRIPS];
    const __m512i levels = kind == Q4 ? levels_of(m) : _mm512_setzero_si512();
    UNROLL for (int i = 0; i < S * T; i++)
        acc[i] = at->from ? _mm512_loadu_ps(sums_at(m, at, i % S, i / S)) : _mm512_setzero_ps();
    for (size_t g = at->from; g < at->to; g++, block += bytes) {
        if (at->ahead)
            UNROLL for (int s = 0; s < S; s++)
                fetch(block + s * m->strip_bytes + at->ahead, bytes);
        UNROLL for (int s = 0; s < S; s++)
            shift[s] = kind == Q4 ? shifts(block + s * m->strip_bytes, bits)
                                  : _mm512_setzero_si512();
        UNROLL for (int i = 0; i < S * T; i++) {
            sum[i] = first_sum(shift[i % S], in->sum[token + i / S * groups + g], kind, bits);
            high[i] = _mm512_setzero_si512();
        }
        UNROLL for (int j = 0; j < GROUP / 4; j++) {
            UNROLL for (int s = 0; s < S; s++)
                w[s] = codes(block + s * m->strip_bytes, j, levels, kind);
            UNROLL for (int i = 0; i < S * T; i++) {
                const int8_t *q = in->q + (token + i / S * groups + g) * group_bytes;
                if (bits == 16 && WIDE == PAIRS) {
                    sum[i] = dot_pairs(sum[i], w[i % S], q + 8 * j);
                    continue;
                }
                if (planes == 2) high[i] = dot(high[i], w[i % S], broadcast4(q + 4 * j));
                sum[i] = dot(sum[i], w[i % S], broadcast4(q + (planes - 1) * GROUP + 4 * j));
            }
        }
        if (planes == 2)
            UNROLL for (int i = 0; i < S * T; i++)
                sum[i] = _mm512_add_epi32(sum[i], _mm512_slli_epi32(high[i], 8));
        UNROLL for (int s = 0; s < S; s++) {
            __m512 d = scales(block + s * m->strip_bytes, kind);
            UNROLL for (int t = 0; t < T; t++) {
                __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(in->d[token + t * groups + g]));
                __m512 exact = _mm512_cvtepi32_ps(sum[t * S + s]);
                acc[t * S + s] = _mm512_fmadd_ps(exact, scale, acc[t * S + s]);
            }
        }
    }
    UNROLL for (int i = 0; i < S * T; i++)
        _mm512_storeu_ps(sums_at(m, at, i % S, i / S), acc[i]);
}

// ---- one row at a time

/* The codes of a group of 16 bits, columns 0 to 15 and 16 to 31, as the set wants them. */
INLINE void store_wide(int8_t *q, __m512i a, __m512i b) {
    __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)),
                                       _mm512_cvtepi32_epi16(b), 1);
    if (WIDE == PAIRS) { // columns 1 and 2 of four change places
        words = _mm512_shufflelo_epi16(words, 0xd8);
        _mm512_storeu_si512(q, _mm512_shufflehi_epi16(words, 0xd8));
        return;
    }
    __m512i high = _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
    _mm256_storeu_si256((void *)q, _mm512_cvtepi16_epi8(high));
    _mm256_storeu_si256((void *)(q + GROUP), _mm512_cvtepi16_epi8(words)); // the low bytes
}

/* One whole group. */
INLINE void quantize_group(const float *x, int bits, int8_t *q, float *d, int32_t *sum) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    const __m512 most = _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
    const __m512 finite = _mm512_add_ps(_mm512_sub_ps(a, a), _mm512_sub_ps(b, b)); // 0, or NaN
    const int ordered = _mm512_cmp_ps_mask(finite, finite, _CMP_ORD_Q) == ALL;
    const float largest = _mm512_reduce_max_ps(most), most_code = bits == 8 ? 127 : 127 * 256;
    *sum = 0;
    *d = !ordered ? NAN : largest < 0x1p-100f ? 0 : largest / most_code;
    if (!ordered || largest < 0x1p-100f) {
        memset(q, 0, GROUP * (size_t)bits / 8);
        return;
    }
    const __m512 scale = _mm512_set1_ps(most_code / largest);
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(a, scale)); // half to even
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(b, scale));
    *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    if (bits == 16) {
        store_wide(q, first, second);
        return;
    }
    _mm_storeu_si128((void *)q, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128((void *)(q + 16), _mm512_cvtepi32_epi8(second));
}

/* Pairs whose members PARTNER brought together; those of MASK are the second ones. */
INLINE __m512 pair(__m512 v, __m512 partner, __mmask16 mask) {
    return _mm512_mask_sub_ps(_mm512_add_ps(partner, v), mask, partner, v);
}

INLINE __m512 rotate16(__m512 v) {
    v = pair(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
    v = pair(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
    v = pair(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
    return pair(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
}

static void rotate_row(float *out, const float *x, size_t n) {
    const __m512 size = _mm512_set1_ps(ROTATED_INPUT);
    for (size_t i = 0; i < n; i += GROUP) {
        __m512 a = rotate16(_mm512_loadu_ps(x + i)), b = rotate16(_mm512_loadu_ps(x + i + 16));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_add_ps(a, b), size));
        _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(_mm512_sub_ps(a, b), size));
    }
}

static void rms_norm(float *out, const float *x, const float *w, size_t n, float eps) {
    __m512 lanes = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16) {
        __m512 v = load16(x, i, F32, lanes_below(n - i));
        lanes = _mm512_fmadd_ps(v, v, lanes);
    }
    __m512 s = _mm512_set1_ps(1 / sqrtf(add_lanes(lanes) / (float)n + eps));
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes_below(n - i);
        __m512 scaled = _mm512_mul_ps(load16(x, i, F32, mask), s);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(load16(w, i, F32, mask), scaled));
    }
}

static void rope(float *x, const float *cos, const float *sin, size_t n) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (size_t i = 0; i < n; i += 16) { // eight pairs
        __mmask16 mask = lanes_below(n - i), half = n - i < 16 ? lanes_below((n - i) / 2) : 0xff;
        __m512 c = _mm512_permutexvar_ps(twice, load16(cos, i / 2, F32, half));
        __m512 s = _mm512_permutexvar_ps(twice, load16(sin, i / 2, F32, half));
        __m512 cs = _mm512_mask_blend_ps(0xaaaa, c, s), sc = _mm512_mask_blend_ps(0xaaaa, s, c);
        __m512 v = load16(x, i, F32, mask);
        __m512 a = _mm512_moveldup_ps(v), b = _mm512_movehdup_ps(v);
        // even lanes: a cos - b sin; odd lanes: a sin + b cos
        v = _mm512_fmaddsub_ps(a, cs, _mm512_mul_ps(b, sc));
        _mm512_mask_storeu_ps(x + i, mask, v);
    }
}

static void swiglu(float *gate, const float *up, size_t n) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes_below(n - i);
        __m512 g = load16(gate, i, F32, mask);
        __m512 minus = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(g), sign));
        g = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), exp16(minus)));
        _mm512_mask_storeu_ps(gate + i, mask, _mm512_mul_ps(g, load16(up, i, F32, mask)));
    }
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes_below(n - i);
        __m512 sum = _mm512_add_ps(load16(x, i, F32, mask), load16(y, i, F32, mask));
        _mm512_mask_storeu_ps(x + i, mask, sum);
    }
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes_below(n - i);
        __m256i half = _mm512_cvtps_ph(load16(x, i, F32, mask), _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(out + i, mask, half);
    }
}

// ---- attention

enum { TILES = PAGE_POSITIONS / 16 };

INLINE void begin(struct softmax *state) {
    state->m = _mm512_set1_ps(-INFINITY);
    state->lanes = _mm512_setzero_ps();
}

/* A page's scores turned into weights, zero from N on; in q8 times the values' scales. */
INLINE void weigh(struct softmax *state, const __m512 *s, const struct head_page *p,
                  enum store kind) {
    const __m512 before = state->m;
    __m512 most = before;
    __mmask16 mask[TILES];
    UNROLL for (int j = 0; j < TILES; j++) {
        mask[j] = p->n > (size_t)(16 * j) ? lanes_below(p->n - 16 * j) : 0;
        most = _mm512_mask_max_ps(most, mask[j], s[j], most);
    }
    state->scale = _mm512_set1_ps(1);
    if (_mm512_cmp_ps_mask(most, before, _CMP_GT_OQ)) { // as on few pages
        state->m = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        state->scale = exp16(_mm512_sub_ps(before, state->m)); // 0 after -infinity
        state->lanes = _mm512_mul_ps(state->lanes, state->scale);
    }
    UNROLL for (int j = 0; j < TILES; j++) {
        __m512 w = _mm512_maskz_mov_ps(mask[j], exp16(_mm512_sub_ps(s[j], state->m)));
        state->lanes = _mm512_add_ps(state->lanes, w);
        if (kind == Q8)
            w = _mm512_mul_ps(w, load16(scales_of(p->v, p->head_dim), 16 * j, F32, ALL));
        _mm512_storeu_ps(state->w + 16 * j, w);
    }
}

INLINE void weigh_page(const struct head_page *p, struct query *of, enum store kind, const int Q) {
    const size_t column = element_bytes(kind) * PAGE_POSITIONS;
    __m512 s[MOST_QUERIES * TILES], tile[TILES];
    UNROLL for (int i = 0; i < Q * TILES; i++)
        s[i] = _mm512_setzero_ps();
    for (size_t i = 0; i < p->head_dim; i++) {
        fetch(p->next_k + i * column, column);
        UNROLL for (int j = 0; j < TILES; j++)
            tile[j] = load16(p->k, (j * p->head_dim + i) * 16, kind, ALL);
        UNROLL for (int h = 0; h < Q; h++) {
            __m512 value = _mm512_set1_ps(of[h].q[i]);
            UNROLL for (int j = 0; j < TILES; j++)
                s[h * TILES + j] = _mm512_fmadd_ps(value, tile[j], s[h * TILES + j]);
        }
    }
    UNROLL for (int j = 0; j < TILES && kind == Q8; j++) {
        __m512 scale = load16(scales_of(p->k, p->head_dim), j * 16, F32, ALL);
        UNROLL for (int h = 0; h < Q; h++)
            s[h * TILES + j] = _mm512_mul_ps(s[h * TILES + j], scale);
    }
    UNROLL for (int h = 0; h < Q; h++)
        weigh(&of[h].state, s + h * TILES, p, kind);
}

INLINE void add_values(const struct head_page *p, struct query *of, size_t i, size_t some,
                       enum store kind, const int Q, const int D) {
    const __mmask16 mask = lanes_below(some);
    __m512 acc[MOST_QUERIES * 4], value[4];
    UNROLL for (int j = 0; j < Q * D; j++)
        acc[j] = _mm512_mul_ps(load16(of[j / D].out, i + j % D * 16, F32, mask),
                               of[j / D].state.scale);
    for (size_t n = 0; n < p->n; n++) {
        const size_t at = n * p->head_dim + i;
        fetch(p->next_v + at * element_bytes(kind), 16 * D * element_bytes(kind));
        UNROLL for (int d = 0; d < D; d++)
            value[d] = load16(p->v, at + d * 16, kind, mask);
        UNROLL for (int h = 0; h < Q; h++) {
            __m512 w = _mm512_set1_ps(of[h].state.w[n]);
            UNROLL for (int d = 0; d < D; d++)
                acc[h * D + d] = _mm512_fmadd_ps(w, value[d], acc[h * D + d]);
        }
    }
    UNROLL for (int j = 0; j < Q * D; j++)
        _mm512_mask_storeu_ps(of[j / D].out + i + j % D * 16, mask, acc[j]);
}

INLINE void finish(struct query *of, size_t head_dim) {
    const struct mark mark = {_mm512_cvtss_f32(of->state.m), add_lanes(of->state.lanes)};
    const __m512 sum = _mm512_set1_ps(mark.sum);
    if (of->mark) *of->mark = mark;
    for (size_t i = 0; i < head_dim; i += 16) {
        const __mmask16 mask = lanes_below(head_dim - i);
        _mm512_mask_storeu_ps(of->out + i, mask, _mm512_div_ps(load16(of->out, i, F32, mask), sum));
    }
}

#if defined(__AVX512VBMI__)
void kernels_avx512vbmi(struct kernels *k) {
    fill_table(k, "avx512vbmi");
}
#elif defined(__AVX512VNNI__)
void kernels_avx512vnni(struct kernels *k) {
    fill_table(k, "avx512vnni");
}
#else
void kernels_avx512(struct kernels *k) {
    fill_table(k, "avx512");
}
#endif
#endif
