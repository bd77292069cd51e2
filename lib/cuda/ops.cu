/* ops.cu: what is done to one row at a time and moves little: rows of the embedding table, rows
 * gathered and normed for whoever asked for them. */
#include "device.cuh"
#include "kernels.h"
extern "C" {
#include "../llama.h"
#include "../quant.h"
}

namespace {

constexpr int THREADS = 256;

/* The levels of q4 and q4e, as in lib/quant.c. */
__device__ float q4_value(uint32_t kind, uint16_t d, int code) {
    const int uneven[16] = {-127, -101, -80, -63, -48, -34, -22, -10,
                            2,    13,   26,  38,  53,  68,  85,  107};
    const int level = kind == LLAMA_Q4E ? 16 * code - 120 : uneven[code];
    const int shift = 2 * (d & Q4_SHIFT_BITS) + Q4_LEAST_SHIFT;
    return half_to_float((uint16_t)(d & Q4_SCALE_BITS)) / Q4_SCALE * (float)(level + shift);
}

/* weight(row, c) of a matrix, as lib/quant.c decodes it. */
__device__ float weight(const device_matrix &m, int row, int c) {
    const uint32_t kind = m.kind;
    const uint8_t *strip = m.data + (size_t)(row / TILE_ROWS) * m.strip_bytes;
    const int r = row % TILE_ROWS, in = c % GROUP;
    if (kind == LLAMA_F32) return ((const float *)strip)[(size_t)c * TILE_ROWS + r];
    if (kind == LLAMA_F16 || kind == LLAMA_BF16) {
        const uint16_t bits = ((const uint16_t *)strip)[(size_t)c * TILE_ROWS + r];
        return kind == LLAMA_F16 ? half_to_float(bits) : __uint_as_float((unsigned)bits << 16);
    }
    if (kind == LLAMA_Q8) {
        const block_q8 *b = (const block_q8 *)strip + c / GROUP;
        return half_to_float(b->d[r]) * (float)b->q[in / 4][r][in % 4];
    }
    const block_q4 *b = (const block_q4 *)strip + c / GROUP;
    const int byte = b->q[in % 16 / 4][r][in % 4];
    return q4_value(kind, b->d[r], in < 16 ? byte & 15 : byte >> 4);
}

struct embedding {
    device_matrix table;
    const int32_t *tokens;
    float *x;
};

__global__ void embed(embedding e) {
    const int i = (int)blockIdx.x, c = (int)(blockIdx.y * THREADS + threadIdx.x);
    if (c >= e.table.columns) return;
    float w = weight(e.table, e.tokens[i], c);
    if (e.table.rotated) { // a warp has a group
        for (int h = 1; h < GROUP; h *= 2) w = butterfly(ALL_LANES, w, h);
        w *= ROTATED_INPUT;
    }
    e.x[(size_t)i * e.table.columns + c] = w;
}

__global__ void swiglu(float *gate, const float *up, size_t n) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

struct gathering {
    vectors x;
    int dim;
    float *to;
};

__global__ void gather(gathering a) {
    float *partial = shared_memory<float>();
    const int i = (int)blockIdx.x;
    const float *x = a.x.x + (size_t)(a.x.rows ? a.x.rows[i] : i) * a.x.stride;
    float *to = a.to + (size_t)i * a.dim, squares = 0;
    for (int c = (int)threadIdx.x; c < a.dim; c += THREADS) squares += x[c] * x[c];
    squares = warp_sum(squares);
    if (!lane_number()) partial[warp_number()] = squares;
    __syncthreads();
    squares = 0;
    for (int w = 0; w < THREADS / WARP; w++) squares += partial[w];
    const float norm = 1 / sqrtf(squares / (float)a.dim + a.x.eps);
    for (int c = (int)threadIdx.x; c < a.dim; c += THREADS)
        to[c] = a.x.norm ? a.x.norm[c] * (x[c] * norm) : x[c];
}

} // namespace

cudaError_t launch_embed(const device_matrix &table, const int32_t *tokens, int n, float *x,
                         cudaStream_t stream) {
    const embedding job = {table, tokens, x};
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)n, (unsigned)((table.columns + THREADS - 1) / THREADS));
    how.blockDim = dim3(THREADS);
    how.stream = stream;
    return cudaLaunchKernelEx(&how, embed, job);
}

cudaError_t launch_swiglu(float *gate, const float *up, size_t n, cudaStream_t stream) {
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)((n + THREADS - 1) / THREADS));
    how.blockDim = dim3(THREADS);
    how.stream = stream;
    return cudaLaunchKernelEx(&how, swiglu, gate, up, n);
}

cudaError_t launch_gather(const vectors &x, int dim, float *to, cudaStream_t stream) {
    const gathering job = {x, dim, to};
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)x.n);
    how.blockDim = dim3(THREADS);
    how.dynamicSmemBytes = THREADS / WARP * sizeof(float);
    how.stream = stream;
    return cudaLaunchKernelEx(&how, gather, job);
}
