/* model.h: the network's shape and weights, each found by name and checked against the shape
 * that the config asks for. No arithmetic: devices take it from here. */
#ifndef MODEL_H
#define MODEL_H
#include "format.h"
#include <pthread.h>

struct matrix {
    const struct kind *kind;
    uint32_t kind_number;  // LLAMA_F32...
    size_t rows, columns;
    size_t strips;         // of TILE_ROWS rows, the last one padded
    size_t strip_bytes;
    const uint8_t *data;
    const float *bias;     // (rows) added to each product; NULL where the model has none
};

struct layer {
    const float *attention_norm;  // (dim)
    struct matrix wq;             // (n_heads * head_dim, dim)
    struct matrix wk, wv;         // (n_kv_heads * head_dim, dim)
    struct matrix wo;             // (dim, n_heads * head_dim)
    const float *ffn_norm;        // (dim)
    struct matrix w1, w3;         // (hidden_dim, dim)
    struct matrix w2;             // (dim, hidden_dim)
};

/* What a device keeps for all the sessions of a model; its own to read and write, and empty once
 * the last of them is closed. */
struct on_device {
    pthread_mutex_t lock;
    void *weights;
};

struct model {
    struct file file;
    struct on_device *on_device;
    llama_config config;
    struct matrix tok_embeddings; // (vocab_size, dim)
    struct layer *layers;         // (n_layers)
    const float *norm;            // (dim)
    struct matrix output;         // (n_outputs, dim); tok_embeddings when tied, NULL data: no head
};

/* 0, or -1 with the reason; model_close is right after either. */
int model_open(struct model *model, const char *path);
void model_close(struct model *model);
/* Whether all quantised matrices of the layers, and there are some, are of rotated kinds. */
int model_rotated(const struct model *model);
/* Layer NUMBER, with BLOCKS of KINDS in the place of those matrices (wq, wk, wv, wo, w1, w3, w2)
 * for which they are not NULL. */
int model_layer(const struct model *model, uint32_t number, const uint32_t *kinds,
                const void *const *blocks, struct layer *layer);
#endif
