/* attention.h: the query heads of many rows, each against the KV pages of its own sequence.
 *
 * A row's positions are taken in pieces of PIECE, each for itself, whose results are joined in
 * rising order: so the same bits come out whether one thread takes all of them or many. */
#ifndef ATTENTION_H
#define ATTENTION_H
#include "../cache.h"
#include "pages.h"

enum { ATTENTION_ROWS = 512 }; // the most at once
enum { PIECE = 512 };          // positions, whole pages

struct attending {
    const struct kv *kv;
    size_t layer, n_heads, n;
    const struct sequence *const *of;   // (n)
    const int32_t *positions;           // (n)
    const float *q;                     // (n, stride): rows of (n_heads, head_dim), scaled
    float *out;                         // the same shape
    size_t stride;
    // room for pieces behind the first
    size_t room;                        // rows, >= n
    float *pieces;                      // (room, stride)
    struct mark *marks;                 // (n + room, n_heads): of the first pieces, then of others
};

void attend_rows(const struct attending *rows, struct pool *pool);
#endif
