/* kernels_rows.c: the entries that work on one row, and attention. See kernels.c. */
#include "kernels_check.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static const size_t lengths[] = {1, 2, 8, 15, 16, 17, 31, 32, 33, 63, 64, 100, 576, 1001};
enum { N_LENGTHS = sizeof lengths / sizeof *lengths, HALVES = 8, N_ROW_SCENES = 10 };

/* Scenes of rows: sizes from subnormal to overflowing, then specials, then one NaN or infinity,
 * then numbers half way between two codes, the scale being 1; then zeros. */
static float *make_row(size_t n, int scene) {
    static const float scales[N_ROW_SCENES] = {1, 30, 1e-30f, 1e-39f, 1e20f, 3e38f, 1, 1, 126, 0};
    float *x = guarded(n * sizeof *x);
    fill(x, n, scales[scene]);
    for (size_t i = 0; scene == 6 && i < n; i++)
        x[i] = random_bits() % 8 ? x[i] : special();
    if (scene == 7)
        x[random_bits() % n] = n % 2 ? NAN : -INFINITY;
    for (size_t i = 0; scene == HALVES && i < n; i++)
        x[i] = i % GROUP ? floorf(x[i]) + 0.5f : 127;
    return x;
}

static float *copy_row(const float *x, size_t n) {
    return memcpy(guarded(n * sizeof *x), x, n * sizeof *x);
}

static void test_quantize_row(size_t n, int bits, int scene) {
    size_t groups = (n + GROUP - 1) / GROUP, bytes = groups * GROUP * (size_t)bits / 8, wrong = 0;
    const double half = bits == 8 ? 0.5001 : 0.51; // x * (c / a) is rounded twice
    const enum wide wide = sets[n_sets - 1]->wide;
    const float *x = make_row(n, scene);
    int8_t *q = guarded(bytes);
    float *d = guarded(groups * sizeof *d);
    int32_t *sum = guarded(groups * sizeof *sum);
    sets[n_sets - 1]->quantize_row(x, n, bits, q, d, sum);
    for (size_t i = 0; i < groups * GROUP; i++) {
        const float scale = d[i / GROUP];
        const int code = code_at(q, i, bits, wide);
        wrong += i >= n            ? code != 0
                 : isnan(scale)    ? code != 0
                 : scale == 0      ? code != 0 || !(fabsf(x[i]) < 0x1p-100f)
                 : scene == HALVES ? (float)code != rintf(x[i] * (bits == 8 ? 1.f : 256.f))
                                   : fabs(x[i] / (double)scale - code) > half;
        sum[i / GROUP] -= code;
    }
    for (size_t g = 0; g < groups; g++)
        wrong += sum[g] != 0;
    check(wrong == 0, "scalar quantize_row %zu, %d bits, scene %d: %zu wrong", n, bits, scene,
          wrong);
    for (size_t i = 0; i < groups * GROUP; i++)
        sum[i / GROUP] += code_at(q, i, bits, wide);
    for (size_t i = 0; i + 1 < n_sets; i++) {
        int8_t *q2 = guarded(bytes);
        size_t differ = 0;
        float *d2 = guarded(groups * sizeof *d2);
        int32_t *sum2 = guarded(groups * sizeof *sum2);
        sets[i]->quantize_row(x, n, bits, q2, d2, sum2);
        same(sets[i]->isa, "quantize_row d", d, d2, groups);
        for (size_t j = 0; j < groups * GROUP; j++)
            differ += code_at(q, j, bits, wide) != code_at(q2, j, bits, sets[i]->wide);
        check(differ == 0 && memcmp(sum, sum2, groups * sizeof *sum) == 0,
              "%s quantize_row %zu, %d bits, scene %d: %zu codes differ", sets[i]->isa, n, bits,
              scene, differ);
    }
}

