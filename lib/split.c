/* split.c: a model too large for its GPU: the CPU runs the first layers, the GPU the last ones.
 *
 * That way round the GPU has what follows the layers too: norm, head and sampling. What crosses is
 * one row of the residual stream a token; logits, many times as long, stay on the GPU; and the
 * table of embeddings, of which a token takes one row, stays in the file. A page of the cache is a
 * pair, each side's of its own layers. */
#include "backend.h"
#include "error.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HOST, GPU, SIDES, COPIED = 64 }; // COPIED: positions whose keys and values move at once

struct side {
    const struct backend *backend;
    void *state;
    struct pages pages;
    uint32_t layers;
    size_t kv_bytes;       // a position's
    void **from, **to;     // (most_pages) a sequence's pages here, and where it slides to
};

struct pair { void *on[SIDES]; };

struct split {
    const struct model *model;
    struct side sides[SIDES];
    char isa[400];         // "NVIDIA H200, sm_90 and avx512vnni"
    void *spare;           // a page of the GPU's, whose pair had no memory left
};

// ---- pages

/* A side without layers has no pages. */
static void *page_make(void *device) {
    struct split *s = device;
    const struct pages *host = &s->sides[HOST].pages, *gpu = &s->sides[GPU].pages;
    if (s->sides[GPU].layers && !s->spare && !(s->spare = gpu->make(gpu->device))) return NULL;
    struct pair *pair = malloc(sizeof *pair);
    if (!pair) return fail("out of memory for a KV page"), NULL;
    pair->on[GPU] = s->spare;
    pair->on[HOST] = host->make(host->device);
    if (!pair->on[HOST]) return free(pair), NULL;
    s->spare = NULL;
    return pair;
}

static void page_destroy(void *device, void *page) {
    struct split *s = device;
    struct pair *pair = page;
    for (int i = 0; i < SIDES; i++)
        if (pair->on[i]) s->sides[i].pages.destroy(s->sides[i].pages.device, pair->on[i]);
    free(pair);
}

static void page_copy(void *device, void *to, const void *from) {
    struct split *s = device;
    for (int i = 0; i < SIDES; i++) {
        const struct side *side = &s->sides[i];
        if (side->layers)
            side->pages.copy(side->pages.device, ((struct pair *)to)->on[i],
                             ((const struct pair *)from)->on[i]);
    }
}

/* Side I's of N pages, in TO. */
static void take_side(void **to, void *const *pages, size_t n, int i) {
    for (size_t p = 0; p < n; p++) to[p] = ((struct pair *)pages[p])->on[i];
}

static void page_slide(void *device, void *const *from, void *const *to, uint32_t first,
                       uint32_t count, uint32_t length) {
    struct split *s = device;
    for (int i = 0; i < SIDES; i++) {
        const struct side *side = &s->sides[i];
        if (!side->layers) continue;
        take_side(side->from, from, (length + count + PAGE_POSITIONS - 1) / PAGE_POSITIONS, i);
        take_side(side->to, to, (length + PAGE_POSITIONS - 1) / PAGE_POSITIONS, i);
        side->pages.slide(side->pages.device, side->from, side->to, first, count, length);
    }
}

static struct pages split_pages(void *state) {
    return (struct pages){state, page_make, page_copy, page_slide, page_destroy};
}

/* Sequence OF as side I has it, till the next call. */
static struct sequence sequence_on(struct split *s, const struct sequence *of, int i) {
    take_side(s->sides[i].from, of->handles, of->n_pages, i);
    return (struct sequence){.length = of->length, .n_pages = of->n_pages,
                             .handles = s->sides[i].from};
}

// ---- the forward pass

/* The sequences of a batch's rows as one side has them. */
struct view {
    const struct sequence **of;   // (n) into:
    struct sequence *sequences;   // one for each run of rows of the same sequence
    void **handles;               // of all of them
};

static void view_free(struct view *v) {
    free(v->of);
    free(v->sequences);
    free(v->handles);
}

/* view_free is right after either end. */
static int view_make(struct view *v, const struct rows *rows, int i) {
    size_t n_runs = 0, n_pages = 0;
    for (size_t r = 0; r < rows->n; r++)
        if (!r || rows->of[r] != rows->of[r - 1]) n_runs++, n_pages += rows->of[r]->n_pages;
    v->of = malloc((rows->n + 1) * sizeof *v->of);
    v->sequences = malloc((n_runs + 1) * sizeof *v->sequences);
    v->handles = malloc((n_pages + 1) * sizeof *v->handles);
    if (!v->of || !v->sequences || !v->handles)
        return fail("out of memory for a batch of %zu rows", rows->n);
    struct sequence *next = v->sequences;
    void **handles = v->handles;
    for (size_t r = 0; r < rows->n; r++) {
        if (!r || rows->of[r] != rows->of[r - 1]) {
            *next++ = (struct sequence){.length = rows->of[r]->length, .handles = handles,
                                        .n_pages = rows->of[r]->n_pages};
            take_side(handles, rows->of[r]->handles, rows->of[r]->n_pages, i);
            handles += rows->of[r]->n_pages;
        }
        v->of[r] = next - 1;
    }
    return 0;
}

