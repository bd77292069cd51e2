/* matmul.h: matrices that share an input, multiplied in one pass over the threads.
 *
 * Quantised weights meet quantised numbers, so that the products are integers. Each number of the
 * input becomes an 8-bit code, or two: coarse, and what that leaves over as a finer one. Rotated
 * kinds meet codes of the rotated input. */
#ifndef MATMUL_H
#define MATMUL_H
#include "../model.h"
#include "kernels.h"
#include "pool.h"

enum { MATMUL_ROWS = 512 }; // the most that one product takes: see SUMS in matmul.c

struct multiplier {
    const struct kernels *kernels;
    struct pool *pool;
    size_t planes;   // codes for each number: 1 (8 bits) or 2 (16)
    // room for the input as codes; groups = columns / GROUP, rounded up
    int8_t *codes;   // (planes, n, groups * GROUP)
    float *scales;   // (planes, n, groups)
    int32_t *sums;   // (planes, n, groups)
};

struct product {
    const struct matrix *matrix;
    float *y;               // (n, y_stride)
    size_t y_stride;
};

/* y = matrix x + bias for each product, all of the same columns; x (n, x_stride),
 * n <= MATMUL_ROWS. */
void matmul(const struct multiplier *by, size_t n, const float *x, size_t x_stride,
            size_t n_products, const struct product *list);
#endif
