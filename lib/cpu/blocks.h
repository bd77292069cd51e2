/* blocks.h: what the ISA files share: how register blocks are laid over a matrix, and the table.
 *
 * An ISA file writes, in its own intrinsics, a register block of S strips by T tokens as inlined
 * functions whose S, T and kind are constants where they are called from here, so that each call
 * becomes its own unrolled loop. Their best sizes stand in the file that includes this one. */
#ifndef BLOCKS_H
#define BLOCKS_H
#include "../fit.h"
#include "kernels.h"
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

enum store { F32, F16, BF16, Q8, Q4 };

/* Of the float kinds, and of the codes of q8. */
INLINE size_t element_bytes(enum store kind) {
    return kind == F32 ? 4 : kind == Q8 ? 1 : 2;
}

/* Columns of a piece: what PIECE columns of a block's strips take, 128 KiB of f32 (4 strips) or
 * 136 KiB of q8 (2 strips), lies in L2 while all tokens pass by. */
enum { FLOAT_PIECE = 512, GROUP_PIECE = 128 };

/* Where a register block works: strips from STRIP, tokens from TOKEN, columns [from, to) in
 * units of the kind's block. */
struct place {
    size_t strip, token, from, to;
    size_t ahead;           // bytes to the strips that are next, which are fetched meanwhile; or 0
};

/* Asks for BYTES at P, which will be read soon: into L2, for of reads on their way to L1 a core
 * has few (q8, 8 tokens: 117 GMAC/s against 77). */
INLINE void fetch(const uint8_t *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* The sums of strip S for token T of a block, (16). They are zero at column 0 and stand here
 * between one piece of the columns and the next. */
INLINE float *sums_at(const struct matmul *m, const struct place *at, int s, int t) {
    return m->y + (at->token + t) * m->y_stride + (at->strip + s) * TILE_ROWS;
}

INLINE size_t count_groups(const struct input *in) {
    return (in->columns + GROUP - 1) / GROUP;
}

// ---- what an ISA file supplies

INLINE void float_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int S, const int T);
INLINE void group_block(const struct matmul *m, const struct place *at, enum store kind,
                        const int bits, const int S, const int T);
/* A whole group, as quantize_row of kernels.h has it. */
INLINE void quantize_group(const float *x, int bits, int8_t *q, float *d, int32_t *sum);
static void rotate_row(float *out, const float *x, size_t n);
static void rms_norm(float *out, const float *x, const float *w, size_t n, float eps);
static void rope(float *x, const float *cos, const float *sin, size_t n);
static void swiglu(float *gate, const float *up, size_t n);
static void add(float *x, const float *y, size_t n);
static void to_f16(uint16_t *out, const float *x, size_t n);

// ---- matmul

/* BITS: of a quantised kind's input codes; 0 for the others. */
INLINE void block(const struct matmul *m, const struct place *at, enum store kind, const int bits,
                  const int S, const int T) {
    if (bits) group_block(m, at, kind, bits, S, T);
    else float_block(m, at, kind, S, T);
}

/* All tokens against S strips, in blocks of MOST (up to 8) while they last. */
INLINE void all_tokens(const struct matmul *m, struct place at, enum store kind, const int bits,
                       const int S, const int most) {
    const size_t n = m->in->n;
    for (at.token = 0; n - at.token >= (size_t)most; at.token += most) {
        block(m, &at, kind, bits, S, most);
        at.ahead = 0;
    }
    switch (n - at.token) {
    case 1: if (most > 1) block(m, &at, kind, bits, S, 1); break;
    case 2: if (most > 2) block(m, &at, kind, bits, S, 2); break;
    case 3: if (most > 3) block(m, &at, kind, bits, S, 3); break;
    case 4: if (most > 4) block(m, &at, kind, bits, S, 4); break;
    case 5: if (most > 5) block(m, &at, kind, bits, S, 5); break;
    case 6: if (most > 6) block(m, &at, kind, bits, S, 6); break;
    case 7: if (most > 7) block(m, &at, kind, bits, S, 7); break;
    }
}

/* One token: memory is what waits. Strips are read one after another, for one stream goes on into
 * the next strip where two would start anew, and prefetch instructions only cost.
 * Many tokens: a piece of a few strips, small enough for L2, meets all of them. In between, where
 * one strip alone can meet them all at once, it does (8 tokens of q4: 7 to 14% more than 6 and 2).
 */
