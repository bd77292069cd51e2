/* moments.c: H = X^T X, and its factor, in square tiles that threads take in any order.
 *
 * The bulk of both is rows of one matrix against rows of another, which is what matmul_f32 does,
 * once sixteen of them are interleaved as a strip of weights. Each element is summed by one thread
 * in one order, so neither threads nor instruction set show in the result. */
#include "moments.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "error.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TILE = 64 }; // rows and columns of a tile: four strips

struct work {
    const struct kernels *kernels;
    float *moments;      // (columns, columns), of which the lower triangle is there
    size_t columns;
    const float *x;      // (columns, length) row I against the rows in
    size_t length, x_stride;
    const float *strips; // (strips, length, TILE_ROWS)
    size_t k, top;       // factor: the first column of the tiles being done, and their first row
    const double *solve; // (TILE, TILE) of the tile on the diagonal, 1 / its diagonal; or NULL
};

static size_t at_most(size_t n, size_t most) { return n < most ? n : most; }

static void *make(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes ? bytes : 64)) fail("out of memory for calibration");
    return memory;
}

/* y (n, TILE): rows [i, i + n) of x against the TILE rows in STRIP and the three that follow. */
static void multiply(const struct work *w, size_t i, size_t n, size_t strip, size_t strips,
                     float *y) {
    const struct input in = {.n = n, .columns = w->length, .x = w->x + i * w->x_stride,
                             .x_stride = w->x_stride};
    const size_t strip_bytes = w->length * TILE_ROWS * sizeof(float);
    const struct matmul job = {(const uint8_t *)w->strips + strip * strip_bytes, strip_bytes, &in,
                               y, TILE, NULL};
    w->kernels->matmul_f32(&job, 0, strips);
}

// ---- X^T X

static void add_range(void *context, size_t first, size_t last) {
    const struct work *w = context;
    float y[TILE * TILE];
    for (size_t i = first * TILE; i < at_most(last * TILE, w->columns); i += TILE) {
        const size_t n = at_most(TILE, w->columns - i);
        for (size_t j = 0; j <= i; j += TILE) {
            const size_t width = at_most(TILE, w->columns - j);
            multiply(w, i, n, j / TILE_ROWS, (width + TILE_ROWS - 1) / TILE_ROWS, y);
            for (size_t r = 0; r < n; r++)
                for (size_t c = 0; c < width && j + c <= i + r; c++)
                    w->moments[(i + r) * w->columns + j + c] += y[r * TILE + c];
        }
    }
}

int moments_add(const float *x, size_t n, size_t columns, int rotated, int threads,
                float *moments) {
    const size_t strips = (columns + TILE_ROWS - 1) / TILE_ROWS;
    float *turned = make(columns * n * sizeof *turned); // (columns, n)
    float *packed = make(strips * TILE_ROWS * n * sizeof *packed);
    struct pool *pool = turned && packed ? pool_open(threads) : NULL;
    if (pool) {
        for (size_t c = 0; c < columns; c += GROUP)
            for (size_t t = 0; t < n; t++) {
                float group[GROUP] = {0};
                memcpy(group, x + t * columns + c, at_most(GROUP, columns - c) * sizeof *group);
                if (rotated) rotate_group(group, ROTATED_INPUT);
                for (size_t i = 0; i < at_most(GROUP, columns - c); i++)
                    turned[(c + i) * n + t] = group[i];
                for (size_t i = 0; i < GROUP && (c + i) / TILE_ROWS < strips; i++)
                    packed[((c + i) / TILE_ROWS * n + t) * TILE_ROWS + i % TILE_ROWS] = group[i];
            }
        struct work w = {.kernels = kernels_find(NULL), .moments = moments, .columns = columns,
                         .x = turned, .length = n, .x_stride = n, .strips = packed};
        pool_run(pool, (columns + TILE - 1) / TILE, 1, add_range, &w);
        pool_close(pool);
    }
    free(turned);
    free(packed);
    return pool ? 0 : -1;
}

// ---- the factor

/* Turns the lower triangle about the other diagonal: (i, j) and (n - 1 - j, n - 1 - i) change
 * places. A Cholesky factor of what results, turned back, eliminates from the last column up. */
static void turn(float *a, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i && i + j < n - 1; j++) {
            float *one = a + i * n + j, *other = a + (n - 1 - j) * n + n - 1 - i, kept = *one;
            *one = *other;
            *other = kept;
        }
}

