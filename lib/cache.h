/* cache.h: which KV page belongs to which sequence. Book-keeping only: a device makes and copies
 * the pages' memory, through struct pages.
 *
 * A page holds PAGE_POSITIONS positions of every layer, aligned to absolute position: page i of
 * a sequence is positions i * PAGE_POSITIONS and on. Pages are taken when first needed. Forked
 * sequences share them, counted; a shared page is copied before a position in it is written. */
#ifndef CACHE_H
#define CACHE_H
#include "llama.h"
#include "quant.h"

/* A device's pages. The handle is the device's own, e.g. an address. */
struct pages {
    void *device;
    void *(*make)(void *device);                       // NULL with fail() when out of memory
    void (*copy)(void *device, void *to, const void *from);
    /* Moves positions [first + count, length + count) of the pages FROM to [first, length) of the
     * pages TO, keys turned COUNT positions back; a page may be in both, at the same index. */
    void (*slide)(void *device, void *const *from, void *const *to, uint32_t first,
                  uint32_t count, uint32_t length);
    void (*destroy)(void *device, void *page);
};

struct page {
    void *handle;
    uint32_t uses;       // sequences that hold it; 0: free
};

struct sequence {
    uint32_t length;     // positions that are filled
    uint32_t n_pages, room;
    uint32_t *ids;       // (n_pages) which page holds positions i * PAGE_POSITIONS...
    void **handles;      // (n_pages) the same pages' handles, as the kernels want them
};

struct cache {
    struct pages pages;
    struct page *all;    // (n_all) every page ever made
    uint32_t n_all, room;
    struct sequence sequences[LLAMA_MAX_SEQUENCES];
};

void cache_open(struct cache *cache, struct pages pages);
void cache_close(struct cache *cache);
/* Makes positions [length, LENGTH) of a sequence writable. Its length stays; a failure leaves
 * everything as it was seen from outside. */
int cache_reserve(struct cache *cache, int32_t sequence, uint32_t length);
/* Says that positions up to LENGTH, reserved before, are now filled. */
void cache_commit(struct cache *cache, int32_t sequence, uint32_t length);
/* Forgets positions from LENGTH on, and pages reserved beyond it. */
void cache_trim(struct cache *cache, int32_t sequence, uint32_t length);
/* Drops positions [first, first + count) and moves those that follow them down. A failure leaves
 * the sequence as it was; other sequences that share its pages keep them as they were. */
int cache_slide(struct cache *cache, int32_t sequence, uint32_t first, uint32_t count);
/* TO becomes the first LENGTH positions of FROM; a failure leaves TO as it was. */
int cache_fork(struct cache *cache, int32_t from, int32_t to, uint32_t length);
#endif
