/* kernels.h: the launchers, each with its contract: twin of cpu/kernels.h.
 *
 * A launcher puts its kernel on a stream and returns what CUDA says of that. All pointers are to
 * device memory. Sums are in f32. Weights count as exactly what lib/quant.c decodes them to. */
#ifndef CUDA_KERNELS_H
#define CUDA_KERNELS_H
#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
extern "C" {
#include "../quant.h"
}

/* A matrix as the file has it (docs/format.md). */
struct device_matrix {
    const uint8_t *data;
    size_t strip_bytes;
    int rows, columns, strips;
    uint32_t kind;         // LLAMA_F32, F16, BF16, Q8, Q4 or Q4E
    bool rotated;          // q8r or q4r: its blocks meet rotated inputs
    const float *bias;     // (rows) or NULL
    float scale;           // f32 and bf16: the power of two that their halves are scaled by
};

/* y = w x + bias, for up to three matrices of one kind, all rotated or none, that share their
 * input. */
enum after { STORE, ADD, SWIGLU };
struct target {
    device_matrix w;
    float *y;              // (n, stride)
    int stride;
};
struct product {
    int n_targets;
    target targets[3];
    after then;            // ADD: y += instead; SWIGLU: y[0] = silu(w[0] x) * (w[1] x)
};

/* Rows to multiply with. NORM (columns): they are normed first, x * norm / rms(x). */
struct vectors {
    const float *x;        // (, stride)
    int stride, n;
    const int32_t *rows;   // (n) which rows of x they are; NULL: the first n
    const float *norm;     // or NULL
    float eps;
};

/* Rotated inputs (lib/quant.h) are 8 times smaller in halves, which cannot overflow then; the
 * products make up for it. */
constexpr float ROTATED_HALVES = ROTATED_INPUT / 8, ROTATED_UNSCALE = 8;

/* Rows made ready for the matrix units: halves, each row scaled by a power of two. SPLIT: row 2 i
 * is row i and row 2 i + 1 what its rounding lost, so that 22 bits of it count. */
struct halves {
    uint16_t *x;           // (n or 2 n, stride) zeros from COLUMNS on; a multiple of 16 bytes
    float *unscale;        // (n) what a product is multiplied with in the end
    int stride, n;
    bool split, rotated;
};

constexpr int GEMV_ROWS = 4;    // as many x pass through the matrix units at once, split
constexpr int HALVES_UNIT = 64; // their stride is a multiple of it

/* A few rows, N <= GEMV_ROWS, which count with 22 bits. Reads each weight once: the limit is
 * memory's bandwidth. */
cudaError_t launch_gemv(const product &p, const vectors &x, int processors, cudaStream_t stream);
/* Up to 16 columns of prepared halves (8 of split ones), the same way. */
cudaError_t launch_gemv_ready(const product &p, const halves &x, int processors,
                              cudaStream_t stream);
/* Any number of prepared rows. The limit is the matrix units' rate. */
cudaError_t launch_gemm(const product &p, const halves &x, cudaStream_t stream);
cudaError_t launch_prepare(const vectors &x, int columns, const halves &to, cudaStream_t stream);

// ---- one row at a time

/* x (n, dim) = rows of the table that TOKENS (n) name, to the last bit as lib/quant.c has them. */
cudaError_t launch_embed(const device_matrix &table, const int32_t *tokens, int n, float *x,
                         cudaStream_t stream);
/* gate (n) = silu(gate) up, where the two matrices could not share a launch. */
cudaError_t launch_swiglu(float *gate, const float *up, size_t n, cudaStream_t stream);
/* to (n, dim) = the rows ROWS (n) of x, normed if NORM (dim) is not NULL. */
cudaError_t launch_gather(const vectors &x, int dim, float *to, cudaStream_t stream);

// ---- keys and values, in pages (kv.cuh)

struct kv_shape { uint32_t kind; int n_layers, n_kv_heads, head_dim; };

/* Rows of a batch: where each stands, and its sequence's pages. */
struct batch_rows {
    int n;
    const int32_t *positions;  // (n)
    const int32_t *tables;     // (n) where in PAGES its sequence's begin
    void *const *pages;        // page of position p: pages[table + p / PAGE_POSITIONS]
    const float *cos, *sin;    // (n, head_dim / 2)
};

/* q, k: pairs turned, q scaled by 1 / sqrt(head_dim), in q8 both by a Hadamard matrix; k and v
 * go into their pages, rounded as cpu/pages.c does. q (n, n_heads, head_dim), k and v
 * (n, n_kv_heads, head_dim). */
cudaError_t launch_rope_store(const kv_shape &kv, int layer, const batch_rows &rows, float *q,
                              const float *k, const float *v, int n_heads, cudaStream_t stream);
/* Positions [first + count, length + count) of the pages FROM move to [first, length) of TO, as
 * cpu/pages.c slides them; cos, sin (head_dim / 2) turn a key back. */
cudaError_t launch_slide(const kv_shape &kv, void *const *from, void *const *to, int first,
                         int count, int length, const float *cos, const float *sin,
                         cudaStream_t stream);
/* Positions [first, first + n), n <= PAGE_POSITIONS and all in PAGE, to or from llama.h's plain
 * layout. */
cudaError_t launch_copy_page(const kv_shape &kv, void *page, int first, int n, uint8_t *plain,
                             bool read, cudaStream_t stream);

// ---- attention

/* Up to eight queries, (row, head of a kv head's group) in this order, of rows that follow each
 * other in one sequence: QUERY is the first's number counted from row FIRST. */
struct attend_item { int first, n, query; };

/* out (n, n_heads, head_dim) from q as launch_rope_store leaves it. Each item's positions are
 * shared out over SPLITS blocks of PAGES_A_SPLIT pages, whose results wait in PARTIAL
 * (items, n_kv_heads, splits, 8, head_dim + 2) and are joined. Splits that lie beyond an item's
 * positions do nothing, so one launch serves any length up to splits * pages_a_split pages. */
struct attention {
    kv_shape kv;
    int layer, n_heads;
    batch_rows rows;
    const float *q;
    float *out;
    const attend_item *items;
    int n_items, splits, pages_a_split;
    float *partial;
};
/* Whether launch_attend can: f16 or q8 pages, heads of 64 or 128. */
bool attend_fits(const kv_shape &kv);
cudaError_t launch_attend(const attention &a, cudaStream_t stream);
/* The same for every shape and kind; looks at neither items nor splits. */
cudaError_t launch_attend_any(const attention &a, cudaStream_t stream);

// ---- sampling

/* What lib/sampler.h's sampler_pick is asked for, without typical_p and mirostat. */
struct choice {
    const float *logits;   // (n)
    int n;
    const int32_t *bias_tokens, *seen;
    const float *bias_values;
    int n_bias, n_seen, n_said;
    float repetition, presence, frequency, temperature, top_p;
    double min_p, random;  // min_p as the float that it was
    int top_k;
    float *work;           // (n)
    double *weights;       // (n)
    int *counts;           // (n)
    int32_t *token;        // -1: the logits allow no choice
};
cudaError_t launch_sample(const choice &c, cudaStream_t stream);
#endif