static void test_norm(size_t n, int scene) {
    const float *x = make_row(n, scene), *w = make_row(n, 0), eps = scene % 2 ? 1e-5f : 0x1p-20f;
    float *want = guarded(n * sizeof *want);
    double sum = 0;
    size_t bad = 0;
    sets[n_sets - 1]->rms_norm(want, x, w, n, eps);
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    for (size_t i = 0; i < n && scene < 4; i++) {
        double value = w[i] * (x[i] / sqrt(sum / (double)n + eps));
        bad += !near(value, want[i], fabs(value) * 1e-5 + 1e-44);
    }
    check(bad == 0, "scalar rms_norm %zu, scene %d: %zu off", n, scene, bad);
    for (size_t i = 0; i + 1 < n_sets; i++) {
        float *got = guarded(n * sizeof *got);
        sets[i]->rms_norm(got, x, w, n, eps);
        same(sets[i]->isa, "rms_norm", want, got, n);
    }
}

static void test_rope(size_t n, int scene) {
    const float *x = make_row(n, scene), *cos = make_row(n / 2, 0), *sin = make_row(n / 2, 0);
    float *want = copy_row(x, n);
    size_t bad = 0;
    sets[n_sets - 1]->rope(want, cos, sin, n);
    for (size_t i = 0; i < n && scene < 5; i++) {
        double a = x[i & ~(size_t)1], b = x[i | 1];
        double value = i & 1 ? a * sin[i / 2] + b * cos[i / 2] : a * cos[i / 2] - b * sin[i / 2];
        bad += !near(value, want[i], (fabs(a) + fabs(b)) * 2e-7 + 1e-44);
    }
    check(bad == 0, "scalar rope %zu, scene %d: %zu off", n, scene, bad);
    for (size_t i = 0; i + 1 < n_sets; i++) {
        float *got = copy_row(x, n);
        sets[i]->rope(got, cos, sin, n);
        same(sets[i]->isa, "rope", want, got, n);
    }
}

static void test_elements(size_t n, int scene) {
    const float *x = make_row(n, scene), *y = make_row(n, scene == 6 ? 6 : 0);
    float *gated = copy_row(x, n), *added = copy_row(x, n);
    uint16_t *half = guarded(n * sizeof *half);
    size_t bad = 0;
    sets[n_sets - 1]->swiglu(gated, y, n);
    sets[n_sets - 1]->add(added, y, n);
    sets[n_sets - 1]->to_f16(half, x, n);
    for (size_t i = 0; i < n && scene < 6; i++) {
        double gate = x[i] / (1 + exp(-(double)x[i])) * y[i];
        bad += !near(gate, gated[i], fabs(gate) * 1e-6 + 1e-36);
        bad += !near(x[i] + y[i], added[i], 0);
        bad += half[i] != f32_to_f16(x[i]);
    }
    check(bad == 0, "scalar swiglu, add, to_f16 %zu, scene %d: %zu off", n, scene, bad);
    for (size_t i = 0; i + 1 < n_sets; i++) {
        float *got = copy_row(x, n);
        uint16_t *got_half = guarded(n * sizeof *half);
        size_t differ = 0;
        sets[i]->swiglu(got, y, n);
        same(sets[i]->isa, "swiglu", gated, got, n);
        got = copy_row(x, n);
        sets[i]->add(got, y, n);
        same(sets[i]->isa, "add", added, got, n);
        sets[i]->to_f16(got_half, x, n);
        for (size_t j = 0; j < n; j++)
            differ += half[j] != got_half[j] && !(isnan(x[j]) && isnan(f16_to_f32(got_half[j])));
        check(differ == 0, "%s to_f16 %zu, scene %d: %zu differ", sets[i]->isa, n, scene, differ);
    }
}

/* Codes of one group as long as the row, STEP apart. */
static void test_to_q8(size_t n, size_t step, int scene) {
    const float *x = make_row(n, scene);
    int8_t *codes = guarded(n * step); // scalar's
    float first;
    memset(codes, 99, n * step);
    sets[n_sets - 1]->to_q8(codes, step, &first, x, n);
    for (size_t s = n_sets; s-- > 0;) {
        int8_t *q = guarded(n * step);
        float d, largest = 0;
        size_t wrong = 0;
        memset(q, 99, n * step);
        sets[s]->to_q8(q, step, &d, x, n);
        for (size_t i = 0; i < n; i++) {
            largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
            wrong += isnan(d) || d == 0 ? q[i * step] != 0
                                        : fabs(x[i] / (double)d - q[i * step]) > 0.5001;
            for (size_t j = 1; j < step; j++)
                wrong += q[i * step + j] != 99;
        }
        if (d == 0) wrong += !(largest < 0x1p-100f);
        else if (scene < 6) wrong += !(fabs(largest - 127.0 * d) <= 1e-6 * largest);
        check(wrong == 0, "%s to_q8 %zu by %zu, scene %d: %zu wrong", sets[s]->isa, n, step, scene,
              wrong);
        same(sets[s]->isa, "to_q8 scale", &first, &d, 1);
        check(memcmp(codes, q, n * step) == 0, "%s to_q8 %zu by %zu, scene %d: codes differ",
              sets[s]->isa, n, step, scene);
    }
}

