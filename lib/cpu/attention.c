/* attention.c: rows that follow each other in a sequence, as those of a prompt do, meet each of its
 * pages together, so that its keys and values are read once for all of them; and kv heads that
 * follow each other in a page are read in one go. */
#include "attention.h"

/* ROWS rows from FIRST on. */
struct stretch { uint16_t first, rows; };

struct work {
    const struct attending *of;
    size_t heads;           // kv heads of an item, but for a stretch's last
    struct stretch list[ATTENTION_ROWS];
};

/* The query heads of kv heads [HEAD, HEAD + HEADS), as many at once as a kernel takes. */
static void attend_heads(const struct attending *z, const struct stretch *s, size_t head,
                         size_t heads) {
    const struct kv *kv = z->kv;
    const size_t group = z->n_heads / kv->n_kv_heads, most = ATTENDING / s->rows;
    for (size_t first = 0; first < group; first += most) {
        const size_t at = s->first * z->stride + (head * group + first) * kv->head_dim;
        const struct attention a = {
            .q = z->q + at, .out = z->out + at, .stride = z->stride,
            .n_rows = s->rows, .n_heads = heads, .head_dim = kv->head_dim,
            .n_queries = group - first < most ? group - first : most,
            .pages = (const uint8_t *const *)z->of[s->first]->handles,
            .offset = kv_offset(kv, z->layer, head),
            .n_positions = (size_t)z->positions[s->first] + 1,
        };
        if (kv->kind == LLAMA_F32) kv->kernels->attend_f32(&a);
        else if (kv->kind == LLAMA_Q8) kv->kernels->attend_q8(&a);
        else kv->kernels->attend_f16(&a);
    }
}

/* Items are (stretch, some kv heads); the query heads of a group share its keys and values. */
static void attend_range(void *context, size_t first, size_t last) {
    const struct work *w = context;
    const size_t n = w->of->kv->n_kv_heads, parts = (n + w->heads - 1) / w->heads;
    for (size_t item = first; item < last; item++) {
        const size_t head = item % parts * w->heads, left = n - head;
        attend_heads(w->of, &w->list[item / parts], head, left < w->heads ? left : w->heads);
    }
}

static int follows(const struct attending *z, size_t i) {
    return i && z->of[i] == z->of[i - 1] && z->positions[i] == z->positions[i - 1] + 1;
}

/* Stretches are short enough, and heads few enough, to leave work for all threads. */
void attend_rows(const struct attending *z, struct pool *pool) {
    enum { MOST_ROWS = 4, ITEMS = 4 }; // of each thread
    const size_t heads = z->kv->n_kv_heads, items = ITEMS * (size_t)pool_threads(pool);
    const size_t most = z->n * heads >= MOST_ROWS * items ? MOST_ROWS : 1;
    const size_t group = z->n_heads / heads, wide = ATTENDING / (most * group);
    struct work w = {.of = z};
    size_t n = 0;
    for (size_t i = 0; i < z->n; i++) {
        if (follows(z, i) && w.list[n - 1].rows < most) w.list[n - 1].rows++;
        else w.list[n++] = (struct stretch){(uint16_t)i, 1};
    }
    w.heads = n * heads / items;
    if (w.heads > wide) w.heads = wide;
    if (w.heads < 1) w.heads = 1;
    pool_run(pool, n * ((heads + w.heads - 1) / w.heads), 1, attend_range, &w);
}
