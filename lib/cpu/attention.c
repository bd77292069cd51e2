/* attention.c: rows that follow each other in a sequence, as those of a prompt do, meet each of its
 * pages together, so that its keys and values are read once for all of them. */
#include "attention.h"

/* ROWS rows from FIRST on. */
struct stretch { uint16_t first, rows; };

struct work {
    const struct attending *of;
    struct stretch list[ATTENTION_ROWS];
};

/* Items are (stretch, kv head); the query heads of a group share its keys and values. */
static void attend_range(void *context, size_t first, size_t last) {
    const struct work *w = context;
    const struct attending *z = w->of;
    const struct kv *kv = z->kv;
    const size_t group = z->n_heads / kv->n_kv_heads;
    for (size_t item = first; item < last; item++) {
        const struct stretch *s = &w->list[item / kv->n_kv_heads];
        const size_t head = item % kv->n_kv_heads;
        const size_t at = s->first * z->stride + head * group * kv->head_dim;
        const size_t k_offset = kv_offset(kv, z->layer, head);
        const struct attention a = {
            .q = z->q + at, .out = z->out + at, .stride = z->stride,
            .n_rows = s->rows, .n_queries = group, .head_dim = kv->head_dim,
            .pages = (const uint8_t *const *)z->of[s->first]->handles,
            .k_offset = k_offset, .v_offset = k_offset + kv->key_bytes,
            .n_positions = (size_t)z->positions[s->first] + 1,
        };
        if (kv->kind == LLAMA_F32) kv->kernels->attend_f32(&a);
        else if (kv->kind == LLAMA_Q8) kv->kernels->attend_q8(&a);
        else kv->kernels->attend_f16(&a);
    }
}

static int follows(const struct attending *z, size_t i) {
    return i && z->of[i] == z->of[i - 1] && z->positions[i] == z->positions[i - 1] + 1;
}

/* Stretches are short enough to leave work for all threads. */
void attend_rows(const struct attending *z, struct pool *pool) {
    enum { MOST_ROWS = 4, ITEMS = 8 }; // of each thread
    const size_t heads = z->kv->n_kv_heads, items = ITEMS * (size_t)pool_threads(pool);
    const size_t most = z->n * heads >= MOST_ROWS * items ? MOST_ROWS : 1;
    struct work w = {.of = z};
    size_t n = 0;
    for (size_t i = 0; i < z->n; i++) {
        if (follows(z, i) && w.list[n - 1].rows < most) w.list[n - 1].rows++;
        else w.list[n++] = (struct stretch){(uint16_t)i, 1};
    }
    pool_run(pool, n * heads, 1, attend_range, &w);
}
