/* pages.c: keys go into tiles and come out of them again, turned where a sequence slides.
 *
 * Work is shared so that each element is moved by one thread: by head where a sequence
 * moves onto itself, which must go upwards, and by position elsewhere. */
#include "pages.h"
#include "../llama.h"
#include <string.h>

enum { CHUNK = 64 }; // dimensions of a key handled at once; even, so that pairs stay together

void kv_lay_out(struct kv *kv) {
    const size_t scale_bytes = kv->kind == LLAMA_Q8 ? sizeof(float) : 0;
    kv->element_bytes = kv->kind == LLAMA_F32 ? 4 : kv->kind == LLAMA_Q8 ? 1 : 2;
    kv->row_bytes = kv->head_dim * kv->element_bytes + scale_bytes;
    kv->key_bytes = kv->n_kv_heads * PAGE_POSITIONS * kv->row_bytes;
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

/* Where SLOT's scale stands behind the codes of a head's keys, or values. */
static float *scale_at(const struct kv *kv, const uint8_t *codes, size_t slot) {
    return (float *)(void *)((uintptr_t)codes + PAGE_POSITIONS * kv->head_dim) + slot;
}

void kv_store(const struct kv *kv, uint8_t *keys, size_t slot, const float *k, const float *v) {
    const size_t d = kv->head_dim;
    if (kv->kind == LLAMA_Q8) {
        uint8_t *values = keys + kv->key_bytes;
        int8_t *key = (int8_t *)keys + key_element(kv, slot);
        kv->kernels->to_q8(key, TILE_ROWS, scale_at(kv, keys, slot), k, d);
        kv->kernels->to_q8((int8_t *)values + slot * d, 1, scale_at(kv, values, slot), v, d);
        return;
    }
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
    float *room;            // (n_kv_heads, head_dim)
};

/* A key of codes, out of its Hadamard matrix (which undoes itself, but for its size), turned, and
 * into it again; X (head_dim) is room. */
static void move_codes(const struct sliding *s, const uint8_t *from, size_t from_slot, uint8_t *to,
                       size_t to_slot, float *x) {
    const struct kv *kv = s->kv;
    const size_t d = kv->head_dim;
    const int8_t *key = (const int8_t *)from + key_element(kv, from_slot);
    const float scale = *scale_at(kv, from, from_slot) / (float)(d & -d);
    for (size_t i = 0; i < d; i++) x[i] = (float)key[i * TILE_ROWS] * scale;
    kv->kernels->hadamard(x, d);
    kv->kernels->rope(x, s->cos, s->sin, d);
    kv->kernels->hadamard(x, d);
    kv->kernels->to_q8((int8_t *)to + key_element(kv, to_slot), TILE_ROWS,
                       scale_at(kv, to, to_slot), x, d);
    *scale_at(kv, to + kv->key_bytes, to_slot) = *scale_at(kv, from + kv->key_bytes, from_slot);
}

static void move(const struct sliding *s, const uint8_t *from, size_t from_slot, uint8_t *to,
                 size_t to_slot, float *room) {
    const struct kv *kv = s->kv;
    const size_t d = kv->head_dim, bytes = d * kv->element_bytes;
    float part[CHUNK];
    if (kv->kind == LLAMA_Q8) move_codes(s, from, from_slot, to, to_slot, room);
    for (size_t i = 0; i < d && kv->kind != LLAMA_Q8; i += CHUNK) {
        const size_t n = d - i < CHUNK ? d - i : CHUNK;
        get_key(kv, from, from_slot, i, n, part);
        kv->kernels->rope(part, s->cos + i / 2, s->sin + i / 2, n);
        put_key(kv, to, to_slot, i, n, part);
    }
    memcpy(to + kv->key_bytes + to_slot * bytes, from + kv->key_bytes + from_slot * bytes, bytes);
}

/* Upwards, so that a page that stays in place is read ahead of where it is written. */
static void slide_head(const struct sliding *s, size_t layer, size_t head) {
    const size_t offset = kv_offset(s->kv, layer, head);
    for (size_t p = s->first; p < s->length; p++) {
        const size_t q = p + s->count;
        move(s, (const uint8_t *)s->from[q / PAGE_POSITIONS] + offset, q % PAGE_POSITIONS,
             (uint8_t *)s->to[p / PAGE_POSITIONS] + offset, p % PAGE_POSITIONS,
             s->room + head * s->kv->head_dim);
    }
}

/* Items are kv heads, for each has its own room. */
static void slide_range(void *context, size_t first, size_t last) {
    const struct sliding *s = context;
    for (size_t head = first; head < last; head++)
        for (size_t layer = 0; layer < s->kv->n_layers; layer++) slide_head(s, layer, head);
}

void kv_slide(const struct kv *kv, struct pool *pool, void *const *from, void *const *to,
              uint32_t first, uint32_t count, uint32_t length, const float *cos,
              const float *sin, float *room) {
    struct sliding s = {kv, from, to, first, count, length, cos, sin, room};
    pool_run(pool, kv->n_kv_heads, 1, slide_range, &s);
}

// ---- the plain layout

struct copying {
    const struct kv *kv;
    void *const *pages;
    uint32_t first;
    uint8_t *out;           // (n, n_layers, 2, n_kv_heads, head_dim), or NULL
    const uint8_t *in;      // the same, where out is NULL
};

/* A row of the plain layout and SLOT's key of a head, or value, at CODES, whose elements stand STEP
 * apart from ELEMENT on. In q8 the scale follows the row's codes. */
static void copy_row(const struct copying *c, size_t plain, uint8_t *codes, size_t element,
                     size_t step, size_t slot) {
    const struct kv *kv = c->kv;
    const size_t size = kv->element_bytes, d = kv->head_dim, scale = kv->row_bytes - d * size;
    uint8_t *at = codes + element * size, *scale_bytes = (uint8_t *)scale_at(kv, codes, slot);
    for (size_t i = 0; i < d; i++) {
        if (c->out) memcpy(c->out + plain + i * size, at + i * step * size, size);
        else memcpy(at + i * step * size, c->in + plain + i * size, size);
    }
    if (scale && c->out) memcpy(c->out + plain + d * size, scale_bytes, scale);
    else if (scale) memcpy(scale_bytes, c->in + plain + d * size, scale);
}

static void copy_range(void *context, size_t first, size_t last) {
    const struct copying *c = context;
    const struct kv *kv = c->kv;
    const size_t heads = kv->n_kv_heads, layer = 2 * heads * kv->row_bytes;
    for (size_t i = first; i < last; i++) {
        const size_t slot = (c->first + i) % PAGE_POSITIONS;
        uint8_t *page = c->pages[(c->first + i) / PAGE_POSITIONS];
        for (size_t item = 0; item < kv->n_layers * heads; item++) {
            const size_t l = item / heads, h = item % heads;
            const size_t key = (i * kv->n_layers + l) * layer + h * kv->row_bytes;
            uint8_t *keys = page + kv_offset(kv, l, h), *values = keys + kv->key_bytes;
            copy_row(c, key, keys, key_element(kv, slot), TILE_ROWS, slot);
            copy_row(c, key + layer / 2, values, slot * kv->head_dim, 1, slot);
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
