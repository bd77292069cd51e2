/* matmul.c: strips of all the products go round the threads as one list, so that one wait ends
 * them all; the kernels do the arithmetic. */
#include "matmul.h"

struct products {
    const struct kernels *kernels;
    struct input in;        // float kinds read x, quantised kinds its codes
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

/* Strips [first, last) of one product. */
static void product_range(const struct products *p, const struct product *to, size_t first,
                          size_t last) {
    const struct matrix *m = to->matrix;
    const int8_t *levels = m->kind->levels ? m->kind->levels->at : NULL;
    const struct matmul job = {m->data, m->strip_bytes, &p->in, to->y, to->y_stride, levels};
    kernel(p->kernels, m->kind_number, &job, first, last);
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

/* Row I in codes. */
static void quantize_row(const struct quantizing *z, size_t i) {
    enum { PIECE = 16 * GROUP };
    const struct multiplier *by = z->by;
    const size_t groups = (z->columns + GROUP - 1) / GROUP;
    for (size_t start = 0; start < z->columns; start += PIECE) {
        const size_t n = z->columns - start < PIECE ? z->columns - start : PIECE;
        const size_t group = i * groups + start / GROUP;
        const float *x = z->x + i * z->x_stride + start;
        float rotated[PIECE];
        if (z->rotated) {
            by->kernels->rotate_row(rotated, x, n);
            x = rotated;
        }
        by->kernels->quantize_row(x, n, by->bits, by->codes + group * GROUP * (size_t)by->bits / 8,
                                  by->scales + group, by->sums + group);
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
        .in = {n, columns, x, x_stride, by->bits, by->codes, by->scales, by->sums},
        .list = list,
        .n = n_products,
    };
    pool_run(by->pool, strips, 2, products_range, &p);
    if (biased) pool_run(by->pool, n, 4, bias_range, &p);
}
