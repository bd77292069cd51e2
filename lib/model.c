/* model.c: finds each weight by the name Meta gave it; a missing or misshapen one is an error
 * that says what was expected and what was found. */
#include "model.h"
#include "error.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int find(const struct file *f, const char *name, uint32_t n_dims, uint64_t rows,
                uint64_t columns, const struct tensor **found) {
    const struct tensor *t = file_find(f, name);
    if (!t) return fail("%s: %s is missing", f->path, name);
    if (t->is.n_dims != n_dims || t->is.shape[0] != rows || t->is.shape[1] != columns)
        return fail("%s: %s has shape (%" PRIu64 ", %" PRIu64 "), expected (%" PRIu64 ", %" PRIu64
                    ")", f->path, name, t->is.shape[0], t->is.shape[1], rows, columns);
    *found = t;
    return 0;
}

static int vector(const struct file *f, const char *name, uint64_t n, const float **v) {
    const struct tensor *t = NULL;
    if (find(f, name, 1, n, 1, &t)) return -1;
    *v = (const float *)(const void *)t->data; // 64-byte aligned in a page-aligned map
    return 0;
}

static int matrix(const struct file *f, const char *name, uint64_t rows, uint64_t columns,
                  struct matrix *m) {
    const struct tensor *t = NULL;
    if (find(f, name, 2, rows, columns, &t)) return -1;
    *m = (struct matrix){.kind = t->kind, .kind_number = t->is.kind, .rows = rows,
                         .columns = columns, .strips = (rows + TILE_ROWS - 1) / TILE_ROWS,
                         .strip_bytes = kind_strip_bytes(t->kind, columns), .data = t->data};
    return 0;
}

static int find_layer(const struct file *f, uint32_t n, struct layer *layer) {
    const llama_config *c = &f->config;
    uint64_t dim = c->dim, heads = (uint64_t)c->n_heads * c->head_dim;
    uint64_t kv_heads = (uint64_t)c->n_kv_heads * c->head_dim;
    const struct { const char *name; uint64_t rows; const float **to; } vectors[] = {
        {"attention_norm", dim, &layer->attention_norm},
        {"ffn_norm", dim, &layer->ffn_norm},
    };
    const struct {
        const char *name;
        uint64_t rows, columns;
        struct matrix *to;
        uint32_t bias;
    } matrices[] = {
        {"attention.wq", heads, dim, &layer->wq, c->attention_bias},
        {"attention.wk", kv_heads, dim, &layer->wk, c->attention_bias},
        {"attention.wv", kv_heads, dim, &layer->wv, c->attention_bias},
        {"attention.wo", dim, heads, &layer->wo, c->attention_bias},
        {"feed_forward.w1", c->hidden_dim, dim, &layer->w1, c->mlp_bias},
        {"feed_forward.w3", c->hidden_dim, dim, &layer->w3, c->mlp_bias},
        {"feed_forward.w2", dim, c->hidden_dim, &layer->w2, c->mlp_bias},
    };
    char name[64];
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        snprintf(name, sizeof name, "layers.%u.%s.weight", n, vectors[i].name);
        if (vector(f, name, vectors[i].rows, vectors[i].to)) return -1;
    }
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
        snprintf(name, sizeof name, "layers.%u.%s.weight", n, matrices[i].name);
        if (matrix(f, name, matrices[i].rows, matrices[i].columns, matrices[i].to)) return -1;
        snprintf(name, sizeof name, "layers.%u.%s.bias", n, matrices[i].name);
        if (matrices[i].bias && vector(f, name, matrices[i].rows, &matrices[i].to->bias)) return -1;
    }
    return 0;
}

/* The lock may be taken again by whom a device tells of its progress while it holds it. */
static struct on_device *on_device_make(void) {
    struct on_device *d = calloc(1, sizeof *d);
    pthread_mutexattr_t again;
    if (!d) return NULL;
    pthread_mutexattr_init(&again);
    pthread_mutexattr_settype(&again, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&d->lock, &again);
    pthread_mutexattr_destroy(&again);
    return d;
}

int model_open(struct model *m, const char *path) {
    memset(m, 0, sizeof *m);
    if (file_open(&m->file, path)) return -1;
    const struct file *f = &m->file;
    const llama_config *c = &f->config;
    m->config = *c;
    m->layers = calloc(c->n_layers, sizeof *m->layers);
    m->on_device = on_device_make();
    if (!m->layers || !m->on_device) return fail("%s: out of memory", path);
    if (matrix(f, "tok_embeddings.weight", c->vocab_size, c->dim, &m->tok_embeddings) ||
        vector(f, "norm.weight", c->dim, &m->norm))
        return -1;
    for (uint32_t n = 0; n < c->n_layers; n++)
        if (find_layer(f, n, &m->layers[n])) return -1;
    if (c->head == LLAMA_HEAD_NONE) return 0;
    m->output = m->tok_embeddings;
    if (!c->tied && matrix(f, "output.weight", c->n_outputs, c->dim, &m->output)) return -1;
    return c->output_bias ? vector(f, "output.bias", c->n_outputs, &m->output.bias) : 0;
}

void model_close(struct model *m) {
    free(m->layers);
    if (m->on_device) pthread_mutex_destroy(&m->on_device->lock);
    free(m->on_device);
    file_close(&m->file);
    memset(m, 0, sizeof *m);
}

struct matrices { struct matrix *at[LLAMA_LAYER_MATRICES]; }; // in llama_stage's order

static struct matrices matrices_of(struct layer *l) {
    return (struct matrices){{&l->wq, &l->wk, &l->wv, &l->wo, &l->w1, &l->w3, &l->w2}};
}

int model_rotated(const struct model *m) {
    int rotated = 0;
    for (uint32_t n = 0; n < m->config.n_layers; n++) {
        const struct matrices all = matrices_of(&m->layers[n]);
        for (int i = 0; i < LLAMA_LAYER_MATRICES; i++) {
            const struct kind *kind = all.at[i]->kind;
            if (kind->columns > 1 && !kind->rotated) return 0;
            rotated |= kind->rotated;
        }
    }
    return rotated;
}

int model_layer(const struct model *model, uint32_t number, const uint32_t *kinds,
                const void *const *blocks, struct layer *layer) {
    if (number >= model->config.n_layers)
        return fail("layer %u, expected 0 to %u", number, model->config.n_layers - 1);
    *layer = model->layers[number];
    const struct matrices all = matrices_of(layer);
    for (int i = 0; i < LLAMA_LAYER_MATRICES; i++) {
        if (!blocks[i]) continue;
        const struct kind *kind = kind_find(kinds[i]);
        if (!kind) return fail("layer %u: no such kind of weights as %u", number, kinds[i]);
        all.at[i]->kind = kind;
        all.at[i]->kind_number = kinds[i];
        all.at[i]->strip_bytes = kind_strip_bytes(kind, all.at[i]->columns);
        all.at[i]->data = blocks[i];
    }
    return 0;
}
