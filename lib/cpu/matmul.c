/* matmul.c: strips of all the products go round the threads as one list, so that one wait ends
 * them all; the kernels do the arithmetic. */
#include "matmul.h"

enum { SUMS = 32768 }; // floats on a worker's stack: two strips of two planes of MATMUL_ROWS
_Static_assert(SUMS >= 2 * TILE_ROWS * 2 * MATMUL_ROWS, "product_range takes strips in pairs");

struct products {
    const struct kernels *kernels;
    struct input in;        // float kinds read x; quantised kinds see planes * n rows of codes
    size_t planes;
    const struct product *list;
    size_t n;
};

static void kernel(const struct kernels *k, uint32_t kind, const struct matmul *job, size_t first,
                   size_t last) {
    switch (kind) {
    case LLAMA_F32: k->matmul_f32(job, first, last); break;
    case LLAMA_F16: k->matmul_f16(job, first, last); break;
    case LLAMA_BF16: k->matmul_bf16(job, first, last); break;
    case LLAMA_Q8: case LLAMA_Q8R: k->matmul_q8(job, first, last); break;
    case LLAMA_Q4: case LLAMA_Q4R: case LLAMA_Q4E: k->matmul_q4(job, first, last); break;
    }
}

/* Strips [first, last) of one product. With two planes each row's number is coarse + fine, so
 * the kernel sees both as rows of their own, weights unpacked once for all of them, and their
 * results meet here, a few strips at a time so that they meet in a near cache. */
static void product_range(const struct products *p, const struct product *to, size_t first,
                          size_t last) {
    const struct matrix *m = to->matrix;
    const size_t n = p->in.n;
    const int8_t *levels = m->kind->levels ? m->kind->levels->at : NULL;
    if (p->planes == 1 || m->kind->columns == 1) {
        const struct matmul job = {m->data, m->strip_bytes, &p->in, to->y, to->y_stride, levels};
        kernel(p->kernels, m->kind_number, &job, first, last);
        return;
    }
    struct input in = p->in;
    in.n = 2 * n;
    float sums[SUMS];       // (2 n, strips * TILE_ROWS)
    const size_t most = SUMS / (2 * n * TILE_ROWS) / 2 * 2; // kernels like strips in pairs
    for (size_t strip = first; strip < last; strip += most) {
        const size_t strips = last - strip < most ? last - strip : most;
        const size_t width = strips * TILE_ROWS;
        const struct matmul job = {m->data + strip * m->strip_bytes, m->strip_bytes, &in, sums,
                                   width, levels};
        kernel(p->kernels, m->kind_number, &job, 0, strips);
        for (size_t t = 0; t < n; t++) {
            float *y = to->y + t * to->y_stride + strip * TILE_ROWS;
            const float *coarse = sums + t * width, *fine = sums + (n + t) * width;
            for (size_t r = 0; r < width; r++) y[r] = coarse[r] + fine[r];
        }
    }
}

static void products_range(void *context, size_t first, size_t last) {
    const struct products *p = context;
    for (size_t i = 0; i < p->n && first < last; i++) {
        const size_t strips = p->list[i].matrix->strips;
        if (first < strips) product_range(p, &p->list[i], first, last < strips ? last : strips);
        first = first > strips ? first - strips : 0;
        last = last > strips ? last - strips : 0;
    }
}

/* Rows [first, last) of each product get its bias, once the sums are whole. */
static void bias_range(void *context, size_t first, size_t last) {
    const struct products *p = context;
    for (size_t i = 0; i < p->n; i++) {
        const struct product *to = &p->list[i];
        for (size_t t = first; t < last && to->matrix->bias; t++)
            p->kernels->add(to->y + t * to->y_stride, to->matrix->bias, to->matrix->rows);
    }
}

struct quantizing {
    const struct multiplier *by;
    const float *x;
    size_t n, x_stride, columns;
    int rotated;
};

/* Row I in codes, and with two planes what they leave over in codes once more. */
static void quantize_row(const struct quantizing *z, size_t i) {
    enum { PIECE = 16 * GROUP };
    const struct multiplier *by = z->by;
    const size_t groups = (z->columns + GROUP - 1) / GROUP;
    for (size_t start = 0; start < z->columns; start += PIECE) {
        const size_t n = z->columns - start < PIECE ? z->columns - start : PIECE;
        const float *x = z->x + i * z->x_stride + start;
        float rotated[PIECE], rest[PIECE];
        if (z->rotated) {
            by->kernels->rotate_row(rotated, x, n);
            x = rotated;
        }
        for (size_t plane = 0; plane < by->planes; plane++) {
            const size_t group = (plane * z->n + i) * groups + start / GROUP;
            int8_t *codes = by->codes + group * GROUP;
            by->kernels->quantize_row(x, n, codes, by->scales + group, by->sums + group);
            for (size_t j = 0; j < n && plane + 1 < by->planes; j++)
                rest[j] = x[j] - by->scales[group + j / GROUP] * (float)codes[j];
            x = rest;
        }
    }
}

static void quantize_range(void *context, size_t first, size_t last) {
    for (size_t i = first; i < last; i++) quantize_row(context, i);
}

void matmul(const struct multiplier *by, size_t n, const float *x, size_t x_stride,
            size_t n_products, const struct product *list) {
    const size_t columns = list[0].matrix->columns;
    size_t strips = 0;
    int codes = 0, rotated = 0, biased = 0;
    for (size_t i = 0; i < n_products; i++) {
        const struct kind *kind = list[i].matrix->kind;
        strips += list[i].matrix->strips;
        codes |= kind->columns > 1 && !kind->rotated;
        rotated |= kind->rotated;
        biased |= list[i].matrix->bias != NULL;
    }
    if (codes && rotated) { // two sorts of codes of one input, which has room for one
        for (size_t i = 0; i < n_products; i++) matmul(by, n, x, x_stride, 1, list + i);
        return;
    }
    if (codes || rotated) {
        struct quantizing z = {by, x, n, x_stride, columns, rotated};
        pool_run(by->pool, n, 4, quantize_range, &z);
    }
    struct products p = {
        .kernels = by->kernels,
        .in = {n, columns, x, x_stride, by->codes, by->scales, by->sums},
        .planes = by->planes,
        .list = list,
        .n = n_products,
    };
    pool_run(by->pool, strips, 2, products_range, &p);
    if (biased) pool_run(by->pool, n, 4, bias_range, &p);
}
