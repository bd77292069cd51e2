/* products.h: what a matrix, or blocks in its place, gives for inputs, in f32. */
#ifndef PRODUCTS_H
#define PRODUCTS_H
#include "format.h"

/* Rows [first, first + n) of a tensor, or what BLOCKS of KIND stand for in their place, times
 * x (n_x, columns): y (n_x, n). The arguments are already checked. */
int products_make(const struct tensor *tensor, size_t first, size_t n, const struct kind *kind,
                  const void *blocks, const float *x, size_t n_x, int threads, float *y);
#endif
