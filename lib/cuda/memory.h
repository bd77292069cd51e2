/* memory.h: what a session holds on its GPU: weights, pages, scratch; planned before any of it is
 * taken, and given back by one call. */
#ifndef CUDA_MEMORY_H
#define CUDA_MEMORY_H
#include "kernels.h"
extern "C" {
#include "../error.h"
#include "../model.h"
}

/* 0, or -1 with what CUDA says and DOING, e.g. "copying weights". */
int cuda_check(cudaError_t error, const char *doing);

/* The first GPU, or -1 with the reason in one line: no driver, too old a one, no GPU, too old. */
int device_find(cudaDeviceProp *properties);

struct device_layer {
    const float *attention_norm;      // (dim)
    device_matrix wq, wk, wv, wo;
    const float *ffn_norm;            // (dim)
    device_matrix w1, w3, w2;
};

struct device_weights {
    uint8_t *memory;                  // all of them in one piece
    size_t bytes;
    device_matrix tok_embeddings, output;
    const float *norm;
    device_layer *layers;             // (n_layers), on the host
};

/* Bytes that a model's weights take on a device. */
size_t weights_count(const struct model *model);
/* Copies them there; weights_free is right after either. */
int weights_load(device_weights *weights, const struct model *model, cudaStream_t stream);
void weights_free(device_weights *weights);
/* LAYER, which is OF but for the matrices that stand in its place elsewhere: these go to *MEMORY,
 * to be freed after either end; THERE is what OF is on the device. */
int layer_load(device_layer *to, uint8_t **memory, const struct layer *layer,
               const struct layer *of, const device_layer *there, cudaStream_t stream);

/* Pages are cut from larger pieces of memory, since one alone may be small; a piece holds no more
 * than a sequence of POSITIONS needs. */
struct page_store {
    size_t page_bytes;
    int a_piece;                      // pages
    void **pieces;
    size_t n_pieces, room;
    int left;                         // pages not yet given of the last piece
};
void page_store_open(page_store *store, size_t page_bytes, uint32_t positions);
void *page_store_take(page_store *store); // NULL with the reason
void page_store_close(page_store *store);

/* Fails, with all the numbers, if WEIGHTS + SCRATCH + the pages of POSITIONS do not fit what is
 * free. */
int plan(const struct model *model, size_t weights, size_t scratch, size_t page_bytes,
         uint32_t positions);
#endif