/* Against the matrix itself: +1 where i & j have an even number of ones, in blocks. */
static void test_hadamard(size_t n, int scene) {
    const float *x = make_row(n, scene);
    const size_t block = n & -n;
    for (size_t s = 0; s < n_sets; s++) {
        float *turned = copy_row(x, n);
        size_t wrong = 0;
        sets[s]->hadamard(turned, n);
        for (size_t i = 0; i < n && scene < 5; i++) {
            double sum = 0, size = 0;
            for (size_t j = i / block * block, end = j + block; j < end; j++) {
                sum += __builtin_parityll(i & j & (block - 1)) ? -(double)x[j] : x[j];
                size += fabs((double)x[j]);
            }
            wrong += !near(sum, turned[i], size * 1e-6);
        }
        check(wrong == 0, "%s hadamard %zu, scene %d: %zu off", sets[s]->isa, n, scene, wrong);
        float *first = copy_row(x, n);
        sets[n_sets - 1]->hadamard(first, n);
        same(sets[s]->isa, "hadamard", first, turned, n);
    }
}

/* Against the matrix itself, and back to where it came from. */
static void test_rotate_row(size_t n, int scene) {
    const float *x = make_row(n, scene);
    float *first = guarded(n * sizeof *first);
    sets[n_sets - 1]->rotate_row(first, x, n);
    for (size_t s = 0; s < n_sets; s++) {
        float *turned = guarded(n * sizeof *turned);
        size_t wrong = 0;
        sets[s]->rotate_row(turned, x, n);
        for (size_t i = 0; i < n && scene < 5; i++) {
            double sum = 0, size = 0;
            for (size_t j = i / GROUP * GROUP, end = j + GROUP; j < end; j++) {
                sum += __builtin_parityll(i & j & (GROUP - 1)) ? -(double)x[j] : x[j];
                size += fabs((double)x[j]);
            }
            wrong += !near(sum * 0.25, turned[i], size * 1e-6);
        }
        for (size_t i = 0; i < n; i += GROUP) {
            float back[GROUP], size = 0;
            memcpy(back, turned + i, sizeof back);
            rotate_group(back, ROTATED_WEIGHT);
            for (size_t j = 0; j < GROUP; j++) size += fabsf(x[i + j]);
            for (size_t j = 0; j < GROUP && scene < 5; j++)
                wrong += !near(x[i + j], back[j], size * 1e-6f);
        }
        check(wrong == 0, "%s rotate_row %zu, scene %d: %zu off", sets[s]->isa, n, scene, wrong);
        same(sets[s]->isa, "rotate_row", first, turned, n);
    }
}

void test_rows(void) {
    for (int i = 0; i < N_LENGTHS; i++)
        for (int scene = 0; scene < (quick < 2 ? N_ROW_SCENES : 1); scene++) {
            test_quantize_row(lengths[i], 8, scene);
            test_quantize_row(lengths[i], 16, scene);
            release_all();
            test_norm(lengths[i], scene);
            release_all();
            if (lengths[i] % 2 == 0)
                test_rope(lengths[i], scene);
            release_all();
            test_elements(lengths[i], scene);
            release_all();
            test_to_q8(lengths[i], scene % 2 ? 1 : 16, scene);
            test_hadamard(lengths[i], scene);
            if (lengths[i] % GROUP == 0) test_rotate_row(lengths[i], scene);
            release_all();
        }
}

// ---- attention

struct shape {
    size_t n_rows, n_heads, n_queries, head_dim;
    size_t n_positions, most; // of the first row; of any
};

