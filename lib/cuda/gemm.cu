/* gemm.cu: matrices times many rows, as prompts and large batches need them, and how those rows
 * are made ready.
 *
 * A block makes 128 rows of the matrix times 128 of x. Its eight warps stand four by two: each
 * holds 32 by 64 sums in registers. Weights go straight from memory into the lane that unpacks
 * them (tiles.cuh), the next ones while the present ones are multiplied; x comes by way of shared
 * memory, two pieces of 64 columns in turn. */
#include "kernels.h"
#include "tiles.cuh"

namespace {

constexpr int BLOCK_ROWS = 128, BLOCK_COLUMNS = 128, WARPS = 8; // columns: rows of x
constexpr int STRIPS = BLOCK_ROWS / TILE_ROWS;
constexpr int N = 8;                                   // products of 8 columns a warp
constexpr int PIECE = HALVES_UNIT, STRIDE = PIECE + 16; // 32 bytes off: no bank met twice
constexpr int SHARED = 2 * BLOCK_COLUMNS * STRIDE * 2;

struct job {
    product p;
    halves x;
    int columns, columns_of_x, tiles; // of the matrix; rows of x in its halves; of 32 columns
};

/* Strip NUMBER of the matrices laid end to end; with SWIGLU of both in turn. */
__device__ const uint8_t *find_strip(const product &p, int number, int *target, int *row) {
    *target = 0;
    if (p.then == SWIGLU) *target = number % 2, number /= 2;
    else while (*target < p.n_targets - 1 && number >= p.targets[*target].w.strips)
        number -= p.targets[(*target)++].w.strips;
    const device_matrix &w = p.targets[*target].w;
    *row = number * TILE_ROWS;
    return number < w.strips ? w.data + number * w.strip_bytes : nullptr;
}

/* Columns [first, first + PIECE) of the block's rows of x begin to come. */
__device__ void fetch(const job &j, int first, uint16_t *to) {
    constexpr int EACH = PIECE / 8; // copies of 16 bytes a row
    for (int i = (int)threadIdx.x; i < BLOCK_COLUMNS * EACH; i += WARPS * WARP) {
        const int row = i / EACH, c = i % EACH * 8, of = (int)blockIdx.y * BLOCK_COLUMNS + row;
        const bool there = of < j.columns_of_x;
        copy16(to + row * STRIDE + c, j.x.x + (size_t)(there ? of : 0) * j.x.stride + first + c,
               there);
    }
    commit_copies();
}

/* The lane's four rows, for one row of x, end here. */
__device__ void finish(const job &j, int target, int row, int column, float v[4]) {
    const int side = lane_number() / 16; // which strip of the two
    const struct target &to = j.p.targets[target];
    if (column < j.x.n)
        for (int i = 0; i < 4; i++) {
            v[i] *= j.x.unscale[column] / to.w.scale;
            if (to.w.bias && row + i < to.w.rows) v[i] += to.w.bias[row + i];
        }
    if (j.p.then == SWIGLU) // the other strip is the other matrix
        for (int i = 0; i < 4; i++) {
            const float up = __shfl_xor_sync(ALL_LANES, v[i], 16);
            v[i] = v[i] / (1 + expf(-v[i])) * up;
        }
    if (column >= j.x.n || (j.p.then == SWIGLU && side)) return;
    float *y = to.y + (size_t)column * to.stride + row;
    for (int i = 0; i < 4; i++)
        if (row + i < to.w.rows) y[i] = j.p.then == ADD ? y[i] + v[i] : v[i];
}

template <uint32_t KIND, bool SPLIT> __global__ void __launch_bounds__(256) gemm(job j) {
    using weights = tile<KIND>;
    uint16_t *x = shared_memory<uint16_t>();
    const seat at;
    const int warp = warp_number(), across = warp % 2 * (8 * N);
    int target, row;
    const uint8_t *strip = find_strip(
        j.p, (int)blockIdx.x * STRIPS + warp / 2 * 2 + at.g / 4, &target, &row);
    const float scale = j.p.targets[target].w.scale;

    float acc[2][N][4] = {};
    weights w;
    w.load(strip, 0, j.columns);
    fetch(j, 0, x);
    for (int first = 0; first < j.tiles; first += PIECE / GROUP) {
        const int turn = first / (PIECE / GROUP) % 2;
        if (first + PIECE / GROUP < j.tiles) {
            fetch(j, (first + PIECE / GROUP) * GROUP, x + (1 - turn) * BLOCK_COLUMNS * STRIDE);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        for (int i = first; i < min(first + PIECE / GROUP, j.tiles); i++) {
            const weights now = w;
            if (i + 1 < j.tiles) w.load(strip, i + 1, j.columns);
            const uint16_t *from = x + (turn * BLOCK_COLUMNS + across + at.g) * STRIDE +
                                   (i - first) * GROUP + 4 * at.t;
            multiply<KIND, N>(now, scale, [&](int n, uint32_t b[2][2]) {
                for (int s = 0; s < 2; s++) {
                    const uint2 v = *(const uint2 *)(from + 8 * n * STRIDE + 16 * s);
                    b[s][0] = v.x;
                    b[s][1] = v.y;
                }
            }, acc);
        }
        __syncthreads();
    }
    row += 4 * at.quad;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int column = (int)blockIdx.y * BLOCK_COLUMNS + across + 8 * n + 2 * at.t;
        float v[2][4];
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < 2; e++) v[e][i] = acc[i / 2][n][i % 2 * 2 + e];
        if (SPLIT) { // both parts of one row lie side by side
            for (int i = 0; i < 4; i++) v[0][i] += v[1][i];
            finish(j, target, row, column / 2, v[0]);
        } else {
            finish(j, target, row, column, v[0]);
            finish(j, target, row, column + 1, v[1]);
        }
    }
}

