/* kernels.h: every inner loop of the CPU pass, as a table of function pointers.
 *
 * scalar.c fills the whole table and says what is right; an ISA file replaces the entries it
 * does faster. Contract of all: the same result to the last bit on every ISA. So each entry
 * fixes its order of operations: "fma" below is one fused multiply-add (one rounding), a sum
 * "in lanes" keeps 16 partial sums, element i going to lane i % 16 in rising i, and adds the
 * lanes at the end as a tree: lane j += lane j + 8, then + 4, + 2, + 1. Vector length, thread
 * and position in the batch never show. */
#ifndef KERNELS_H
#define KERNELS_H
#include <stddef.h>
#include <stdint.h>
#include "../quant.h"

/* Rows of one matmul input. Float kinds read x; quantised kinds read q, d and sum, which
 * quantize_row made of x: groups = ceil(columns / GROUP), and x is never read. */
struct input {
    size_t n;            // rows (tokens), >= 1
    size_t columns;
    const float *x;      // (n, x_stride)
    size_t x_stride;
    int bits;            // of a code: 8 or 16
    const int8_t *q;     // (n, groups, GROUP * bits / 8), codes of zero past the last column
    const float *d;      // (n, groups)
    const int32_t *sum;  // (n, groups): sum of the group's codes
};

/* Where the bytes of a group's 16-bit codes lie, as the set's own matmul wants them. */
enum wide {
    PLANES,              // (2, GROUP) int8: code = 256 first + second, for products of bytes
    PAIRS,               // (GROUP / 4, 2, 2) int16: of four columns 0 and 2, then 1 and 3, which
                         // meet the even and then the odd bytes of a weight's four
};

/* y[t][r] = sum over columns of w[r][c] * x[t][c], for the strips [first, last) of one matrix.
 * Float kinds: acc = fma(w, x, acc) in rising c from 0.
 * Quantised kinds: for each group in rising order, the exact integer sum s of code * q, q4's code
 * being level + shift, then acc = fma((float)s, scale_w * d_x, acc), from 0. (Of 16-bit q, s is
 * at most 32 * 191 * 32512 and may be rounded where it becomes a float: half to even.)
 * All 16 rows of a strip are written: the caller's y has room for whole strips. */
struct matmul {
    const uint8_t *w;    // the matrix's first strip
    size_t strip_bytes;
    const struct input *in;
    float *y;            // (n, y_stride); row r of the matrix goes to column r
    size_t y_stride;
    const int8_t *levels; // (16) of 4-bit kinds
};

struct mark { float m, sum; }; // of a query: its largest score, the sum of its lanes

/* Rows are tokens of one sequence that follow each other; of each the query heads of kv heads that
 * follow each other, against the sequence's pages. Each query is computed alone:
 * A page holds, from offset on, for each kv head its keys (PAGE_POSITIONS / 16, head_dim, 16):
 * dimension-major inside a tile of 16 positions, so that one load feeds 16 scores; and then its
 * values (PAGE_POSITIONS, head_dim). In q8 either are int8 codes with their positions' f32 scales
 * (PAGE_POSITIONS) behind them: k[p][i] below is then the code, s[p] is multiplied by the key's
 * scale when its sum is done, and so is w[p] by the value's before it meets v[p][i], the code; the
 * sum of weights takes w[p] as it was.
 * Per page, in rising order: s[p] = fma(q[i], k[p][i], s[p]) in rising i from 0; m' = max(m, all
 * s of the page); scale = exp(m - m'); w[p] = exp(s[p] - m'); the weights sum "in lanes" that
 * are scaled too: lane = lane * scale, then + w[p]; out[i] = out[i] * scale, then
 * out[i] = fma(w[p], v[p][i], out[i]) in rising p. Last, out[i] / sum of lanes.
 * m starts at -infinity, where nothing is scaled yet; exp is exp_f32 below. A score that is NaN
 * makes all of out NaN. What stands at positions from n_positions on does not matter. */
struct attention {
    const float *q;           // rows of (n_heads, n_queries, head_dim), scaled by 1/sqrt(head_dim)
    float *out;               // the same shape
    size_t stride;            // floats from row to row of both
    size_t n_rows, n_heads, n_queries, head_dim; // the first three: at most ATTENDING in all
    const uint8_t *const *pages;
    size_t offset;            // bytes from a page's start to the first kv head's keys
    size_t n_positions;       // row r attends to positions 0..n_positions + r - 1; >= 1
    size_t most_positions;    // but to no more than so many, whole pages
    struct mark *marks;       // rows of (n_heads, n_queries), mark_stride apart; or NULL
    size_t mark_stride;
};

