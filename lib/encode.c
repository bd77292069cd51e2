/* encode.c: strips are independent, so threads take them in any order and the bytes, and the
 * loss, added up strip by strip, come out the same. */
#include "encode.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "error.h"
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct encoding {
    const struct tensor *tensor;
    const struct kind *kind;
    size_t first;              // row
    uint8_t *out;
    size_t strip_bytes;
    const struct kernels *kernels;
    llama_loss *losses;        // (strips)
    atomic_size_t bad;         // 1 + the index of a weight that the kind cannot hold; 0: none
    atomic_int out_of_memory;
};

/* One block before and after, (TILE_ROWS, GROUP) at most. */
struct block_values { float before[TILE_ROWS * GROUP], after[TILE_ROWS * GROUP]; };

/* Adds up the loss of the true weights, rows (n_rows) and columns (n) of a block. */
static void loss_add(llama_loss *loss, const struct block_values *v, size_t width, size_t n_rows,
                     size_t n) {
    for (size_t r = 0; r < n_rows; r++)
        for (size_t c = 0; c < n; c++) {
            const double w = v->before[r * width + c], error = v->after[r * width + c] - w;
            loss->sum_squares += w * w;
            loss->sum_squared_error += error * error;
            loss->max_error = fmax(loss->max_error, fabs(error));
        }
}

/* One block; the columns from N on are not there. The search goes by the fastest kernels. */
static void encode_block(const struct encoding *e, const float *values, size_t n, void *block) {
    float turned[GROUP * TILE_ROWS], importance[GROUP], scale[TILE_ROWS], shift[TILE_ROWS];
    if (e->kind->columns == 1) {
        e->kind->encode(values, block);
        return;
    }
    for (size_t c = 0; c < GROUP; c++) {
        importance[c] = c < n;
        for (size_t r = 0; r < TILE_ROWS; r++) turned[c * TILE_ROWS + r] = values[r * GROUP + c];
    }
    if (e->kind == kind_find(LLAMA_Q8)) {
        e->kernels->fit_q8(turned, scale);
        q8_pack(turned, scale, block);
    } else {
        e->kernels->fit_q4(turned, importance, scale, shift);
        q4_pack(turned, scale, shift, block);
    }
}

/* Blocks of the two kinds may differ in width, so a strip is decoded whole, row by row into
 * ROWS (TILE_ROWS, columns), and encoded block by block. */
static void encode_strip(struct encoding *e, size_t strip, float *rows, struct block_values *v) {
    const size_t columns = e->tensor->is.shape[1], width = e->kind->columns;
    const size_t top = e->first + strip * TILE_ROWS, below = e->tensor->is.shape[0] - top;
    const size_t n_rows = below < TILE_ROWS ? below : TILE_ROWS;
    uint8_t *out = e->out + strip * e->strip_bytes;
    for (size_t r = 0; r < n_rows; r++) {
        float *row = rows + r * columns;
        kind_decode_row(e->tensor->kind, e->tensor->data, columns, top + r, row);
        for (size_t c = 0; c < columns; c++)
            if (!(fabsf(row[c]) <= e->kind->limit)) {
                e->bad = 1 + (top + r) * columns + c;
                return;
            }
    }
    for (size_t c = 0; c < columns; c += width, out += e->kind->block_bytes) {
        const size_t n = columns - c < width ? columns - c : width;
        memset(v->before, 0, sizeof v->before);
        for (size_t r = 0; r < n_rows; r++)
            memcpy(v->before + r * width, rows + r * columns + c, n * sizeof *rows);
        encode_block(e, v->before, n, out);
        kind_decode(e->kind, out, v->after);
        loss_add(&e->losses[strip], v, width, n_rows, n);
    }
}

static void encode_range(void *context, size_t first, size_t last) {
    struct encoding *e = context;
    float *rows = malloc(TILE_ROWS * e->tensor->is.shape[1] * sizeof *rows);
    struct block_values values;
    if (!rows) e->out_of_memory = 1;
    for (size_t s = first; rows && s < last && !e->bad; s++) encode_strip(e, s, rows, &values);
    free(rows);
}

/* Names the weight and the value that stopped it. */
static int refuse(const struct encoding *e) {
    const struct tensor *t = e->tensor;
    const size_t columns = t->is.shape[1];
    const size_t row = (e->bad - 1) / columns, column = (e->bad - 1) % columns;
    float *values = malloc(columns * sizeof *values);
    if (!values) return fail("out of memory for quantising %s", t->is.name);
    kind_decode_row(t->kind, t->data, columns, row, values);
    const double value = values[column];
    free(values);
    return fail("%s: weight (%zu, %zu) is %g, which %s cannot hold (at most %g)", t->is.name, row,
                column, value, e->kind->name, (double)e->kind->limit);
}

int encode_rows(const struct tensor *tensor, size_t first, size_t n, const struct kind *kind,
                int threads, void *out, llama_loss *loss) {
    const size_t strips = (n + TILE_ROWS - 1) / TILE_ROWS;
    struct encoding e = {
        .tensor = tensor, .kind = kind, .first = first, .out = out,
        .strip_bytes = kind_strip_bytes(kind, tensor->is.shape[1]),
        .kernels = kernels_find(NULL),
        .losses = calloc(strips + 1, sizeof *e.losses),
    };
    if (!e.losses) return fail("out of memory for quantising %s", tensor->is.name);
    struct pool *pool = pool_open(threads);
    if (!pool) return free(e.losses), -1;
    pool_run(pool, strips, 1, encode_range, &e);
    pool_close(pool);
    *loss = (llama_loss){0};
    for (size_t s = 0; s < strips; s++) {
        loss->sum_squares += e.losses[s].sum_squares;
        loss->sum_squared_error += e.losses[s].sum_squared_error;
        loss->max_error = fmax(loss->max_error, e.losses[s].max_error);
    }
    free(e.losses);
    if (e.out_of_memory) return fail("out of memory for quantising %s", tensor->is.name);
    return e.bad ? refuse(&e) : 0;
}
