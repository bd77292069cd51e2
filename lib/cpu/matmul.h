/* matmul.h: matrices that share an input, multiplied in one pass over the threads.
 *
 * Quantised weights meet quantised numbers, so that the products are integers. Each number of the
 * input becomes a code of 8 or 16 bits. Rotated kinds meet codes of the rotated input. */
#ifndef MATMUL_H
#define MATMUL_H
#include "../model.h"
#include "kernels.h"
#include "pool.h"

struct multiplier {
    const struct kernels *kernels;
    struct pool *pool;
    int bits;        // of a code: 8 or 16
    // room for the input as codes; groups = columns / GROUP, rounded up
    int8_t *codes;   // (n, groups, GROUP * bits / 8)
    float *scales;   // (n, groups)
    int32_t *sums;   // (n, groups)
};

struct product {
    const struct matrix *matrix;
    float *y;               // (n, y_stride)
    size_t y_stride;
};

/* y = matrix x + bias for each product, all of the same columns; x (n, x_stride). */
void matmul(const struct multiplier *by, size_t n, const float *x, size_t x_stride,
            size_t n_products, const struct product *list);
#endif