static int split_forward(void *state, const struct rows *rows, float *logits) {
    struct split *s = state;
    struct view views[SIDES] = {0};
    float *stream = malloc((rows->n * s->model->config.dim + 1) * sizeof *stream);
    int rc = stream ? 0 : fail("out of memory for a batch of %zu rows", rows->n);
    for (int i = 0; i < SIDES && !rc; i++) rc = view_make(&views[i], rows, i);
    for (int i = 0; i < SIDES && !rc; i++) {
        struct rows here = *rows;
        here.of = views[i].of;
        here.from = i == HOST ? NULL : stream;
        here.to = i == HOST ? stream : NULL;
        rc = s->sides[i].backend->forward(s->sides[i].state, &here, i == HOST ? NULL : logits);
    }
    for (int i = 0; i < SIDES; i++) view_free(&views[i]);
    free(stream);
    return rc;
}

/* Where the layer runs; what follows the last one is a norm alone, and the CPU has it as well. */
static int split_stage(void *state, const llama_stage *stage, const struct layer *layer,
                       const struct sequence *of) {
    struct split *s = state;
    const bool late = stage->stage == LLAMA_STAGE_HEAD || stage->layer < s->sides[HOST].layers;
    const int i = late ? HOST : GPU;
    const struct sequence here = sequence_on(s, of, i);
    return s->sides[i].backend->stage(s->sides[i].state, stage, layer, &here);
}

// ---- keys and values in the plain layout, where a position's layers follow each other

static int copy_kv(struct split *s, const struct sequence *of, uint32_t first, uint32_t n,
                   uint8_t *out, const uint8_t *in) {
    const size_t whole = s->sides[HOST].kv_bytes + s->sides[GPU].kv_bytes;
    uint8_t *buffer = malloc(COPIED * whole);
    int rc = buffer ? 0 : fail("out of memory to copy keys and values");
    size_t offset = 0; // of a side's layers in a position
    for (int i = 0; i < SIDES && !rc; offset += s->sides[i++].kv_bytes) {
        const struct side *side = &s->sides[i];
        if (!side->layers) continue;
        const struct sequence here = sequence_on(s, of, i);
        for (uint32_t done = 0, now; done < n && !rc; done += now) {
            now = n - done < COPIED ? n - done : COPIED;
            const size_t at = done * whole + offset;
            for (uint32_t p = 0; p < now && in; p++)
                memcpy(buffer + p * side->kv_bytes, in + at + p * whole, side->kv_bytes);
            rc = in ? side->backend->write(side->state, &here, first + done, now, buffer)
                    : side->backend->read(side->state, &here, first + done, now, buffer);
            for (uint32_t p = 0; p < now && out && !rc; p++)
                memcpy(out + at + p * whole, buffer + p * side->kv_bytes, side->kv_bytes);
        }
    }
    free(buffer);
    return rc;
}

static int split_read(void *state, const struct sequence *of, uint32_t first, uint32_t n,
                      void *out) {
    return copy_kv(state, of, first, n, out, NULL);
}

static int split_write(void *state, const struct sequence *of, uint32_t first, uint32_t n,
                       const void *in) {
    return copy_kv(state, of, first, n, NULL, in);
}

// ---- logits, which are the GPU's

static int split_fetch(void *state, size_t row, float *logits) {
    const struct side *gpu = &((struct split *)state)->sides[GPU];
    return gpu->backend->fetch(gpu->state, row, logits);
}

static int split_sample(void *state, size_t row, const llama_sampling *sampling,
                        const int32_t *seen, size_t n_seen, size_t n_said, double random,
                        int32_t *token) {
    const struct side *gpu = &((struct split *)state)->sides[GPU];
    return gpu->backend->sample(gpu->state, row, sampling, seen, n_seen, n_said, random, token);
}

// ---- opening and closing

static void split_close(void *state) {
    struct split *s = state;
    for (int i = 0; i < SIDES; i++) {
        struct side *side = &s->sides[i];
        if (side->state) side->backend->close(side->state);
        free(side->from);
    }
    free(s);
}

static int side_open(struct split *s, int i, uint32_t layers, const llama_session_options *options,
                     llama_session_info *info) {
    const size_t most_pages = ((size_t)info->max_seq_len + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    struct side *side = &s->sides[i];
    side->backend = i == HOST ? &backend_cpu : &backend_cuda;
    side->layers = layers;
    side->from = calloc(2 * most_pages, sizeof *side->from);
    if (!side->from) return fail("out of memory for a session");
    side->to = side->from + most_pages;
    if (side->backend->open(s->model, options, info, &side->state)) return -1;
    side->pages = side->backend->pages(side->state);
    side->kv_bytes = info->kv_bytes_per_position;
    return 0;
}

/* The GPU first: what is wrong there is told before anything else is done. */
static int split_open(const struct model *model, const llama_session_options *options,
                      llama_session_info *info, void **state) {
    struct split *s = calloc(1, sizeof *s);
    if (!s) return fail("out of memory for a session");
    const uint32_t first = options->host_layers;
    llama_session_info host = *info, gpu = *info;
    s->model = model;
    if (side_open(s, GPU, model->config.n_layers - first, options, &gpu) ||
        side_open(s, HOST, first, options, &host))
        return split_close(s), -1;
    snprintf(s->isa, sizeof s->isa, "%s and %s", gpu.isa, host.isa);
    *info = host;
    info->isa = s->isa;
    info->scratch_bytes += gpu.scratch_bytes;
    info->gpu_scratch_bytes = gpu.scratch_bytes;
    info->kv_bytes_per_position += gpu.kv_bytes_per_position;
    *state = s;
    return 0;
}

const struct backend backend_split = {
    .name = "cuda", .open = split_open, .close = split_close, .pages = split_pages,
    .forward = split_forward, .stage = split_stage, .read = split_read, .write = split_write,
    .keeps = KEPT_ROWS, .fetch = split_fetch, .sample = split_sample,
};