template <uint32_t KIND> cudaError_t launch(const cudaLaunchConfig_t *how, const job &j) {
    if (j.x.split) return cudaLaunchKernelEx(how, gemm<KIND, true>, j);
    return cudaLaunchKernelEx(how, gemm<KIND, false>, j);
}

// ---- making x ready

struct preparing {
    vectors x;
    halves to;
    int columns;
};

/* A block a row: reads it twice, the second time most likely from a cache. */
__global__ void prepare(preparing p) {
    float *partial = shared_memory<float>(); // (warps, 2)
    const int i = (int)blockIdx.x, warps = (int)blockDim.x / WARP;
    const float *x = p.x.x + (size_t)(p.x.rows ? p.x.rows[i] : i) * p.x.stride;
    float squares = 0, largest = 0;
    for (int c = (int)threadIdx.x; c < p.columns; c += (int)blockDim.x) {
        squares += x[c] * x[c];
        largest = fmaxf(largest, fabsf(p.x.norm ? x[c] * p.x.norm[c] : x[c]));
    }
    squares = warp_sum(squares);
    largest = warp_max(largest);
    if (!lane_number()) {
        partial[2 * warp_number()] = squares;
        partial[2 * warp_number() + 1] = largest;
    }
    __syncthreads();
    squares = largest = 0;
    for (int w = 0; w < warps; w++) {
        squares += partial[2 * w];
        largest = fmaxf(largest, partial[2 * w + 1]);
    }
    const float norm = p.x.norm ? 1 / sqrtf(squares / (float)p.columns + p.x.eps) : 1;
    const float scale = half_scale(largest * norm);
    if (!threadIdx.x) p.to.unscale[i] = (p.to.rotated ? ROTATED_UNSCALE : 1) / scale;
    uint16_t *to = p.to.x + (size_t)i * (p.to.split ? 2 : 1) * p.to.stride;
    for (int c = 2 * (int)threadIdx.x; c < p.to.stride; c += 2 * (int)blockDim.x) {
        float v[2];
        for (int e = 0; e < 2; e++) {
            v[e] = c + e < p.columns ? x[c + e] * norm : 0;
            if (p.x.norm && c + e < p.columns) v[e] *= p.x.norm[c + e];
            v[e] *= scale;
        }
        if (p.to.rotated) rotate_pairs(v, ROTATED_HALVES);
        uint32_t coarse, fine;
        split_halves(v[0], v[1], &coarse, &fine);
        *(uint32_t *)(to + c) = coarse;
        if (p.to.split) *(uint32_t *)(to + p.to.stride + c) = fine;
    }
}

} // namespace

cudaError_t launch_gemm(const product &p, const halves &x, cudaStream_t stream) {
    const int columns = p.targets[0].w.columns;
    const job j = {p, x, columns, x.split ? 2 * x.n : x.n, (columns + GROUP - 1) / GROUP};
    int strips = 0;
    for (int i = 0; i < p.n_targets; i++) strips += p.targets[i].w.strips;
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)((strips + STRIPS - 1) / STRIPS),
                       (unsigned)((j.columns_of_x + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS));
    how.blockDim = dim3(WARPS * WARP);
    how.dynamicSmemBytes = SHARED;
    how.stream = stream;
    switch (p.targets[0].w.kind) {
    case LLAMA_F32: return launch<LLAMA_F32>(&how, j);
    case LLAMA_F16: return launch<LLAMA_F16>(&how, j);
    case LLAMA_BF16: return launch<LLAMA_BF16>(&how, j);
    case LLAMA_Q8: return launch<LLAMA_Q8>(&how, j);
    case LLAMA_Q4: return launch<LLAMA_Q4>(&how, j);
    case LLAMA_Q4E: return launch<LLAMA_Q4E>(&how, j);
    default: return cudaErrorInvalidValue;
    }
}

cudaError_t launch_prepare(const vectors &x, int columns, const halves &to, cudaStream_t stream) {
    const preparing p = {x, to, columns};
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)x.n);
    how.blockDim = dim3(columns < 1024 ? 64 : 256);
    how.dynamicSmemBytes = how.blockDim.x / WARP * 2 * sizeof(float);
    how.stream = stream;
    return cudaLaunchKernelEx(&how, prepare, p);
}
