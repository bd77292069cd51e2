/* attention.c: rows that follow each other in a sequence, as those of a prompt do, meet each of its
 * pages together, so that its keys and values are read once for all of them; and kv heads that
 * follow each other in a page are read in one go. */
#include "attention.h"

/* ROWS rows from FIRST on. */
struct stretch { uint16_t first, rows; };

struct work {
    const struct attending *of;
    size_t heads;           // kv heads of an item, but for a stretch's last
    size_t pieces;          // of the longest row
    struct stretch list[ATTENTION_ROWS];
};

static size_t last_piece(const struct attending *z, size_t row) {
    return (size_t)z->positions[row] / PIECE;
}

/* Where a piece behind the first puts row ROW: with all its like, or one after the other in the
 * same place. */
static size_t room_of(const struct attending *z, size_t row, size_t piece, int together) {
    return together ? (piece - 1) * z->n + row : row;
}

/* Some kv heads of a stretch. */
struct item { const struct stretch *rows; size_t head, heads; };

/* The query heads of an item against a piece, as many at once as a kernel takes. */
static void attend_piece(const struct attending *z, const struct item *item, size_t piece,
                         int together) {
    const struct kv *kv = z->kv;
    const size_t first = item->rows->first, at = piece * PIECE;
    const size_t group = z->n_heads / kv->n_kv_heads, most = ATTENDING / item->rows->rows;
    const size_t room = piece ? room_of(z, first, piece, together) : first;
    for (size_t query = 0; query < group; query += most) {
        const size_t head = item->head * group + query;
        const struct attention a = {
            .q = z->q + first * z->stride + head * kv->head_dim,
            .out = (piece ? z->pieces : z->out) + room * z->stride + head * kv->head_dim,
            .stride = z->stride,
            .n_rows = item->rows->rows, .n_heads = item->heads, .head_dim = kv->head_dim,
            .n_queries = group - query < most ? group - query : most,
            .pages = (const uint8_t *const *)z->of[first]->handles + at / PAGE_POSITIONS,
            .offset = kv_offset(kv, z->layer, item->head),
            .n_positions = (size_t)z->positions[first] + 1 - at, .most_positions = PIECE,
            .marks = z->marks + (piece ? z->n + room : room) * z->n_heads + head,
            .mark_stride = z->n_heads,
        };
        if (kv->kind == LLAMA_F32) kv->kernels->attend_f32(&a);
        else if (kv->kind == LLAMA_Q8) kv->kernels->attend_q8(&a);
        else kv->kernels->attend_f16(&a);
    }
}

/* What a query has of more positions joins what it has of those before them: each out (n) counts by
 * its part of the sum of exp(score). */
static void join(float *out, struct mark *mark, const float *more, const struct mark *of,
                 size_t n) {
    const float m = of->m > mark->m ? of->m : mark->m;
    const float a = mark->sum * exp_f32(mark->m - m), b = of->sum * exp_f32(of->m - m);
    const float sum = a + b, before = a / sum, now = b / sum;
    for (size_t i = 0; i < n; i++) out[i] = out[i] * before + more[i] * now;
    *mark = (struct mark){m, sum};
}

static void join_piece(const struct attending *z, const struct item *item, size_t piece,
                       int together) {
    const size_t group = z->n_heads / z->kv->n_kv_heads, dim = z->kv->head_dim;
    for (size_t i = 0; i < item->rows->rows; i++) {
        const size_t row = item->rows->first + i, room = room_of(z, row, piece, together);
        for (size_t h = item->head * group; h < (item->head + item->heads) * group; h++)
            join(z->out + row * z->stride + h * dim, z->marks + row * z->n_heads + h,
                 z->pieces + room * z->stride + h * dim,
                 z->marks + (z->n + room) * z->n_heads + h, dim);
    }
}

static size_t count_parts(const struct work *w) {
    return (w->of->kv->n_kv_heads + w->heads - 1) / w->heads;
}

static struct item item_at(const struct work *w, size_t i) {
    const size_t parts = count_parts(w), head = i % parts * w->heads;
    const size_t left = w->of->kv->n_kv_heads - head;
    return (struct item){&w->list[i / parts], head, left < w->heads ? left : w->heads};
}

/* Items with all their pieces. */
static void attend_range(void *context, size_t first, size_t last) {
    const struct work *w = context;
    for (size_t i = first; i < last; i++) {
        const struct item item = item_at(w, i);
        for (size_t piece = 0; piece <= last_piece(w->of, item.rows->first); piece++) {
            attend_piece(w->of, &item, piece, 0);
            if (piece) join_piece(w->of, &item, piece, 0);
        }
    }
}

/* Single pieces of items. */
static void piece_range(void *context, size_t first, size_t last) {
    const struct work *w = context;
    for (size_t i = first; i < last; i++) {
        const struct item item = item_at(w, i / w->pieces);
        const size_t piece = i % w->pieces;
        if (piece <= last_piece(w->of, item.rows->first)) attend_piece(w->of, &item, piece, 1);
    }
}

static void join_range(void *context, size_t first, size_t last) {
    const struct work *w = context;
    for (size_t i = first; i < last; i++) {
        const struct item item = item_at(w, i);
        for (size_t piece = 1; piece <= last_piece(w->of, item.rows->first); piece++)
            join_piece(w->of, &item, piece, 1);
    }
}

/* Rows of a stretch are of as many pieces. */
static int follows(const struct attending *z, size_t i) {
    return i && z->of[i] == z->of[i - 1] && z->positions[i] == z->positions[i - 1] + 1 &&
           z->positions[i] % PIECE;
}

/* Stretches are short enough, and heads few enough, to leave work for all threads; where that is
 * not enough, pieces are shared out too. */
void attend_rows(const struct attending *z, struct pool *pool) {
    enum { MOST_ROWS = 4, ITEMS = 4 }; // of each thread
    const size_t heads = z->kv->n_kv_heads, wanted = ITEMS * (size_t)pool_threads(pool);
    const size_t most = z->n * heads >= MOST_ROWS * wanted ? MOST_ROWS : 1;
    const size_t group = z->n_heads / heads, wide = ATTENDING / (most * group);
    struct work w = {.of = z, .pieces = 1};
    size_t n = 0;
    for (size_t i = 0; i < z->n; i++) {
        if (follows(z, i) && w.list[n - 1].rows < most) w.list[n - 1].rows++;
        else w.list[n++] = (struct stretch){(uint16_t)i, 1};
        if (last_piece(z, i) >= w.pieces) w.pieces = last_piece(z, i) + 1;
    }
    w.heads = n * heads / wanted;
    if (w.heads > wide) w.heads = wide;
    if (w.heads < 1) w.heads = 1;
    const size_t items = n * count_parts(&w);
    if (w.pieces > 1 && items < wanted && (w.pieces - 1) * z->n <= z->room) {
        pool_run(pool, items * w.pieces, 1, piece_range, &w);
        pool_run(pool, items, 1, join_range, &w);
    } else {
        pool_run(pool, items, 1, attend_range, &w);
    }
}
