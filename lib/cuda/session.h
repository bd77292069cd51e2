/* session.h: what a session on the GPU consists of; forward.cu computes with it, session.cu opens
 * and closes it and looks after its pages. */
#ifndef CUDA_SESSION_H
#define CUDA_SESSION_H
#include "memory.h"
extern "C" {
#include "../backend.h"
#include "../rope.h"
}

/* Rows of one part of a prompt; more of them read weights less often, and take more scratch. */
constexpr int MOST_ROWS = 512;
constexpr int LOGIT_ROWS = KEPT_ROWS; // that get logits at once
constexpr int GRAPH_ROWS = 16;    // up to so many rows a step is kept as a graph
constexpr int GRAPHS = 32;
constexpr int MOST_HEAD_DIM = 4096; // several heads in 48 KiB of shared memory
constexpr int MOST_HEADS = 16384; // queries, keys and values in 65535 blocks

/* What the launches of a step depend on, besides what stands in device memory. */
struct step_shape {
    int n, wanted, hidden, items, splits, pages_a_split;
    int kept;                     // rows of logits that stay here, of the parts before
};

struct step_graph {
    step_shape of;
    int runs;                     // 0: a free place; the first time runs as it is, the second
    cudaGraphExec_t exec;         // is recorded
};

/* The arrays of a batch, in one piece of pinned memory and one of the device's. Their places
 * depend on the number of rows alone. */
struct batch_layout {
    size_t tokens, positions, tables, wanted, items, cos, sin, pages; // offsets in bytes
};

struct cuda {
    const struct model *model;
    cudaDeviceProp device;
    char isa[300];                // "NVIDIA H200, sm_90"
    cudaStream_t stream;
    device_weights *weights;
    uint32_t first_layer;         // that runs here
    kv_shape kv;
    size_t page_bytes, layer_page_bytes;
    struct page_store pages;
    int failed;                   // while pages were moved, where no error can be returned

    float *frequencies;           // (head_dim / 2) rope, radians a position, for texts of
    uint32_t rope_length;         // this length

    uint8_t *memory;              // scratch
    size_t memory_bytes;
    int rows;                     // that fit it
    float *x;                     // (rows, dim) the residual stream
    float *q, *attended;          // (rows, n_heads * head_dim)
    float *k, *v;                 // (rows, n_kv_heads * head_dim)
    float *gate;                  // (rows, hidden_dim)
    float *up;                    // (rows, hidden_dim) where w1 and w3 differ in kind
    float *gathered;              // (rows, dim)
    float *logits;                // (LOGIT_ROWS, n_outputs)
    float *partial;               // attention's splits
    int most_partial;             // blocks of them
    uint16_t *halves;             // (rows or 2 rows, widest) the input of a product
    float *unscale;               // (rows)
    float *work;                  // (n_outputs) of a choice, as the two that follow
    double *choice_weights;
    int *counts;
    int32_t *token;

    int32_t *lists;               // of a choice: seen, biases
    size_t lists_room;            // numbers

    uint8_t *host, *batch;        // pinned; on the device
    size_t batch_bytes, most_pages;
    step_graph graphs[GRAPHS];
};

batch_layout batch_lay_out(const struct cuda *c, int n);
/* Room for N_PAGES in a batch's list; graphs of the old room go. */
int batch_reserve(struct cuda *c, size_t n_pages);
void graphs_free(struct cuda *c);
extern "C" int cuda_fetch(void *state, size_t row, float *logits);
extern "C" int cuda_sample(void *state, size_t row, const llama_sampling *sampling,
                           const int32_t *seen, size_t n_seen, size_t n_said, double random,
                           int32_t *token);
extern "C" int cuda_stage(void *state, const llama_stage *stage, const struct layer *layer,
                          const struct sequence *of);
extern "C" int cuda_forward(void *state, const struct rows *rows, float *out);
#endif
