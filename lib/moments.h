/* moments.h: the second moments of a matrix's inputs, and the factor that error feedback reads. */
#ifndef MOMENTS_H
#define MOMENTS_H
#include <stddef.h>

/* The contracts of llama_add_moments and llama_factor_moments in llama.h; the arguments are
 * already checked. */
int moments_add(const float *x, size_t n, size_t columns, int rotated, int threads,
                float *moments);
int moments_factor(float *moments, size_t columns, double damping, int threads);
#endif
