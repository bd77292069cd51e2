/* memory.h: large memory from the system itself, on huge pages, and KV pages cut from it.
 *
 * A head's keys in one KV page are a few KiB, and those of the next KV page lie far away: on pages
 * of 4 KiB each would ask for an entry of the TLB of its own. */
#ifndef CPU_MEMORY_H
#define CPU_MEMORY_H
#include <stddef.h>

struct block {
    void *at;         // aligned to 64, or to a huge page
    void *map;        // where what was taken for it begins
    size_t map_bytes;
};

/* BYTES that no one has written to. -1 if there are none: then it is one that takes nothing. */
int block_take(struct block *block, size_t bytes);
void block_give(struct block *block);

/* Pieces of one size, which live until all are given back together. */
struct slabs {
    size_t piece_bytes;  // set before the first is taken
    struct block *list;  // (n)
    size_t n, used;      // slabs; pieces of the last one that are taken
};

/* A piece; NULL if there is no memory. */
void *slabs_take(struct slabs *slabs);
void slabs_free(struct slabs *slabs);
#endif