static size_t all_positions(struct shape s) { return s.n_positions + s.n_rows - 1; }

/* How a page holds its numbers. */
enum hold { HOLD_F32, HOLD_F16, HOLD_Q8 };
static const size_t sizes[] = {4, 2, 1};
static const char *const hold_names[] = {"f32", "f16", "q8"};

/* Bytes of a page's keys, or values, of one head: with q8 scales stand behind the codes. */
static size_t half_page(size_t head_dim, enum hold hold) {
    return PAGE_POSITIONS * (head_dim * sizes[hold] + (hold == HOLD_Q8 ? sizeof(float) : 0));
}

static void put_number(uint8_t *half, size_t i, enum hold hold, float x) {
    uint16_t bits = f32_to_f16(x);
    int8_t code = (int8_t)random_bits(); // -128 too: a session's file may hold it
    const void *from[] = {&x, &bits, &code};
    memcpy(half + i * sizes[hold], from[hold], sizes[hold]);
}

/* Random pages, each ending where memory does; positions past the last hold NaN. With SPECIALS
 * one value of the last position's key, or of its value, is not finite; in q8 its scale; of each
 * head. Before the heads stands a whole one that does not count. */
static const uint8_t **make_pages(struct shape s, enum hold hold, int specials) {
    size_t n_positions = all_positions(s);
    size_t n_pages = (n_positions + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    size_t half = half_page(s.head_dim, hold), codes = PAGE_POSITIONS * s.head_dim;
    const uint8_t **pages = guarded(n_pages * sizeof *pages);
    for (size_t i = 0; i < n_pages; i++) {
        uint8_t *const start = guarded(2 * half * (1 + s.n_heads));
        pages[i] = start;
        for (size_t item = 0; item < s.n_heads * PAGE_POSITIONS; item++) {
            const size_t p = item % PAGE_POSITIONS;
            uint8_t *const page = start + 2 * half * (1 + item / PAGE_POSITIONS);
            const int last = i * PAGE_POSITIONS + p + 1 == n_positions;
            if (i * PAGE_POSITIONS + p >= n_positions) continue;
            for (size_t c = 0; c < 2 * s.head_dim; c++) {
                size_t k = (p / 16 * s.head_dim + c) * 16 + p % 16;
                size_t v = p * s.head_dim + c - s.head_dim;
                float x = uniform() * 2;
                if (specials && last) x = c == (specials == 1 ? 0 : s.head_dim) ? special() : x;
                if (c < s.head_dim) put_number(page, k, hold, x);
                else put_number(page + half, v, hold, x);
            }
            for (int c = 0; c < 2 && hold == HOLD_Q8; c++) {
                float scale = specials == 1 + c && last ? special() : fabsf(uniform()) / 64;
                memcpy(page + c * half + codes + p * sizeof scale, &scale, sizeof scale);
            }
        }
    }
    return pages;
}

/* Number I, of position P, of a page's keys or values. */
static double element(const uint8_t *at, size_t i, enum hold hold, size_t p, size_t head_dim) {
    uint16_t half;
    float x;
    if (hold == HOLD_F16) {
        memcpy(&half, at + 2 * i, sizeof half);
        return f16_to_f32(half);
    }
    memcpy(&x, hold == HOLD_F32 ? at + 4 * i : at + PAGE_POSITIONS * head_dim + 4 * p, sizeof x);
    return hold == HOLD_F32 ? x : (double)x * (int8_t)at[i];
}

/* softmax(q k) v in double, the plain way, and the marks: the number of elements that are off. */
static size_t wrong_attention(const struct attention *a, enum hold hold) {
    const size_t n = a->head_dim, heads = a->n_heads * a->n_queries, half = half_page(n, hold);
    size_t wrong = 0;
    double s[512], out[128];
    for (size_t j = 0; j < a->n_rows * heads; j++) {
        const size_t row = j / heads, all = a->n_positions + row;
        const size_t end = all < a->most_positions ? all : a->most_positions;
        const size_t at = row * a->stride + j % heads * n;
        const struct mark *mark = a->marks + row * a->mark_stride + j % heads;
        const size_t offset = 2 * half * (1 + j % heads / a->n_queries);
        double most = -INFINITY, sum = 0;
        for (size_t p = 0; p < end; p++) {
            const uint8_t *k = a->pages[p / PAGE_POSITIONS] + offset;
            size_t lane = p % PAGE_POSITIONS;
            s[p] = 0;
            for (size_t i = 0; i < n; i++)
                s[p] += a->q[at + i] *
                        element(k, (lane / 16 * n + i) * 16 + lane % 16, hold, lane, n);
            most = s[p] > most ? s[p] : most;
        }
        memset(out, 0, sizeof out);
        for (size_t p = 0; p < end; p++) {
            const uint8_t *v = a->pages[p / PAGE_POSITIONS] + offset + half;
            double w = exp(s[p] - most);
            size_t lane = p % PAGE_POSITIONS;
            sum += w;
            for (size_t i = 0; i < n; i++)
                out[i] += w * element(v, lane * n + i, hold, lane, n);
        }
        for (size_t i = 0; i < n; i++)
            wrong += !near(out[i] / sum, a->out[at + i], 3e-5); // 1.2e-5 seen at head_dim 128
        wrong += !near(most, mark->m, 3e-5) + !near(sum, mark->sum, 3e-5 * sum);
    }
    return wrong;
}

static void run_attend(const struct kernels *k, const struct attention *a, enum hold hold) {
    (hold == HOLD_F32 ? k->attend_f32 : hold == HOLD_F16 ? k->attend_f16 : k->attend_q8)(a);
}

static void test_attend(struct shape s, enum hold hold, int specials) {
    char what[128];
    size_t stride = s.n_heads * s.n_queries * s.head_dim + 3, size = s.n_rows * stride - 3;
    float *q = guarded(size * sizeof *q), *want = guarded(size * sizeof *want);
    fill(q, size, specials == 3 ? 1e30f : 1);
    const uint8_t **pages = make_pages(s, hold, specials % 3);
    struct attention a = {.q = q, .out = want, .stride = stride, .n_rows = s.n_rows,
                          .n_heads = s.n_heads, .n_queries = s.n_queries, .head_dim = s.head_dim,
                          .pages = pages, .offset = 2 * half_page(s.head_dim, hold),
                          .n_positions = s.n_positions, .most_positions = s.most,
                          .mark_stride = s.n_heads * s.n_queries + 1};
    memset(want, 0, size * sizeof *want); // between the rows
    const size_t n_marks = s.n_rows * a.mark_stride;
    struct mark *const marks = a.marks = guarded(n_marks * sizeof *marks);
    memset(marks, 0, n_marks * sizeof *marks);
    run_attend(sets[n_sets - 1], &a, hold);
    snprintf(what, sizeof what,
             "attend_%s %zu rows of %zu x %zu, head_dim %zu, %zu positions, scene %d",
             hold_names[hold], s.n_rows, s.n_heads, s.n_queries, s.head_dim, s.n_positions,
             specials);
    if (!specials) {
        size_t wrong = wrong_attention(&a, hold);
        check(wrong == 0, "scalar %s: %zu off", what, wrong);
    }
    for (size_t i = 0; i + 1 < n_sets; i++) {
        a.out = guarded(size * sizeof *a.out);
        memset(a.out, 0, size * sizeof *a.out);
        a.marks = guarded(n_marks * sizeof *marks);
        memset(a.marks, 0, n_marks * sizeof *marks);
        run_attend(sets[i], &a, hold);
        same(sets[i]->isa, what, want, a.out, size);
        same(sets[i]->isa, what, &marks->m, &a.marks->m, 2 * n_marks);
    }
    release_all();
}

void test_attention(void) {
    static const size_t rows[] = {1, 2, 5}, queries[] = {1, 2, 3, 4, 7, 8},
                        dims[] = {2, 6, 8, 64, 80, 128},
                        positions[] = {1, 15, 16, 17, 29, 31, 32, 33, 64, 100, 321};
    for (size_t r = 0; r < 3; r += quick ? 2 : 1)
        for (size_t q = 0; q < (r ? 3 : 6); q += quick ? 2 : 1)
            for (size_t d = 0; d < 6; d++)
                for (size_t p = 0; p < (quick < 2 ? 11 : 1); p++)
                    for (enum hold hold = HOLD_F32; hold <= HOLD_Q8; hold++)
                        for (int specials = 0; specials < (d % 2 ? 1 : 4); specials++)
                            test_attend((struct shape){rows[r], 1 + (r + q + d) % 3, queries[q],
                                                       dims[d], positions[p],
                                                       specials == 3 ? 32 : 512}, hold, specials);
    test_attend((struct shape){1, 1, ATTENDING, 64, 321, 512}, HOLD_F16, 0);
    test_attend((struct shape){2, ATTENDING / 2, 1, 8, 321, 320}, HOLD_F16, 0);
    test_attend((struct shape){4, 2, 3, 80, 62, 64}, HOLD_Q8, 0); // two rows see all of 64
}

/* A scale, a shift and the levels nearest to them leave no more than plain choices do. */
static double fit_error(const struct levels *levels, const float *x, const float *w, float scale,
                        float shift, size_t r) {
    double sum = 0;
    for (size_t c = 0; c < GROUP; c++) {
        const float value = x[c * TILE_ROWS + r];
        const int code = q4_code(levels, value, scale, shift);
        const double off = (double)value - scale * (levels->at[code] + shift);
        sum += w[c] * off * off;
    }
    return sum;
}

static void test_fit(uint32_t kind, float size, float middle, int scene) {
    const struct levels *levels = kind_find(kind)->levels;
    const double most_worse = kind == LLAMA_Q4E ? 1.5 : 1.2; // the tries are laid out for q4
    float x[GROUP * TILE_ROWS], w[GROUP], want[2 * TILE_ROWS], got[2 * TILE_ROWS], eight[TILE_ROWS];
    char what[64];
    size_t worse = 0;
    for (size_t i = 0; i < GROUP * TILE_ROWS; i++)
        x[i] = scene == 1 && i % 5 ? 0 : size * (middle + uniform() * uniform());
    for (size_t c = 0; c < GROUP; c++) w[c] = scene == 2 ? c % 3 ? uniform() + 1 : 0 : 1;
    if (scene == 3) x[3 * TILE_ROWS] = 1e4f;
    sets[n_sets - 1]->fit_q4(levels, x, w, want, want + TILE_ROWS);
    snprintf(what, sizeof what, "fit_q4 for %s of %g around %g, scene %d", kind_find(kind)->name,
             (double)size, (double)middle, scene);
    sets[n_sets - 1]->fit_q8(x, eight);
    for (size_t i = 0; i + 1 < n_sets; i++) {
        sets[i]->fit_q8(x, got);
        same(sets[i]->isa, "fit_q8", eight, got, TILE_ROWS);
        sets[i]->fit_q4(levels, x, w, got, got + TILE_ROWS);
        same(sets[i]->isa, what, want, got, 2 * TILE_ROWS);
    }
    for (size_t r = 0; r < TILE_ROWS; r++) {
        float most = 0;
        for (size_t c = 0; c < GROUP; c++)
            if (w[c] > 0 && fabsf(x[c * TILE_ROWS + r]) > most) most = fabsf(x[c * TILE_ROWS + r]);
        if (size < 2e-4f) continue; // there the scale's own steps decide
        const float top = levels->at[15];
        const double error = fit_error(levels, x, w, want[r], want[r + TILE_ROWS], r);
        if (error > 1.001 * fit_error(levels, x, w, 0, 0, r) ||
            error > most_worse * fit_error(levels, x, w, most / top, 0, r) + 1e-12 ||
            error > most_worse * fit_error(levels, x, w, -most / top, 0, r) + 1e-12)
            worse++;
    }
    check(worse == 0, "scalar %s: %zu rows that a plain scale serves better", what, worse);
}

void test_fits(void) {
    for (float size = quick < 2 ? 1e-7f : 1; size < (quick < 2 ? 1e3f : 2); size *= 10)
        for (int middle = -2; middle <= 2; middle++)
            for (int scene = 0; scene < 4; scene++) {
                test_fit(LLAMA_Q4, size, 0.3f * (float)middle, scene);
                test_fit(LLAMA_Q4E, size, 0.3f * (float)middle, scene);
            }
}
