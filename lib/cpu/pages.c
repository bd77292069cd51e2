/* pages.c: keys go into tiles and come out of them again, turned where a sequence slides.
 *
 * Work is shared so that each element is moved by one thread: by (layer, head) where a sequence
 * moves onto itself, which must go upwards, and by position elsewhere. */
#include "pages.h"
#include "../llama.h"
#include <string.h>

enum { CHUNK = 64 }; // dimensions of a key handled at once; even, so that pairs stay together

void kv_lay_out(struct kv *kv) {
    kv->element_bytes = kv->kind == LLAMA_F32 ? 4 : 2;
    kv->key_bytes = kv->n_kv_heads * PAGE_POSITIONS * kv->head_dim * kv->element_bytes;
    kv->page_bytes = 2 * kv->n_layers * kv->key_bytes;
}

size_t kv_offset(const struct kv *kv, size_t layer, size_t kv_head) {
    return 2 * layer * kv->key_bytes + kv_head * (kv->key_bytes / kv->n_kv_heads);
}

/* The element of dimension 0 of SLOT's key; the others follow TILE_ROWS elements apart. */
static size_t key_element(const struct kv *kv, size_t slot) {
    return slot / TILE_ROWS * kv->head_dim * TILE_ROWS + slot % TILE_ROWS;
}

/* Dimensions [i, i + n) of SLOT's key, n <= CHUNK. */
static void put_key(const struct kv *kv, uint8_t *keys, size_t slot, size_t i, size_t n,
                    const float *k) {
    const size_t at = key_element(kv, slot) + i * TILE_ROWS;
    if (kv->kind == LLAMA_F32) {
        float *to = (float *)(void *)keys + at;
        for (size_t j = 0; j < n; j++) to[j * TILE_ROWS] = k[j];
    } else {
        uint16_t *to = (uint16_t *)(void *)keys + at, half[CHUNK];
        kv->kernels->to_f16(half, k, n);
        for (size_t j = 0; j < n; j++) to[j * TILE_ROWS] = half[j];
    }
}

static void get_key(const struct kv *kv, const uint8_t *keys, size_t slot, size_t i, size_t n,
                    float *k) {
    const size_t at = key_element(kv, slot) + i * TILE_ROWS;
    const float *f32 = (const float *)(const void *)keys + at;
    const uint16_t *f16 = (const uint16_t *)(const void *)keys + at;
    for (size_t j = 0; j < n; j++)
        k[j] = kv->kind == LLAMA_F32 ? f32[j * TILE_ROWS] : f16_to_f32(f16[j * TILE_ROWS]);
}

void kv_store(const struct kv *kv, uint8_t *keys, size_t slot, const float *k, const float *v) {
    const size_t d = kv->head_dim;
    for (size_t i = 0; i < d; i += CHUNK)
        put_key(kv, keys, slot, i, d - i < CHUNK ? d - i : CHUNK, k + i);
    uint8_t *value = keys + kv->key_bytes + slot * d * kv->element_bytes;
    if (kv->kind == LLAMA_F32) memcpy(value, v, d * sizeof *v);
    else kv->kernels->to_f16((uint16_t *)(void *)value, v, d);
}

// ---- sliding

struct sliding {
    const struct kv *kv;
    void *const *from, *const *to;
    uint32_t first, count, length;
    const float *cos, *sin; // (head_dim / 2)
};

static void move(const struct sliding *s, const uint8_t *from, size_t from_slot, uint8_t *to,
                 size_t to_slot) {
    const struct kv *kv = s->kv;
    const size_t d = kv->head_dim, bytes = d * kv->element_bytes;
    float part[CHUNK];
    for (size_t i = 0; i < d; i += CHUNK) {
        const size_t n = d - i < CHUNK ? d - i : CHUNK;
        get_key(kv, from, from_slot, i, n, part);
        kv->kernels->rope(part, s->cos + i / 2, s->sin + i / 2, n);
        put_key(kv, to, to_slot, i, n, part);
    }
    memcpy(to + kv->key_bytes + to_slot * bytes, from + kv->key_bytes + from_slot * bytes, bytes);
}

/* Items are (layer, kv head). Upwards, so that a page that stays in place is read ahead of where
 * it is written. */
static void slide_range(void *context, size_t first, size_t last) {
    const struct sliding *s = context;
    for (size_t item = first; item < last; item++) {
        const size_t heads = s->kv->n_kv_heads;
        const size_t offset = kv_offset(s->kv, item / heads, item % heads);
        for (size_t p = s->first; p < s->length; p++) {
            const size_t q = p + s->count;
            move(s, (const uint8_t *)s->from[q / PAGE_POSITIONS] + offset, q % PAGE_POSITIONS,
                 (uint8_t *)s->to[p / PAGE_POSITIONS] + offset, p % PAGE_POSITIONS);
        }
    }
}

void kv_slide(const struct kv *kv, struct pool *pool, void *const *from, void *const *to,
              uint32_t first, uint32_t count, uint32_t length, const float *cos,
              const float *sin) {
    struct sliding s = {kv, from, to, first, count, length, cos, sin};
    pool_run(pool, kv->n_layers * kv->n_kv_heads, 1, slide_range, &s);
}

// ---- the plain layout

struct copying {
    const struct kv *kv;
    void *const *pages;
    uint32_t first;
    uint8_t *out;           // (n, n_layers, 2, n_kv_heads, head_dim), or NULL
    const uint8_t *in;      // the same, where out is NULL
};

static void copy_key(const struct kv *kv, uint8_t *to, size_t to_step, const uint8_t *from,
                     size_t from_step) {
    const size_t size = kv->element_bytes;
    for (size_t i = 0; i < kv->head_dim; i++)
        memcpy(to + i * to_step * size, from + i * from_step * size, size);
}

static void copy_range(void *context, size_t first, size_t last) {
    const struct copying *c = context;
    const struct kv *kv = c->kv;
    const size_t row = kv->head_dim * kv->element_bytes, layer = 2 * kv->n_kv_heads * row;
    for (size_t i = first; i < last; i++) {
        const size_t slot = (c->first + i) % PAGE_POSITIONS;
        uint8_t *page = c->pages[(c->first + i) / PAGE_POSITIONS];
        for (size_t item = 0; item < kv->n_layers * kv->n_kv_heads; item++) {
            const size_t l = item / kv->n_kv_heads, h = item % kv->n_kv_heads;
            uint8_t *key = page + kv_offset(kv, l, h) + key_element(kv, slot) * kv->element_bytes;
            uint8_t *value = page + kv_offset(kv, l, h) + kv->key_bytes + slot * row;
            const size_t plain_key = i * kv->n_layers * layer + l * layer + h * row;
            const size_t plain_value = plain_key + kv->n_kv_heads * row;
            if (c->out) {
                copy_key(kv, c->out + plain_key, 1, key, TILE_ROWS);
                memcpy(c->out + plain_value, value, row);
            } else {
                copy_key(kv, key, TILE_ROWS, c->in + plain_key, 1);
                memcpy(value, c->in + plain_value, row);
            }
        }
    }
}

void kv_read(const struct kv *kv, struct pool *pool, void *const *pages, uint32_t first, uint32_t n,
             void *out) {
    struct copying c = {kv, pages, first, out, NULL};
    pool_run(pool, n, 1, copy_range, &c);
}

void kv_write(const struct kv *kv, struct pool *pool, void *const *pages, uint32_t first,
              uint32_t n, const void *in) {
    struct copying c = {kv, pages, first, NULL, in};
    pool_run(pool, n, 1, copy_range, &c);
}
