/* memory.h: large memory on huge pages, and KV pages cut from it.
 *
 * A head's keys in one KV page are a few KiB, and those of the next KV page lie far away: on pages
 * of 4 KiB each would ask for an entry of the TLB of its own. */
#ifndef CPU_MEMORY_H
#define CPU_MEMORY_H
#include <stddef.h>

/* BYTES that no one has written to, for free(); NULL if there are none. Aligned to 64. */
void *memory_take(size_t bytes);

/* Pieces of one size, which live until all are given back together. */
struct slabs {
    size_t piece_bytes;  // set before the first is taken
    void **list;         // (n)
    size_t n, used;      // slabs; pieces of the last one that are taken
};

/* A piece; NULL if there is no memory. */
void *slabs_take(struct slabs *slabs);
void slabs_free(struct slabs *slabs);
#endif
