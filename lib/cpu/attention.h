/* attention.h: the query heads of many rows, each against the KV pages of its own sequence. */
#ifndef ATTENTION_H
#define ATTENTION_H
#include "../cache.h"
#include "pages.h"

enum { ATTENTION_ROWS = 512 }; // the most at once

struct attending {
    const struct kv *kv;
    size_t layer, n_heads, n;
    const struct sequence *const *of;   // (n)
    const int32_t *positions;           // (n)
    const float *q;                     // (n, stride): rows of (n_heads, head_dim), scaled
    float *out;                         // the same shape
    size_t stride;
};

void attend_rows(const struct attending *rows, struct pool *pool);
#endif
