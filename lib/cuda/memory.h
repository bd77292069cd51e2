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

/* While one lives, the thread's CUDA calls are for the first GPU, whichever another library in the
 * process had chosen for this thread, and has again afterwards. */
class on_gpu {
    int before = 0;

  public:
    on_gpu() {
        if (cudaGetDevice(&before) != cudaSuccess || before) cudaSetDevice(0);
    }
    ~on_gpu() {
        if (before) cudaSetDevice(before);
    }
    on_gpu(const on_gpu &) = delete;
};

/* The first GPU, or -1 with the reason in one line: no driver, too old a one, no GPU, too old. */
int device_find(cudaDeviceProp *properties);

struct device_layer {
    const float *attention_norm;      // (dim)
    device_matrix wq, wk, wv, wo;
    const float *ffn_norm;            // (dim)
    device_matrix w1, w3, w2;
};

/* Of a model, from layer FIRST on; the sessions that have them here share them. */
struct device_weights {
    device_weights *next;             // more of the same model
    int users;                        // sessions
    uint32_t first;                   // 0: and the embedding
    uint8_t *memory;                  // all of them in one piece
    size_t bytes;
    device_matrix tok_embeddings, output;
    const float *norm;
    device_layer *layers;             // (n_layers), those from FIRST on; on the host
};

/* What a session takes besides weights. */
struct session_need {
    size_t scratch, layer_page_bytes; // a page's share of one layer
    uint32_t positions;
};

/* The weights from layer options->host_layers on, which come here unless another session of the
 * model has them here. NULL if they and NEED do not fit what is free, with all the numbers. */
device_weights *weights_take(const struct model *model, const llama_session_options *options,
                             const session_need &need, cudaStream_t stream);
/* A session less; NULL is allowed. */
void weights_give(const struct model *model, device_weights *weights);
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
#endif
