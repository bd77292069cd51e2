/* pages.c: keys go into tiles and come out of them again, turned where a sequence slides.
 *
 * Work is shared so that each element is moved by one thread: by (layer, head) where a sequence
 * moves onto itself, which must go upwards, and by position elsewhere. */
#include "pages.h"
#include "../llama.h"
#include <string.h>

enum { CHUNK = 64 }; // dimensions of a key rounded at once

void kv_lay_out(struct kv *kv) {
    kv->element_bytes = kv->kind == LLAMA_F32 ? 4 : kv->kind == LLAMA_F16 ? 2 : 1;
    kv->scale_bytes = kv->kind == LLAMA_Q8 ? 4 : 0;
    kv->key_bytes = PAGE_POSITIONS * (kv->head_dim * kv->element_bytes + kv->scale_bytes);
    kv->page_bytes = 2 * kv->n_layers * kv->n_kv_heads * kv->key_bytes;
}

size_t kv_offset(const struct kv *kv, size_t layer, size_t kv_head) {
    return 2 * (layer * kv->n_kv_heads + kv_head) * kv->key_bytes;
}

/* The element of dimension 0 of SLOT's key; the others follow TILE_ROWS elements apart. */
static size_t key_element(const struct kv *kv, size_t slot) {
    return slot / TILE_ROWS * kv->head_dim * TILE_ROWS + slot % TILE_ROWS;
}

/* The scale of SLOT's key or value, in q8. */
static float *scale_at(const struct kv *kv, uint8_t *head, size_t slot) {
    return (float *)(void *)(head + PAGE_POSITIONS * kv->head_dim) + slot;
}

/* k (head_dim) becomes SLOT's key: in q8 it is turned by a Hadamard matrix already. */
static void put_key(const struct kv *kv, uint8_t *keys, size_t slot, const float *k) {
    const size_t d = kv->head_dim, at = key_element(kv, slot);
    if (kv->kind == LLAMA_F32) {
        float *to = (float *)(void *)keys + at;
        for (size_t i = 0; i < d; i++) to[i * TILE_ROWS] = k[i];
    } else if (kv->kind == LLAMA_F16) {
        uint16_t *to = (uint16_t *)(void *)keys + at, half[CHUNK];
        for (size_t i = 0; i < d; i++) {
            if (i % CHUNK == 0) kv->kernels->to_f16(half, k + i, d - i < CHUNK ? d - i : CHUNK);
            to[i * TILE_ROWS] = half[i % CHUNK];
        }
    } else {
        kv->kernels->to_q8((int8_t *)keys + at, TILE_ROWS, scale_at(kv, keys, slot), k, d);
    }
}

static void get_key(const struct kv *kv, uint8_t *keys, size_t slot, float *k) {
    const size_t at = key_element(kv, slot);
    const float *f32 = (const float *)(const void *)keys + at;
    const uint16_t *f16 = (const uint16_t *)(const void *)keys + at;
    const int8_t *q8 = (const int8_t *)keys + at;
    for (size_t i = 0; i < kv->head_dim; i++)
        k[i] = kv->kind == LLAMA_F32   ? f32[i * TILE_ROWS]
               : kv->kind == LLAMA_F16 ? f16_to_f32(f16[i * TILE_ROWS])
                                       : *scale_at(kv, keys, slot) * (float)q8[i * TILE_ROWS];
}

void kv_store(const struct kv *kv, uint8_t *keys, size_t slot, const float *k, const float *v) {
    const size_t d = kv->head_dim;
    uint8_t *values = keys + kv->key_bytes, *value = values + slot * d * kv->element_bytes;
    put_key(kv, keys, slot, k);
    if (kv->kind == LLAMA_F32) memcpy(value, v, d * sizeof *v);
    else if (kv->kind == LLAMA_F16) kv->kernels->to_f16((uint16_t *)(void *)value, v, d);
    else kv->kernels->to_q8((int8_t *)value, 1, scale_at(kv, values, slot), v, d);
}

// ---- sliding

struct sliding {
    const struct kv *kv;
    void *const *from, *const *to;
    uint32_t first, count, length;
    const float *cos, *sin; // (head_dim / 2)
    float *room;            // (n_kv_heads, head_dim)
};