INLINE void matmul(const struct matmul *m, size_t first, size_t last, enum store kind,
                   const int bits) {
    const int most = bits == 0 ? FLOAT_TOKENS : bits == 8 ? GROUP_TOKENS : WIDE_TOKENS;
    const int most_once = bits == 0 ? 0 : bits == 8 ? GROUP_ONCE : WIDE_ONCE;
    const int most_strips = bits ? GROUP_STRIPS : FLOAT_STRIPS;
    const size_t n = m->in->n, columns = bits ? count_groups(m->in) : m->in->columns;
    const int few = n <= (size_t)most, once = !few && n <= (size_t)most_once;
    const size_t piece = few || once ? columns : bits ? GROUP_PIECE : FLOAT_PIECE;
    const size_t wide = n == 1 || once ? 1 : (size_t)most_strips;
    struct place at = {.strip = first, .to = columns};
    while (at.strip < last) {
        size_t S = last - at.strip >= wide ? wide : 1;
        for (at.from = 0; at.from < columns; at.from = at.to) {
            at.to = columns - at.from < piece ? columns : at.from + piece;
            at.ahead = n > 1 && last - at.strip > S ? S * m->strip_bytes : 0;
            if (once) all_tokens(m, at, kind, bits, 1, most_once);
            else if (S == (size_t)most_strips) all_tokens(m, at, kind, bits, most_strips, most);
            else all_tokens(m, at, kind, bits, 1, most);
        }
        at.strip += S;
    }
}

static void matmul_f32(const struct matmul *m, size_t first, size_t last) {
    matmul(m, first, last, F32, 0);
}

static void matmul_f16(const struct matmul *m, size_t first, size_t last) {
    matmul(m, first, last, F16, 0);
}

static void matmul_bf16(const struct matmul *m, size_t first, size_t last) {
    matmul(m, first, last, BF16, 0);
}

static void matmul_q8(const struct matmul *m, size_t first, size_t last) {
    if (m->in->bits == 8) matmul(m, first, last, Q8, 8);
    else matmul(m, first, last, Q8, 16);
}

static void matmul_q4(const struct matmul *m, size_t first, size_t last) {
    if (m->in->bits == 8) matmul(m, first, last, Q4, 8);
    else matmul(m, first, last, Q4, 16);
}

// ---- one row

static void quantize_row(const float *x, size_t n, int bits, int8_t *q, float *d, int32_t *sum) {
    const size_t whole = n / GROUP, group_bytes = GROUP * (size_t)bits / 8;
    float rest[GROUP] = {0};
    for (size_t g = 0; g < whole; g++)
        quantize_group(x + g * GROUP, bits, q + g * group_bytes, d + g, sum + g);
    if (n % GROUP) {
        memcpy(rest, x + whole * GROUP, n % GROUP * sizeof *rest);
        quantize_group(rest, bits, q + whole * group_bytes, d + whole, sum + whole);
    }
}

/* rope for the pairs from I on that no register holds. */
INLINE void rope_rest(float *x, const float *cos, const float *sin, size_t i, size_t n) {
    for (; i < n; i += 2) {
        const float a = x[i], b = x[i + 1], c = cos[i / 2], s = sin[i / 2];
        x[i] = fmaf(a, c, -(b * s));
        x[i + 1] = fmaf(a, s, b * c);
    }
}

// ---- attention

/* Where a page's scales follow its codes, of keys or of values. */
INLINE const float *scales_of(const uint8_t *codes, size_t head_dim) {
    return (const float *)(const void *)(codes + PAGE_POSITIONS * head_dim);
}

/* A query on its way through the pages; struct softmax is the ISA's. */
struct query {
    const float *q;
    float *out;
    struct mark *mark;      // or NULL
    size_t end;             // attends to positions [0, end)
    struct softmax state;
};

/* One kv head's part of a page of which the first N positions count, and the part that is next,
 * which is fetched meanwhile. */
struct head_page {
    const uint8_t *k, *v, *next_k, *next_v;
    size_t n, head_dim;
};

/* What the ISA supplies: the state before the first page; the weights of page P's positions for Q
 * queries, up to MOST_QUERIES; its values added to dimensions [i, i + D VALUE_LANES) of their
 * sums, SOME of the last VALUE_LANES being there; out / sum of lanes, and the mark. */
INLINE void begin(struct softmax *state);
INLINE void weigh_page(const struct head_page *p, struct query *of, enum store kind, const int Q);
INLINE void add_values(const struct head_page *p, struct query *of, size_t i, size_t some,
                       enum store kind, const int Q, const int D);
INLINE void finish(struct query *of, size_t head_dim);

