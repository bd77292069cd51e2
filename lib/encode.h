/* encode.h: rows of a matrix, in whatever kind they are, become blocks of another kind. */
#ifndef ENCODE_H
#define ENCODE_H
#include "format.h"

/* Whether rows [first, first + n) of a tensor can be encoded, and take OUT_BYTES. */
int encode_check(const llama_tensor *t, size_t first, size_t n, const struct kind *kind,
                 size_t out_bytes);
/* The contract of llama_quantize in llama.h; the arguments are already checked. */
int encode_rows(const struct tensor *tensor, size_t first, size_t n, const struct kind *kind,
                const float *factor, int threads, void *out, llama_loss *loss);
#endif