/* Takes off rows from TOP on what the columns before give, then solves for the tile's triangle. */
static void solve_range(void *context, size_t first, size_t last) {
    const struct work *w = context;
    const size_t width = at_most(TILE, w->columns - w->k);
    const size_t end = at_most(w->top + last * TILE, w->columns);
    float y[TILE * TILE] = {0};
    for (size_t i = w->top + first * TILE; i < end; i += TILE) {
        const size_t n = at_most(TILE, end - i);
        if (w->k) multiply(w, i, n, 0, (width + TILE_ROWS - 1) / TILE_ROWS, y);
        for (size_t r = 0; r < n; r++) {
            float *row = w->moments + (i + r) * w->columns + w->k;
            double values[TILE];
            for (size_t c = 0; c < width; c++) {
                values[c] = (double)row[c] - (double)y[r * TILE + c];
                for (size_t p = 0; p < c && w->solve; p++)
                    values[c] -= values[p] * w->solve[c * TILE + p];
                if (w->solve) values[c] *= w->solve[c * TILE + c];
                row[c] = (float)values[c];
            }
        }
    }
}

/* Cholesky of the tile at (k, k), in double; L (TILE, TILE) has the reciprocal of its diagonal.
 * 0 where a pivot is not a positive number. */
static int tile_factor(const float *a, size_t stride, size_t n, double *l) {
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++) {
            double sum = (double)a[i * stride + j];
            for (size_t p = 0; p < j; p++) sum -= l[i * TILE + p] * l[j * TILE + p];
            if (i == j && !(sum > 0 && sum < INFINITY)) return 0;
            l[i * TILE + j] = i == j ? 1 / sqrt(sum) : sum * l[j * TILE + j];
        }
    return 1;
}

/* The lower triangle A becomes L with A = L L^T, column of tiles by column of tiles, each from
 * all those before it. */
static int cholesky(struct work *w, struct pool *pool, float *packed) {
    const size_t n = w->columns;
    float *a = w->moments;
    double l[TILE * TILE];
    w->x = a;
    w->x_stride = n;
    w->strips = packed;
    for (w->k = 0; w->k < n; w->k += TILE) {
        const size_t k = w->k, width = at_most(TILE, n - k);
        w->length = k;
        for (size_t r = 0; r < TILE; r++)
            for (size_t c = 0; c < k; c++)
                packed[(r / TILE_ROWS * k + c) * TILE_ROWS + r % TILE_ROWS] =
                    r < width ? a[(k + r) * n + c] : 0;
        w->solve = NULL;
        w->top = k;
        solve_range(w, 0, 1);
        if (!tile_factor(a + k * n + k, n, width, l))
            return fail("calibration: the moments of a matrix's inputs are not finite, or not "
                        "those of any inputs");
        for (size_t i = 0; i < width; i++)
            for (size_t j = 0; j <= i; j++)
                a[(k + i) * n + k + j] = (float)(i == j ? 1 / l[i * TILE + j] : l[i * TILE + j]);
        w->solve = l;
        w->top = k + width;
        pool_run(pool, (n - w->top + TILE - 1) / TILE, 1, solve_range, w);
    }
    return 0;
}

int moments_factor(float *moments, size_t columns, double damping, int threads) {
    const size_t n = columns;
    // all that may be refused comes first, while the moments are as they were
    float *packed = make((TILE + 1) * n * sizeof *packed);
    struct pool *pool = packed ? pool_open(threads) : NULL;
    if (!pool) return free(packed), -1;
    float *diagonal = packed + TILE * n;
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)moments[i * n + i];
    const double added = sum > 0 ? damping * sum / (double)n : 1;
    for (size_t i = 0; i < n; i++) moments[i * n + i] = (float)((double)moments[i * n + i] + added);
    struct work w = {.kernels = kernels_find(NULL), .moments = moments, .columns = n};
    turn(moments, n);
    const int rc = cholesky(&w, pool, packed);
    for (size_t i = 0; i < n && !rc; i++) diagonal[i] = moments[i * n + i];
    for (size_t i = 0; i < n && !rc; i++) {
        for (size_t j = 0; j < i; j++) moments[i * n + j] /= diagonal[j];
        moments[i * n + i] = diagonal[i] * diagonal[i];
    }
    if (!rc) turn(moments, n);
    pool_close(pool);
    free(packed);
    return rc;
}