INLINE void attend_page(const struct head_page *p, struct query *of, enum store kind, const int Q) {
    const int width = Q > 4 ? VALUE_WIDTH / 2 : VALUE_WIDTH; // sums that registers have room for
    const size_t wide = (size_t)width * VALUE_LANES;
    size_t i = 0;
    weigh_page(p, of, kind, Q);
    for (; p->head_dim - i >= wide; i += wide)
        add_values(p, of, i, VALUE_LANES, kind, Q, width);
    for (; i < p->head_dim; i += VALUE_LANES)
        add_values(p, of, i, p->head_dim - i, kind, Q, 1);
}

/* How many positions of the page that begins at START a query attends to. */
INLINE size_t seen(const struct query *of, size_t start) {
    if (of->end <= start) return 0; // of a row before the one that opened the page
    return of->end - start < PAGE_POSITIONS ? of->end - start : PAGE_POSITIONS;
}

/* N queries of a kv head meet its part of the page that begins at START; neighbours that see as
 * much of it, together. */
INLINE void attend_head(struct head_page page, struct query *of, size_t n, size_t start,
                        enum store kind) {
    for (size_t i = 0, alike; i < n; i += alike) {
        page.n = seen(of + i, start);
        const size_t most = n - i < MOST_QUERIES ? n - i : MOST_QUERIES;
        for (alike = page.n < PAGE_POSITIONS ? 1 : most; alike < most; alike++)
            if (seen(of + i + alike, start) != page.n) break;
        if (page.n == 0) continue;
        if (alike > 4 && alike < 8) alike = 4;
        switch (alike) {
        case 1: attend_page(&page, of + i, kind, 1); break;
        case 2: attend_page(&page, of + i, kind, 2); break;
        case 3: attend_page(&page, of + i, kind, 3); break;
        case 4: attend_page(&page, of + i, kind, 4); break;
        case 8: if (MOST_QUERIES >= 8) attend_page(&page, of + i, kind, 8); break;
        }
        page.next_k = page.k, page.next_v = page.v; // fetched already
    }
}

/* Page by page, and head by head in it: that is the order in which they lie in memory. */
INLINE void attend(const struct attention *a, enum store kind) {
    const size_t each = a->n_rows * a->n_queries, d = a->head_dim;
    const size_t scale_bytes = kind == Q8 ? sizeof(float) : 0;
    const size_t half = PAGE_POSITIONS * (d * element_bytes(kind) + scale_bytes);
    const size_t last = a->n_positions + a->n_rows - 1;
    const size_t end = last < a->most_positions ? last : a->most_positions;
    struct query all[ATTENDING];
    for (size_t j = 0; j < a->n_heads * each; j++) {
        const size_t row = j % each / a->n_queries;
        const size_t head = j / each * a->n_queries + j % a->n_queries;
        const size_t at = row * a->stride + head * d;
        all[j].q = a->q + at;
        all[j].out = a->out + at;
        all[j].mark = a->marks ? a->marks + row * a->mark_stride + head : NULL;
        all[j].end = a->n_positions + row < end ? a->n_positions + row : end;
        memset(all[j].out, 0, d * sizeof *all[j].out);
        begin(&all[j].state);
    }
    for (size_t p = 0; p < end; p += PAGE_POSITIONS) {
        const uint8_t *const *page = a->pages + p / PAGE_POSITIONS;
        for (size_t head = 0; head < a->n_heads; head++) {
            const uint8_t *k = *page + a->offset + 2 * half * head, *next = k + 2 * half;
            if (head + 1 == a->n_heads)
                next = p + PAGE_POSITIONS < end ? page[1] + a->offset : k;
            const struct head_page part = {k, k + half, next, next + half, 0, d};
            attend_head(part, all + head * each, each, p, kind);
        }
    }
    for (size_t j = 0; j < a->n_heads * each; j++)
        finish(all + j, d);
}

static void attend_f32(const struct attention *a) {
    attend(a, F32);
}

static void attend_f16(const struct attention *a) {
    attend(a, F16);
}

static void attend_q8(const struct attention *a) {
    attend(a, Q8);
}

// ---- the table

static void fill_table(struct kernels *k, const char *isa) {
    k->isa = isa;
    k->wide = WIDE;
    k->matmul_f32 = matmul_f32;
    k->matmul_f16 = matmul_f16;
    k->matmul_bf16 = matmul_bf16;
    k->matmul_q8 = matmul_q8;
    k->matmul_q4 = matmul_q4;
    k->quantize_row = quantize_row;
    k->rotate_row = rotate_row;
    k->rms_norm = rms_norm;
    k->rope = rope;
    k->swiglu = swiglu;
    k->add = add;
    k->attend_f32 = attend_f32;
    k->attend_f16 = attend_f16;
    k->attend_q8 = attend_q8;
    k->to_f16 = to_f16;
    k->fit_q8 = fit_q8;
    k->fit_q4 = fit_q4;
}
#endif
