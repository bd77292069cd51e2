/* gemv.cu: matrices times a few rows, as decoding needs them: each weight is read once, used at
 * once and never stored in another form.
 *
 * A block owns 32 rows of the matrix; its warps share their columns out, tile by tile, and add up
 * what they have at the end. The matrix units do the arithmetic although most of their width stays
 * empty: the point is that a weight costs two and a half instructions a lane, most of them to
 * unpack it, which is less than a GPU has time for while its memory delivers the next.
 * Rows of x stand in shared memory as halves, each in two parts, for the width is there. */
#include "kernels.h"
#include "tiles.cuh"

namespace {

constexpr int ROWS = 32;              // of the matrix, a block
constexpr int SHARED_BYTES = 28 << 10; // for x; a longer one goes through in pieces
constexpr int MOST_WARPS = 8;          // so that three blocks share a processor

struct job {
    product p;
    vectors raw;
    halves ready;
    int columns, n, columns_of_x; // of the matrix; rows of x; what these take, 2 n or n
    int tiles, piece;             // of 32 columns; tiles of x in shared memory at once
    bool rotated;
};

/* One strip of a block's two, and where its rows go. */
struct place { const uint8_t *strip; int target, row; }; // strip NULL: there is none

/* The block's two are neighbours, or with SWIGLU one of each matrix. */
__device__ place find_strip(const product &p, int block, int side) {
    int number = p.then == SWIGLU ? block : 2 * block + side, target = 0;
    if (p.then == SWIGLU) target = side;
    else while (target < p.n_targets - 1 && number >= p.targets[target].w.strips)
        number -= p.targets[target++].w.strips;
    const device_matrix &w = p.targets[target].w;
    return {number < w.strips ? w.data + number * w.strip_bytes : nullptr, target,
            number * TILE_ROWS};
}

/* What staging needs to know of each row: 1 / rms and a power of two. */
struct measure { float norm, scale; };

/* Reads the rows of x once: sum of squares and largest element. Ends with a barrier. */
__device__ void measure_rows(const job &j, float *partial, measure *of) {
    const int warps = (int)blockDim.x / WARP, columns = j.columns;
    for (int i = 0; i < j.n; i++) {
        const float *x = j.raw.x + (size_t)(j.raw.rows ? j.raw.rows[i] : i) * j.raw.stride;
        float squares = 0, largest = 0;
        for (int c = (int)threadIdx.x; c < columns; c += (int)blockDim.x) {
            squares += x[c] * x[c];
            largest = fmaxf(largest, fabsf(j.raw.norm ? x[c] * j.raw.norm[c] : x[c]));
        }
        squares = warp_sum(squares);
        largest = warp_max(largest);
        if (!lane_number()) {
            partial[(i * MOST_WARPS + warp_number()) * 2] = squares;
            partial[(i * MOST_WARPS + warp_number()) * 2 + 1] = largest;
        }
    }
    __syncthreads();
    if ((int)threadIdx.x < j.n) {
        const float *mine = partial + threadIdx.x * MOST_WARPS * 2;
        float squares = 0, largest = 0;
        for (int w = 0; w < warps; w++) {
            squares += mine[2 * w];
            largest = fmaxf(largest, mine[2 * w + 1]);
        }
        const float norm = j.raw.norm ? 1 / sqrtf(squares / (float)columns + j.raw.eps) : 1;
        of[threadIdx.x] = {norm, half_scale(largest * norm)};
    }
    __syncthreads();
}

/* Columns [first, first + n) of x go to shared memory, (columns_of_x, stride): rows of f32 normed,
 * scaled and split; or prepared ones as they are. */
template <bool RAW>
__device__ void stage(const job &j, int first, int n, const measure *of, uint16_t *to, int stride) {
    for (int i = 0; i < (RAW ? j.n : j.columns_of_x); i++) {
        if (!RAW) { // padded with zeros to whole pieces of 8
            const uint16_t *x = j.ready.x + (size_t)i * j.ready.stride + first;
            for (int c = 8 * (int)threadIdx.x; c < n; c += 8 * (int)blockDim.x)
                *(uint4 *)(to + i * stride + c) = *(const uint4 *)(x + c);
            continue;
        }
        const float *x = j.raw.x + (size_t)(j.raw.rows ? j.raw.rows[i] : i) * j.raw.stride;
        const float *norm = j.raw.norm;
        for (int c = 2 * (int)threadIdx.x; c < n; c += 2 * (int)blockDim.x) {
            float v[2];
            for (int e = 0; e < 2; e++) {
                const int at = first + c + e;
                v[e] = at < j.columns ? x[at] * of[i].norm : 0;
                if (norm && at < j.columns) v[e] *= norm[at];
                v[e] *= of[i].scale;
            }
            if (j.rotated) rotate_pairs(v, ROTATED_HALVES);
            uint32_t coarse, fine;
            split_halves(v[0], v[1], &coarse, &fine);
            *(uint32_t *)(to + 2 * i * stride + c) = coarse;
            *(uint32_t *)(to + (2 * i + 1) * stride + c) = fine;
        }
    }
}

/* Row R of the block times row I of x, from what its warps have found. */
__device__ float total(const job &j, const place &at, const float *sums, int i, int r,
                       float unscale) {
    const int warps = (int)blockDim.x / WARP, parts = j.columns_of_x / j.n;
    const device_matrix &w = j.p.targets[at.target].w;
    const int row = at.row + r % TILE_ROWS;
    float sum = 0;
    for (int k = 0; k < warps; k++)
        for (int part = 0; part < parts; part++)
            sum += sums[(k * j.columns_of_x + i * parts + part) * ROWS + r];
    sum *= unscale / w.scale;
    return w.bias && row < w.rows ? sum + w.bias[row] : sum;
}

/* SUMS (warps, columns_of_x, ROWS) become y. */
__device__ void finish(const job &j, const float *sums, const measure *of) {
    const int rows = j.p.then == SWIGLU ? TILE_ROWS : ROWS;
    for (int item = (int)threadIdx.x; item < j.n * rows; item += (int)blockDim.x) {
        const int i = item / rows, r = item % rows;
        const place at = find_strip(j.p, (int)blockIdx.x, r / TILE_ROWS);
        const target &to = j.p.targets[at.target];
        const int row = at.row + r % TILE_ROWS;
        if (!at.strip || row >= to.w.rows) continue;
        const float mine = j.rotated ? ROTATED_UNSCALE : 1;
        const float unscale = of ? mine / of[i].scale : j.ready.unscale[i];
        const float v = total(j, at, sums, i, r, unscale);
        float *y = to.y + (size_t)i * to.stride + row;
        if (j.p.then == SWIGLU) {
            const place other = find_strip(j.p, (int)blockIdx.x, 1);
            *y = v / (1 + expf(-v)) * total(j, other, sums, i, r + TILE_ROWS, unscale);
        } else {
            *y = j.p.then == ADD ? *y + v : v;
        }
    }
}

/* N: products of 8 columns side by side. RAW: x is f32 rows; else prepared halves. */
template <uint32_t KIND, int N, bool RAW>
__global__ void __launch_bounds__(MOST_WARPS *WARP, tile<KIND>::SCALED && N == 1 ? 3 : 1)
gemv(job j) {
    using weights = tile<KIND>;
    constexpr int AHEAD = weights::AHEAD;
    uint16_t *x = shared_memory<uint16_t>();
    const int stride = j.piece * GROUP + 16; // 32 bytes off: eights of bytes meet no bank twice
    float *sums = (float *)(x + j.columns_of_x * stride);
    measure *of = (measure *)(sums + (int)blockDim.x / WARP * j.columns_of_x * ROWS);

    const seat at;
    const int warps = (int)blockDim.x / WARP;
    const place mine = find_strip(j.p, (int)blockIdx.x, at.g / 4);
    const float scale = j.p.targets[mine.target].w.scale;
    float acc[2][N][4] = {};
    weights w[AHEAD];
    for (int first = 0; first < j.tiles; first += j.piece) {
        const int last = min(first + j.piece, j.tiles);
        int next = first + warp_number();
        for (int i = 0; i < AHEAD; i++) // on their way while x is made ready
            if (next + i * warps < last) w[i].load(mine.strip, next + i * warps, j.columns);
        if (RAW && !first) measure_rows(j, sums, of);
        stage<RAW>(j, first * GROUP, (last - first) * GROUP, of, x, stride);
        __syncthreads();
        for (; next < last; next += AHEAD * warps) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int now = next + i * warps, then = now + AHEAD * warps;
                if (now >= last) break;
                multiply<KIND, N>(w[i], scale, [&](int n, uint32_t b[2][2]) {
                    const int row = 8 * n + at.g;
                    const uint16_t *from = x + row * stride + (now - first) * GROUP + 4 * at.t;
                    for (int s = 0; s < 2; s++) {
                        const bool there = row < j.columns_of_x;
                        const uint2 v = there ? *(const uint2 *)(from + 16 * s) : uint2{0, 0};
                        b[s][0] = v.x;
                        b[s][1] = v.y;
                    }
                }, acc);
                if (then < last) w[i].load(mine.strip, then, j.columns);
            }
        }
        __syncthreads();
    }
    for (int n = 0; n < N; n++)
        for (int i = 0; i < 4; i++) { // rows 4 g + i / 2 and two further on
            const int column = 8 * n + 2 * at.t + i % 2;
            if (column >= j.columns_of_x) continue;
            float *to = sums + (warp_number() * j.columns_of_x + column) * ROWS + 4 * at.g + i / 2;
            to[0] = acc[0][n][i];
            to[2] = acc[1][n][i];
        }
    __syncthreads();
    finish(j, sums, RAW ? of : nullptr);
}

