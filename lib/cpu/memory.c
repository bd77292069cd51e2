/* memory.c: what is as large as a huge page is aligned to one, and the system asked for them. */
#define _DEFAULT_SOURCE
#include "memory.h"
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { HUGE_BYTES = 2 << 20, SLAB_BYTES = 4 << 20, MOST_PIECES = 16 };

void *memory_take(size_t bytes) {
    const int huge = bytes >= HUGE_BYTES;
    void *memory = NULL;
    if (posix_memalign(&memory, huge ? HUGE_BYTES : 64, bytes)) return NULL;
#if defined(MADV_HUGEPAGE)
    if (huge) madvise(memory, bytes, MADV_HUGEPAGE); // where it is refused, all works as well
#endif
    return memory;
}

static size_t pieces(const struct slabs *s) {
    const size_t fit = SLAB_BYTES / s->piece_bytes;
    return fit < 1 ? 1 : fit < MOST_PIECES ? fit : MOST_PIECES;
}

void *slabs_take(struct slabs *s) {
    if (!s->n || s->used == pieces(s)) {
        void **list = realloc(s->list, (s->n + 1) * sizeof *list);
        if (!list) return NULL;
        s->list = list;
        list[s->n] = memory_take(pieces(s) * s->piece_bytes);
        if (!list[s->n]) return NULL;
        s->n++;
        s->used = 0;
    }
    return (char *)s->list[s->n - 1] + s->used++ * s->piece_bytes;
}

void slabs_free(struct slabs *s) {
    while (s->n) free(s->list[--s->n]);
    free(s->list);
    s->list = NULL;
}
