/* backend.h: the seam between devices. Devices differ in memory, fusion and launch, so what one
 * supplies is the whole forward pass, not single operations.
 *
 * session.c checks everything before it comes here, keeps the cache's books, and calls one of the
 * two tables below. */
#ifndef BACKEND_H
#define BACKEND_H
#include "cache.h"
#include "model.h"
#include <stdbool.h>

/* Rows to compute, already checked; every position's page is there and writable. */
struct rows {
    size_t n;
    const int32_t *tokens;                // (n)
    const int32_t *positions;             // (n)
    const uint8_t *want;                  // (n): 1 where logits are asked for; or NULL
    const struct sequence *const *of;     // (n) each row's sequence
    const int32_t *rope_lengths;          // (n) for rope_length; or NULL, all 0
    size_t wanted;                        // rows that want logits
    bool hidden;                          // they get hidden states instead
    float *stream;                        // (n_layers + 1, wanted, dim); or NULL
    /* Where layers are split over two devices, (n, dim): the residual stream as the first layer
     * here takes it, in place of the embedding, and as the last one leaves it, in place of logits.
     * NULL where a device begins, or ends, the network. */
    const float *from;
    float *to;
};

enum { KEPT_ROWS = 64 };                  // of logits, on a device that keeps them

struct backend {
    const char *name;                     // "cpu"
    /* Fills *state and, in info, isa, threads, scratch and KV sizes; on failure there is
     * nothing to close. Where options->host_layers is not 0, the CPU is for these layers only and
     * the GPU for the others. */
    int (*open)(const struct model *model, const llama_session_options *options,
                llama_session_info *info, void **state);
    void (*close)(void *state);
    struct pages (*pages)(void *state);
    /* logits (wanted, n_outputs), or hidden states (wanted, dim), in row order. NULL: up to KEEPS
     * rows of logits stay on the device until the next forward. */
    int (*forward)(void *state, const struct rows *rows, float *logits);
    /* One stage of llama_run_stage over the pages of a sequence that no one else writes in; LAYER
     * is the one to run, wherever its matrices come from. */
    int (*stage)(void *state, const llama_stage *stage, const struct layer *layer,
                 const struct sequence *of);
    /* Keys and values of positions [first, first + n), in llama.h's plain layout; the pages are
     * there, and to write in. */
    int (*read)(void *state, const struct sequence *of, uint32_t first, uint32_t n, void *out);
    int (*write)(void *state, const struct sequence *of, uint32_t first, uint32_t n,
                 const void *in);
    size_t keeps;                         // 0: none, and the two below are NULL
    /* Kept logits of row ROW come to the host. */
    int (*fetch)(void *state, size_t row, float *logits);
    /* sampler_pick of kept row ROW; 1 where the device leaves the choice, or its failure, to the
     * host. */
    int (*sample)(void *state, size_t row, const llama_sampling *sampling, const int32_t *seen,
                  size_t n_seen, size_t n_said, double random, int32_t *token);
};

extern const struct backend backend_cpu;
/* In a build without CUDA its open says so, and the rest is never called. */
extern const struct backend backend_cuda;
/* Both, one after the other (split.c). */
extern const struct backend backend_split;
#endif