template <int N, bool RAW>
cudaError_t launch(job j, int processors, cudaStream_t stream) {
    int strips = 0;
    for (int i = 0; i < j.p.n_targets; i++) strips += j.p.targets[i].w.strips;
    const int blocks = (strips + 1) / 2;
    // as many as keep memory busy, each with a few tiles, and room for their sums in 48 KiB
    int warps = 2;
    while (warps < MOST_WARPS && blocks * warps < 32 * processors && j.tiles >= 4 * warps)
        warps *= 2;
    const int most = SHARED_BYTES / (j.columns_of_x * GROUP * 2);
    const int pieces = (j.tiles + most - 1) / most;
    j.piece = (j.tiles + pieces - 1) / pieces;
    j.piece += j.piece % 2; // a stride of whole 128 bytes and 32
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)blocks);
    how.blockDim = dim3((unsigned)(warps * WARP));
    const int row = (j.piece * GROUP + 16) * (int)sizeof(uint16_t); // and its sums:
    how.dynamicSmemBytes = (size_t)(j.columns_of_x * (row + warps * ROWS * (int)sizeof(float))) +
                           (size_t)j.n * sizeof(measure);
    how.stream = stream;
    switch (j.p.targets[0].w.kind) {
    case LLAMA_F32: return cudaLaunchKernelEx(&how, gemv<LLAMA_F32, N, RAW>, j);
    case LLAMA_F16: return cudaLaunchKernelEx(&how, gemv<LLAMA_F16, N, RAW>, j);
    case LLAMA_BF16: return cudaLaunchKernelEx(&how, gemv<LLAMA_BF16, N, RAW>, j);
    case LLAMA_Q8: return cudaLaunchKernelEx(&how, gemv<LLAMA_Q8, N, RAW>, j);
    case LLAMA_Q4: return cudaLaunchKernelEx(&how, gemv<LLAMA_Q4, N, RAW>, j);
    case LLAMA_Q4E: return cudaLaunchKernelEx(&how, gemv<LLAMA_Q4E, N, RAW>, j);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace

cudaError_t launch_gemv(const product &p, const vectors &x, int processors, cudaStream_t stream) {
    const int columns = p.targets[0].w.columns;
    const job j = {p, x, {}, columns, x.n, 2 * x.n, (columns + GROUP - 1) / GROUP, 0,
                   p.targets[0].w.rotated};
    return x.n <= GEMV_ROWS ? launch<1, true>(j, processors, stream) : cudaErrorInvalidValue;
}

cudaError_t launch_gemv_ready(const product &p, const halves &x, int processors,
                              cudaStream_t stream) {
    const int columns = p.targets[0].w.columns, columns_of_x = x.split ? 2 * x.n : x.n;
    const job j = {p, {}, x, columns, x.n, columns_of_x, (columns + GROUP - 1) / GROUP, 0,
                   false};
    return columns_of_x <= 16 ? launch<2, false>(j, processors, stream) : cudaErrorInvalidValue;
}
