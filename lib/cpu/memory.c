/* memory.c: what is as large as a huge page is aligned to one, and the system asked for them.
 *
 * Blocks do not come from malloc: what others keep beside one splits the heap where it was, and
 * glibc before 2.38 does not find an aligned block's own place again, so that each session opened
 * took its scratch anew from the system. AddressSanitizer alone has them from malloc, whose ends
 * it sees. */
#define _DEFAULT_SOURCE
#include "memory.h"
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { HUGE_BYTES = 2 << 20, SLAB_BYTES = 4 << 20, MOST_PIECES = 16 };

#if defined(__has_feature) // clang's way to say what gcc says by a macro
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
int block_take(struct block *b, size_t bytes) {
    *b = (struct block){0};
    if (posix_memalign(&b->map, 64, bytes)) return -1;
    b->at = b->map;
    return 0;
}

void block_give(struct block *b) { free(b->map); }
#else
int block_take(struct block *b, size_t bytes) {
    const size_t more = bytes >= HUGE_BYTES ? HUGE_BYTES : 0; // a part of it goes to the alignment
    *b = (struct block){0};
    if (bytes > SIZE_MAX - more) return -1;
    void *map = mmap(NULL, bytes + more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
    if (map == MAP_FAILED) return -1;
    *b = (struct block){.at = map, .map = map, .map_bytes = bytes + more};
    if (more) b->at = (char *)map + (-(uintptr_t)map & (HUGE_BYTES - 1));
#if defined(MADV_HUGEPAGE)
    if (more) madvise(b->at, bytes, MADV_HUGEPAGE); // where it is refused, all works as well
#endif
    return 0;
}

void block_give(struct block *b) {
    if (b->map) munmap(b->map, b->map_bytes);
}
#endif

static size_t pieces(const struct slabs *s) {
    const size_t fit = SLAB_BYTES / s->piece_bytes;
    return fit < 1 ? 1 : fit < MOST_PIECES ? fit : MOST_PIECES;
}

void *slabs_take(struct slabs *s) {
    if (!s->n || s->used == pieces(s)) {
        struct block *list = realloc(s->list, (s->n + 1) * sizeof *list);
        if (!list) return NULL;
        s->list = list;
        if (block_take(&list[s->n], pieces(s) * s->piece_bytes)) return NULL;
        s->n++;
        s->used = 0;
    }
    return (char *)s->list[s->n - 1].at + s->used++ * s->piece_bytes;
}

void slabs_free(struct slabs *s) {
    while (s->n) block_give(&s->list[--s->n]);
    free(s->list);
    s->list = NULL;
}
