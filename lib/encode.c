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
    const float *factor;       // (columns, columns) as llama_factor_moments leaves it; or NULL
    llama_loss *losses;        // (strips)
    atomic_size_t bad;         // 1 + the index of a weight that the kind cannot hold; 0: none
    atomic_int out_of_memory;
};

static int is_q8(const struct kind *kind) { return kind->block_bytes == sizeof(struct block_q8); }
static int is_q4(const struct kind *kind) { return kind->block_bytes == sizeof(struct block_q4); }

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
        kind_encode(e->kind, values, block);
        return;
    }
    for (size_t c = 0; c < GROUP; c++) importance[c] = c < n;
    for (size_t r = 0; r < TILE_ROWS; r++) {
        float row[GROUP];
        memcpy(row, values + r * GROUP, sizeof row);
        if (e->kind->rotated) rotate_group(row, ROTATED_WEIGHT);
        for (size_t c = 0; c < GROUP; c++) turned[c * TILE_ROWS + r] = row[c];
    }
    if (is_q8(e->kind)) {
        e->kernels->fit_q8(turned, scale);
        q8_pack(turned, scale, block);
    } else {
        e->kernels->fit_q4(e->kind->levels, turned, importance, scale, shift);
        q4_pack(e->kind->levels, turned, scale, shift, block);
    }
}

/* A strip's true rows as float32, (TILE_ROWS, columns); 0 where the kind cannot hold a weight. */
static int strip_rows(struct encoding *e, size_t strip, float *rows) {
    const size_t columns = e->tensor->is.shape[1], top = e->first + strip * TILE_ROWS;
    for (size_t r = 0; r < TILE_ROWS && top + r < e->tensor->is.shape[0]; r++) {
        float *row = rows + r * columns;
        kind_decode_row(e->tensor->kind, e->tensor->data, columns, top + r, row);
        for (size_t c = 0; c < columns; c++)
            if (!(fabsf(row[c]) <= e->kind->limit)) {
                e->bad = 1 + (top + r) * columns + c;
                return 0;
            }
    }
    return 1;
}

static size_t true_rows(const struct encoding *e, size_t strip) {
    const size_t below = e->tensor->is.shape[0] - e->first - strip * TILE_ROWS;
    return below < TILE_ROWS ? below : TILE_ROWS;
}

/* Blocks of the two kinds may differ in width, so a strip is decoded whole, row by row into
 * ROWS (TILE_ROWS, columns), and encoded block by block. */