enum { ATTENDING = 64 };      // queries that go through the pages together

struct kernels {
    const char *isa;
    enum wide wide;
    void (*matmul_f32)(const struct matmul *m, size_t first, size_t last);
    void (*matmul_f16)(const struct matmul *m, size_t first, size_t last);
    void (*matmul_bf16)(const struct matmul *m, size_t first, size_t last);
    void (*matmul_q8)(const struct matmul *m, size_t first, size_t last);
    void (*matmul_q4)(const struct matmul *m, size_t first, size_t last);

    /* x (n) -> q, d, sum (groups) of 8 or 16 bits, as struct input has them. Per group:
     * a = max |x|; if a < 2^-100 all is 0; if any x is NaN or infinite, d = NaN and codes are 0;
     * else, the largest code c being 127 or 127 * 256, d = a / c and
     * q = round half to even(x * (c / a)). */
    void (*quantize_row)(const float *x, size_t n, int bits, int8_t *q, float *d, int32_t *sum);

    /* x (n) -> out (n), n a multiple of GROUP: each group as rotate_group (quant.h) turns it, times
     * ROTATED_INPUT. */
    void (*rotate_row)(float *out, const float *x, size_t n);

    /* out[i] = w[i] * (x[i] * s),  s = 1 / sqrt(sum of x[i]^2 / n + eps): the squares added "in
     * lanes" by fma; division, sqrt as IEEE has them (arXiv:1910.07467, eq. 4). */
    void (*rms_norm)(float *out, const float *x, const float *w, size_t n, float eps);

    /* Rotates pairs (x[2i], x[2i+1]) of one head by angle i: a' = fma(a, cos, -(b * sin)),
     * b' = fma(a, sin, b * cos) (arXiv:2104.09864, eq. 34). n = head_dim, even. */
    void (*rope)(float *x, const float *cos, const float *sin, size_t n);

    /* gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]   (arXiv:2002.05202, SwiGLU) */
    void (*swiglu)(float *gate, const float *up, size_t n);
    void (*add)(float *x, const float *y, size_t n); // x += y

    /* KV pages hold f32, f16 or q8; x (n) -> n elements at out. */
    void (*attend_f32)(const struct attention *a);
    void (*attend_f16)(const struct attention *a);
    void (*attend_q8)(const struct attention *a);
    void (*to_f16)(uint16_t *out, const float *x, size_t n);
    /* x (n) -> a code at each out[i * step], and their scale: quantize_row's rule for one group
     * of n. */
    void (*to_q8)(int8_t *out, size_t step, float *scale, const float *x, size_t n);
    /* hadamard of quant.h. Keys and queries so turned have b times the product they had, and a
     * key's largest element is nearer to the others, so that codes lose less (arXiv:2404.00456,
     * section 4). */
    void (*hadamard)(float *x, size_t n);

    /* The best scale (TILE_ROWS) of a q8 block for values (GROUP, TILE_ROWS): fit.h. */
    void (*fit_q8)(const float *values, float *scale);
    /* The best scale and shift (TILE_ROWS) of a q4 block for values (GROUP, TILE_ROWS), whose
     * columns count by importance (GROUP), 0 for a column that is not there: fit.h. */
    void (*fit_q4)(const struct levels *levels, const float *values, const float *importance,
                   float *scale, float *shift);
};

/* exp in f32, the same bits everywhere, within 2 ulp; exp(-infinity) = 0; NaN gives NaN.
 * exp.h has the steps and the constants. */
float exp_f32(float x);

/* The best table this CPU can run, or the one called NAME (NULL: best); NULL if it cannot. */
const struct kernels *kernels_find(const char *name);
/* The I-th that this build and CPU can run, best first; NULL past the last. */
const struct kernels *kernels_at(size_t i);

/* What kernels.c calls to fill a table, each in its own file compiled with its own ISA flags. */
void kernels_scalar(struct kernels *k);
void kernels_avx2(struct kernels *k);
void kernels_avxvnni(struct kernels *k);
void kernels_avx512(struct kernels *k);
void kernels_avx512vnni(struct kernels *k);
void kernels_avx512vbmi(struct kernels *k);
void kernels_evexvnni(struct kernels *k); // avxvnni in AVX-512's encoding: for tests only
void kernels_neon(struct kernels *k);
void kernels_neondot(struct kernels *k);
#endif