static void move(const struct sliding *s, uint8_t *from, size_t from_slot, uint8_t *to,
                 size_t to_slot, float *key) {
    const struct kv *kv = s->kv;
    const size_t d = kv->head_dim, bytes = d * kv->element_bytes;
    get_key(kv, from, from_slot, key);
    if (kv->kind == LLAMA_Q8) {
        // twice turned by the Hadamard matrix is the key again, times the size of its blocks
        kv->kernels->hadamard(key, d);
        for (size_t i = 0; i < d; i++) key[i] /= (float)(d & -d);
    }
    kv->kernels->rope(key, s->cos, s->sin, d);
    if (kv->kind == LLAMA_Q8) kv->kernels->hadamard(key, d);
    put_key(kv, to, to_slot, key);
    from += kv->key_bytes, to += kv->key_bytes;
    memcpy(to + to_slot * bytes, from + from_slot * bytes, bytes);
    if (kv->kind == LLAMA_Q8) *scale_at(kv, to, to_slot) = *scale_at(kv, from, from_slot);
}

/* Items are kv heads. Upwards, so that a page that stays in place is read ahead of where it is
 * written. */
static void slide_range(void *context, size_t first, size_t last) {
    const struct sliding *s = context;
    for (size_t h = first; h < last; h++)
        for (size_t layer = 0; layer < s->kv->n_layers; layer++) {
            const size_t offset = kv_offset(s->kv, layer, h);
            for (size_t p = s->first; p < s->length; p++) {
                const size_t q = p + s->count;
                move(s, (uint8_t *)s->from[q / PAGE_POSITIONS] + offset, q % PAGE_POSITIONS,
                     (uint8_t *)s->to[p / PAGE_POSITIONS] + offset, p % PAGE_POSITIONS,
                     s->room + h * s->kv->head_dim);
            }
        }
}

void kv_slide(const struct kv *kv, struct pool *pool, void *const *from, void *const *to,
              uint32_t first, uint32_t count, uint32_t length, const float *cos, const float *sin,
              float *room) {
    struct sliding s = {kv, from, to, first, count, length, cos, sin, room};
    pool_run(pool, kv->n_kv_heads, 1, slide_range, &s);
}

// ---- the plain layout

struct copying {
    const struct kv *kv;
    void *const *pages;
    uint32_t first;
    uint8_t *out;           // llama_read_kv's layout, or NULL
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
    const size_t codes = kv->head_dim * kv->element_bytes, row = codes + kv->scale_bytes;
    const size_t layer = 2 * kv->n_kv_heads * row;
    for (size_t i = first; i < last; i++) {
        const size_t slot = (c->first + i) % PAGE_POSITIONS;
        uint8_t *page = c->pages[(c->first + i) / PAGE_POSITIONS];
        for (size_t item = 0; item < kv->n_layers * kv->n_kv_heads; item++) {
            const size_t l = item / kv->n_kv_heads, h = item % kv->n_kv_heads;
            uint8_t *keys = page + kv_offset(kv, l, h), *values = keys + kv->key_bytes;
            uint8_t *key = keys + key_element(kv, slot) * kv->element_bytes;
            uint8_t *value = values + slot * codes;
            const size_t plain_key = i * kv->n_layers * layer + l * layer + h * row;
            const size_t plain_value = plain_key + kv->n_kv_heads * row;
            uint8_t *k_scale = (uint8_t *)scale_at(kv, keys, slot);
            uint8_t *v_scale = (uint8_t *)scale_at(kv, values, slot);
            if (c->out) {
                copy_key(kv, c->out + plain_key, 1, key, TILE_ROWS);
                memcpy(c->out + plain_value, value, codes);
                memcpy(c->out + plain_key + codes, k_scale, kv->scale_bytes);
                memcpy(c->out + plain_value + codes, v_scale, kv->scale_bytes);
            } else {
                copy_key(kv, key, TILE_ROWS, c->in + plain_key, 1);
                memcpy(value, c->in + plain_value, codes);
                memcpy(k_scale, c->in + plain_key + codes, kv->scale_bytes);
                memcpy(v_scale, c->in + plain_value + codes, kv->scale_bytes);
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