static void encode_strip(struct encoding *e, size_t strip, float *rows, struct block_values *v) {
    const size_t columns = e->tensor->is.shape[1], width = e->kind->columns;
    const size_t n_rows = true_rows(e, strip);
    uint8_t *out = e->out + strip * e->strip_bytes;
    if (!strip_rows(e, strip, rows)) return;
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

// ---- with error feedback (LDLQ, arXiv:2307.13304, section 4.1)

enum { AT_ONCE = 4 }; // strips that share one reading of the factor

/* One q4 block from column FIRST on. TILE (columns, TILE_ROWS) holds errors, weight less what was
 * stored, to the left of FIRST and weights from there on. MOVED (GROUP, stride) is what the errors
 * to the left ask of each of the N columns; those inside the block follow one by one. */
static void feedback_q4(const struct encoding *e, float *tile, size_t first, size_t n,
                        const float *moved, size_t stride, struct block_q4 *block,
                        llama_loss *loss, size_t n_rows) {
    const size_t columns = e->tensor->is.shape[1];
    const struct levels *levels = e->kind->levels;
    float values[GROUP * TILE_ROWS] = {0}, importance[GROUP] = {0};
    float scale[TILE_ROWS], shift[TILE_ROWS], largest = 0;
    struct block_values v;
    tile += first * TILE_ROWS;
    for (size_t r = 0; r < n_rows; r++) {
        for (size_t c = 0; c < n; c++) v.before[r * GROUP + c] = tile[c * TILE_ROWS + r];
        if (e->kind->rotated) rotate_group(v.before + r * GROUP, ROTATED_INPUT);
    }
    for (size_t c = 0; c < n; c++) {
        importance[c] = e->factor[(first + c) * columns + first + c];
        largest = importance[c] > largest ? importance[c] : largest;
        for (size_t r = 0; r < TILE_ROWS; r++)
            values[c * TILE_ROWS + r] = tile[c * TILE_ROWS + r] + moved[c * stride + r];
    }
    // shares, whose products neither overflow nor vanish
    for (size_t c = 0; c < n; c++) importance[c] = largest > 0 ? importance[c] / largest : 1;
    e->kernels->fit_q4(levels, values, importance, scale, shift);
    for (size_t c = 0; c < n; c++) {
        const float *asks = e->factor + (first + c) * columns + first;
        float *value = values + c * TILE_ROWS, *error = tile + c * TILE_ROWS;
        for (size_t before = 0; before < c; before++)
            for (size_t r = 0; r < TILE_ROWS; r++)
                value[r] += asks[before] * tile[before * TILE_ROWS + r];
        for (size_t r = 0; r < TILE_ROWS; r++) {
            const int code = q4_code(levels, value[r], scale[r], shift[r]);
            error[r] -= scale[r] * ((float)levels->at[code] + shift[r]);
        }
    }
    q4_pack(levels, values, scale, shift, block);
    kind_decode(e->kind, block, v.after);
    loss_add(loss, &v, GROUP, n_rows, n);
}

/* Strips [first, first + n), n <= AT_ONCE, in TILES (n, columns, TILE_ROWS): the float kind's own
 * layout, so that errors meet the factor as weights meet inputs. */
static void feedback_strips(struct encoding *e, size_t first, size_t n, float *rows,
                            float *tiles) {
    const size_t columns = e->tensor->is.shape[1], tile = columns * TILE_ROWS;
    float moved[GROUP * AT_ONCE * TILE_ROWS] = {0}; // (GROUP, AT_ONCE, TILE_ROWS)
    for (size_t s = 0; s < n; s++) {
        memset(rows, 0, tile * sizeof *rows);
        if (!strip_rows(e, first + s, rows)) return;
        for (size_t i = 0; e->kind->rotated && i < tile; i += GROUP)
            rotate_group(rows + i, ROTATED_WEIGHT);
        for (size_t c = 0; c < columns; c++)
            for (size_t r = 0; r < TILE_ROWS; r++)
                tiles[s * tile + c * TILE_ROWS + r] = rows[r * columns + c];
    }
    for (size_t c = 0; c < columns; c += GROUP) {
        const size_t width = columns - c < GROUP ? columns - c : GROUP;
        const struct input in = {.n = width, .columns = c, .x = e->factor + c * columns,
                                 .x_stride = columns};
        const struct matmul job = {(const uint8_t *)tiles, tile * sizeof *tiles, &in, moved,
                                   AT_ONCE * TILE_ROWS, NULL};
        if (c) e->kernels->matmul_f32(&job, 0, n);
        for (size_t s = 0; s < n; s++)
            feedback_q4(e, tiles + s * tile, c, width, moved + s * TILE_ROWS,
                        AT_ONCE * TILE_ROWS,
                        (struct block_q4 *)(void *)(e->out + (first + s) * e->strip_bytes) +
                            c / GROUP,
                        &e->losses[first + s], true_rows(e, first + s));
    }
}

static void feedback_range(void *context, size_t first, size_t last) {
    struct encoding *e = context;
    const size_t tile = e->tensor->is.shape[1] * TILE_ROWS;
    float *rows = malloc(tile * sizeof *rows);
    void *tiles = NULL;
    if (!rows || posix_memalign(&tiles, 64, AT_ONCE * tile * sizeof(float))) e->out_of_memory = 1;
    for (size_t s = first; rows && tiles && s < last && !e->bad; s += AT_ONCE)
        feedback_strips(e, s, last - s < AT_ONCE ? last - s : AT_ONCE, rows, tiles);
    free(tiles);
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

int encode_check(const struct file *file, size_t tensor, size_t first, size_t n, uint32_t kind,
                 const size_t *bytes) {
    if (tensor >= file->n_tensors) return fail("tensor %zu of %zu", tensor, file->n_tensors);
    const llama_tensor *t = &file->tensors[tensor].is;
    const struct kind *k = kind_find(kind);
    if (!k) return fail("%s: no such kind of weights as %u", t->name, kind);
    if (t->n_dims != 2) return fail("%s is a vector: only matrices are quantised", t->name);
    if (first > t->shape[0] || n > t->shape[0] - first || first % TILE_ROWS ||
        (n % TILE_ROWS && first + n != t->shape[0]))
        return fail("%s: rows %zu to %zu of %zu do not make whole strips of %d", t->name, first,
                    first + n, (size_t)t->shape[0], TILE_ROWS);
    if (k->rotated && t->shape[1] % GROUP)
        return fail("%s: %zu columns are no whole groups of %d to rotate", t->name,
                    (size_t)t->shape[1], GROUP);
    if (bytes && *bytes != kind_matrix_bytes(k, n, t->shape[1]))
        return fail("%s: %zu bytes given for %zu rows, %llu needed", t->name, *bytes, n,
                    (unsigned long long)kind_matrix_bytes(k, n, t->shape[1]));
    return 0;
}

int encode_rows(const struct tensor *tensor, size_t first, size_t n, const struct kind *kind,
                const float *factor, int threads, void *out, llama_loss *loss) {
    const size_t strips = (n + TILE_ROWS - 1) / TILE_ROWS;
    struct encoding e = {
        .tensor = tensor, .kind = kind, .first = first, .out = out,
        .strip_bytes = kind_strip_bytes(kind, tensor->is.shape[1]),
        .kernels = kernels_find(NULL), .factor = factor,
        .losses = calloc(strips + 1, sizeof *e.losses),
    };
    if (!e.losses) return fail("out of memory for quantising %s", tensor->is.name);
    struct pool *pool = pool_open(threads);
    if (!pool) return free(e.losses), -1;
    if (factor && is_q4(kind)) pool_run(pool, strips, AT_ONCE, feedback_range, &e);
    else pool_run(pool, strips, 1, encode_range, &e);
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
