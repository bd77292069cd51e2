/* products.c: rows of any kind are decoded, a few strips at a time, into the float kind's layout
 * and meet their inputs there: what the weights stand for, without the rounding of activations. */
#include "products.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "error.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { AT_ONCE = 4 }; // strips that one call of the kernel takes

struct products {
    const struct kernels *kernels;
    const struct kind *kind;
    const uint8_t *data;       // of the rows from `top` on
    size_t top, n, columns;
    const float *x;            // (n_x, columns)
    size_t n_x;
    float *y;                  // (n_x, n)
    atomic_int out_of_memory;
};

/* Room for AT_ONCE strips: one row; the tiles (AT_ONCE, columns, TILE_ROWS); what they give
 * (n_x, AT_ONCE * TILE_ROWS). */
struct room { float *row, *tiles, *sums; };

static void products_strips(const struct products *p, size_t first, size_t n_rows,
                            const struct room *m) {
    enum { WIDTH = AT_ONCE * TILE_ROWS };
    const size_t tile = p->columns * TILE_ROWS, strips = (n_rows + TILE_ROWS - 1) / TILE_ROWS;
    memset(m->tiles, 0, AT_ONCE * tile * sizeof(float));
    for (size_t r = 0; r < n_rows; r++) {
        kind_decode_row(p->kind, p->data, p->columns, p->top + first + r, m->row);
        float *to = m->tiles + r / TILE_ROWS * tile + r % TILE_ROWS;
        for (size_t c = 0; c < p->columns; c++) to[c * TILE_ROWS] = m->row[c];
    }
    const struct input in = {.n = p->n_x, .columns = p->columns, .x = p->x,
                             .x_stride = p->columns};
    const struct matmul job = {(const uint8_t *)m->tiles, tile * sizeof(float), &in, m->sums,
                               WIDTH, NULL};
    p->kernels->matmul_f32(&job, 0, strips);
    for (size_t t = 0; t < p->n_x; t++)
        memcpy(p->y + t * p->n + first, m->sums + t * WIDTH, n_rows * sizeof(float));
}

static void products_range(void *context, size_t first, size_t last) {
    struct products *p = context;
    const size_t end = last * TILE_ROWS < p->n ? last * TILE_ROWS : p->n;
    struct room m = {.row = malloc(p->columns * sizeof(float)),
                     .sums = malloc(p->n_x * AT_ONCE * TILE_ROWS * sizeof(float))};
    void *tiles = NULL;
    if (posix_memalign(&tiles, 64, AT_ONCE * p->columns * TILE_ROWS * sizeof(float))) tiles = NULL;
    m.tiles = tiles;
    if (!m.row || !m.sums || !m.tiles) p->out_of_memory = 1;
    else
        for (size_t row = first * TILE_ROWS; row < end; row += AT_ONCE * TILE_ROWS)
            products_strips(p, row, end - row < AT_ONCE * TILE_ROWS ? end - row
                                                                    : AT_ONCE * TILE_ROWS, &m);
    free(m.row);
    free(m.sums);
    free(m.tiles);
}

int products_make(const struct tensor *tensor, size_t first, size_t n, const struct kind *kind,
                  const void *blocks, const float *x, size_t n_x, int threads, float *y) {
    struct products p = {
        .kernels = kernels_find(NULL), .kind = blocks ? kind : tensor->kind,
        .data = blocks ? blocks : tensor->data, .top = blocks ? 0 : first, .n = n,
        .columns = tensor->is.shape[1], .x = x, .n_x = n_x, .y = y,
    };
    struct pool *pool = n_x ? pool_open(threads) : NULL;
    if (!pool) return n_x ? -1 : 0;
    pool_run(pool, (n + TILE_ROWS - 1) / TILE_ROWS, 16, products_range, &p);
    pool_close(pool);
    return p.out_of_memory ? fail("out of memory for the products of %s", tensor->is.name) : 0;
}
