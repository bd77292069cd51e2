/* pages.h: what stands in a KV page on the CPU, and the ways in and out.
 *
 * A page is, for each layer and kv head, keys and then values: kernels.h, struct attention. */
#ifndef PAGES_H
#define PAGES_H
#include "kernels.h"
#include "pool.h"

struct kv {
    const struct kernels *kernels;
    uint32_t kind;         // LLAMA_F32, LLAMA_F16 or LLAMA_Q8
    size_t n_layers, n_kv_heads, head_dim;
    size_t element_bytes, scale_bytes; // a position's of one head
    size_t key_bytes;      // a head's keys; its values take as much and follow them
    size_t page_bytes;
};

/* KERNELS and the shape are set; fills in the rest. */
void kv_lay_out(struct kv *kv);
/* Where a kv head's keys of a layer stand in a page. */
size_t kv_offset(const struct kv *kv, size_t layer, size_t kv_head);
/* k, v (head_dim) become SLOT of the head whose keys are at KEYS. */
void kv_store(const struct kv *kv, uint8_t *keys, size_t slot, const float *k, const float *v);
/* Positions [first + count, length + count) of the pages FROM move to [first, length) of TO: each
 * key's pairs rotated by cos, sin (head_dim / 2) and rounded once, values as they are. A page may
 * stand in both lists, at the same place. ROOM: (n_kv_heads, head_dim). */
void kv_slide(const struct kv *kv, struct pool *pool, void *const *from, void *const *to,
              uint32_t first, uint32_t count, uint32_t length, const float *cos, const float *sin,
              float *room);
/* Positions [first, first + n) in llama.h's plain layout. */
void kv_read(const struct kv *kv, struct pool *pool, void *const *pages, uint32_t first, uint32_t n,
             void *out);
void kv_write(const struct kv *kv, struct pool *pool, void *const *pages, uint32_t first,
              uint32_t n, const void *in);
#endif
