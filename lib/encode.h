/* encode.h: rows of a matrix, in whatever kind they are, become blocks of another kind. */
#ifndef ENCODE_H
#define ENCODE_H
#include "format.h"

/* Whether rows [first, first + n) of a tensor make whole strips of a KIND, and take BYTES, where
 * that is not NULL. */
int encode_check(const struct file *file, size_t tensor, size_t first, size_t n, uint32_t kind,
                 const size_t *bytes);
/* The contract of llama_quantize in llama.h; the arguments are already checked. */
int encode_rows(const struct tensor *tensor, size_t first, size_t n, const struct kind *kind,
                const float *factor, int threads, void *out, llama_loss *loss);
#endif
