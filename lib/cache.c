/* cache.c: pages counted, shared, and copied when a shared one is about to change. */
#include "cache.h"
#include "error.h"
#include <stdlib.h>
#include <string.h>

static uint32_t pages_for(uint32_t length) {
    return (uint32_t)(((uint64_t)length + PAGE_POSITIONS - 1) / PAGE_POSITIONS);
}

void cache_open(struct cache *c, struct pages pages) {
    memset(c, 0, sizeof *c);
    c->pages = pages;
}

void cache_close(struct cache *c) {
    for (int32_t s = 0; s < LLAMA_MAX_SEQUENCES; s++) {
        free(c->sequences[s].ids);
        free(c->sequences[s].handles);
    }
    for (uint32_t i = 0; i < c->n_all; i++) c->pages.destroy(c->pages.device, c->all[i].handle);
    free(c->all);
    memset(c, 0, sizeof *c);
}

/* A page nobody uses, an old one before a new one; its number, or -1. */
static int64_t take(struct cache *c) {
    for (uint32_t i = 0; i < c->n_all; i++)
        if (!c->all[i].uses) return c->all[i].uses = 1, i;
    if (c->n_all == c->room) {
        uint32_t room = c->room ? 2 * c->room : 16;
        struct page *all = realloc(c->all, room * sizeof *all);
        if (!all) return fail("out of memory for the list of %u KV pages", room);
        c->all = all;
        c->room = room;
    }
    void *handle = c->pages.make(c->pages.device);
    if (!handle) return -1;
    c->all[c->n_all] = (struct page){handle, 1};
    return c->n_all++;
}

static int make_room(struct sequence *s, uint32_t n_pages) {
    if (n_pages <= s->room) return 0;
    uint32_t room = n_pages + n_pages / 2 + 4;
    uint32_t *ids = realloc(s->ids, room * sizeof *ids);
    if (ids) s->ids = ids;
    void **handles = realloc(s->handles, room * sizeof *handles);
    if (handles) s->handles = handles;
    if (!ids || !handles) return fail("out of memory for the list of %u KV pages", room);
    s->room = room;
    return 0;
}

static void set(struct cache *c, struct sequence *s, uint32_t index, uint32_t id) {
    s->ids[index] = id;
    s->handles[index] = c->all[id].handle;
}

static void drop_pages(struct cache *c, struct sequence *s, uint32_t keep) {
    while (s->n_pages > keep) c->all[s->ids[--s->n_pages]].uses--;
}

int cache_reserve(struct cache *c, int32_t sequence, uint32_t length) {
    struct sequence *s = &c->sequences[sequence];
    const uint32_t need = pages_for(length), partial = s->length % PAGE_POSITIONS;
    if (length <= s->length) return 0;
    if (make_room(s, need)) return -1;
    if (partial && c->all[s->ids[s->n_pages - 1]].uses > 1) {
        int64_t copy = take(c);
        if (copy < 0) return -1;
        uint32_t last = s->n_pages - 1, shared = s->ids[last];
        c->pages.copy(c->pages.device, c->all[copy].handle, c->all[shared].handle);
        c->all[shared].uses--;
        set(c, s, last, (uint32_t)copy);
    }
    while (s->n_pages < need) {
        int64_t id = take(c);
        if (id < 0) {
            drop_pages(c, s, pages_for(s->length));
            return -1;
        }
        set(c, s, s->n_pages++, (uint32_t)id);
    }
    return 0;
}

void cache_commit(struct cache *c, int32_t sequence, uint32_t length) {
    c->sequences[sequence].length = length;
}

void cache_trim(struct cache *c, int32_t sequence, uint32_t length) {
    struct sequence *s = &c->sequences[sequence];
    if (length < s->length) s->length = length;
    drop_pages(c, s, pages_for(s->length));
}

/* The pages that S would have if what follows FIRST moved: those it holds alone in place, new
 * ones where it shares. */
static int slide_pages(struct cache *c, const struct sequence *s, uint32_t first,
                       struct sequence *to) {
    const uint32_t n = pages_for(to->length);
    if (make_room(to, n)) return -1;
    for (uint32_t i = 0; i < n; i++, to->n_pages++) {
        const uint32_t id = s->ids[i];
        set(c, to, i, id);
        if ((i + 1) * PAGE_POSITIONS <= first || c->all[id].uses == 1) continue;
        const int64_t fresh = take(c);
        if (fresh < 0) return -1;
        set(c, to, i, (uint32_t)fresh);
        if (i * PAGE_POSITIONS < first)
            c->pages.copy(c->pages.device, c->all[fresh].handle, c->all[id].handle);
    }
    return 0;
}

/* Lets go of what IDS holds and OTHER, at the same places, does not. */
static void drop_others(struct cache *c, const struct sequence *s, const struct sequence *other) {
    for (uint32_t i = 0; i < s->n_pages; i++)
        if (i >= other->n_pages || s->ids[i] != other->ids[i]) c->all[s->ids[i]].uses--;
}

int cache_slide(struct cache *c, int32_t sequence, uint32_t first, uint32_t count) {
    struct sequence *s = &c->sequences[sequence];
    struct sequence to = {.length = s->length - count};
    const int rc = slide_pages(c, s, first, &to);
    if (!rc) {
        c->pages.slide(c->pages.device, s->handles, to.handles, first, count, to.length);
        const struct sequence before = *s;
        *s = to;
        to = before;
    }
    drop_others(c, &to, s);
    free(to.ids);
    free(to.handles);
    return rc;
}

int cache_fork(struct cache *c, int32_t from, int32_t to, uint32_t length) {
    const struct sequence *source = &c->sequences[from];
    struct sequence *s = &c->sequences[to];
    const uint32_t n = pages_for(length);
    if (make_room(s, n)) return -1;
    drop_pages(c, s, 0);
    for (uint32_t i = 0; i < n; i++) {
        c->all[source->ids[i]].uses++;
        set(c, s, i, source->ids[i]);
    }
    s->n_pages = n;
    s->length = length;
    return 0;
}
