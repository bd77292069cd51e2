/* pages.cu: keys and values go into pages and come out of them again, turned by their positions
 * (arXiv:2104.09864) or, where a sequence slides, back again. Twin of cpu/pages.c.
 *
 * A block works on one head at a time, in shared memory. These kernels move little: a row's
 * queries, keys and values, against the megabytes of weights that made them. */
#include "kv.cuh"

namespace {

constexpr int THREADS = 64;

/* Pairs (2i, 2i + 1) of x (dim) turn by angle i. Ends with a barrier, as all here do. */
__device__ void turn(float *x, const float *cos, const float *sin, int dim) {
    for (int i = (int)threadIdx.x; i < dim / 2; i += THREADS) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = a * sin[i] + b * cos[i];
    }
    __syncthreads();
}

/* x (dim) times a Hadamard matrix, in blocks of the largest power of two that divides dim. */
__device__ void hadamard(float *x, int dim) {
    for (int h = 1; dim % (2 * h) == 0; h *= 2) {
        for (int i = (int)threadIdx.x; i < dim / 2; i += THREADS) {
            const int j = i / h * 2 * h + i % h;
            const float a = x[j], b = x[j + h];
            x[j] = a + b;
            x[j + h] = a - b;
        }
        __syncthreads();
    }
}

/* cpu/kernels.h's to_q8: the scale, and by what elements are multiplied before rounding. */
struct q8_scale { float scale, by; };
__device__ q8_scale fit_q8(const float *x, int dim, float *partial) {
    float largest = 0;
    int infinite = 0;
    for (int i = (int)threadIdx.x; i < dim; i += THREADS) {
        largest = fmaxf(largest, fabsf(x[i]));
        infinite |= !(fabsf(x[i]) <= 0x1.fffffep127f);
    }
    largest = warp_max(infinite ? INFINITY : largest);
    if (!lane_number()) partial[warp_number()] = largest;
    __syncthreads();
    for (int w = 0; w < THREADS / WARP; w++) largest = fmaxf(largest, partial[w]);
    __syncthreads();
    if (largest == INFINITY) return {NAN, 0};
    return largest < 0x1p-100f ? q8_scale{0, 0} : q8_scale{largest / 127, 127 / largest};
}

/* x (dim) becomes SLOT's key or value. */
template <uint32_t KV>
__device__ void put(const kv_shape &kv, void *page, int layer, int value, int head, int slot,
                    const float *x, float *partial) {
    auto *to = head_in<KV>(kv, page, layer, value, head);
    q8_scale q = {1, 1};
    if (KV == LLAMA_Q8) {
        q = fit_q8(x, kv.head_dim, partial);
        if (!threadIdx.x) scales_in(kv, page, layer, value, head)[slot] = q.scale;
    }
    for (int i = (int)threadIdx.x; i < kv.head_dim; i += THREADS)
        to[element_at(kv, value, slot, i)] =
            element<KV>::put(KV == LLAMA_Q8 ? (q.by == 0 ? 0 : x[i] * q.by) : x[i]);
}

struct storing {
    kv_shape kv;
    int layer, n_heads;
    batch_rows rows;
    float *q;
    const float *k, *v;
};

/* Blocks are (row, head): the query heads, then the keys', then the values'. */
template <uint32_t KV> __global__ void rope_store(storing s) {
    const kv_shape &kv = s.kv;
    const int dim = kv.head_dim, row = (int)blockIdx.x, item = (int)blockIdx.y - s.n_heads;
    const int value = item >= kv.n_kv_heads, head = item - (value ? kv.n_kv_heads : 0);
    float *x = shared_memory<float>(), *partial = x + dim;
    float *q = s.q + ((size_t)row * s.n_heads + blockIdx.y) * dim;
    const float *from = item < 0 ? q
                                 : (value ? s.v : s.k) + ((size_t)row * kv.n_kv_heads + head) * dim;
    for (int i = (int)threadIdx.x; i < dim; i += THREADS) x[i] = from[i];
    __syncthreads();
    if (!value) {
        turn(x, s.rows.cos + (size_t)row * (dim / 2), s.rows.sin + (size_t)row * (dim / 2), dim);
        if (KV == LLAMA_Q8) hadamard(x, dim);
    }
    if (item < 0) { // softmax(q k / sqrt(dim)); two Hadamard matrices make a product larger
        const float larger = KV == LLAMA_Q8 ? (float)(dim & -dim) : 1;
        const float scale = 1 / sqrtf((float)dim) / larger;
        for (int i = (int)threadIdx.x; i < dim; i += THREADS) q[i] = x[i] * scale;
        return;
    }
    const int position = s.rows.positions[row];
    void *page = s.rows.pages[s.rows.tables[row] + position / PAGE_POSITIONS];
    put<KV>(kv, page, s.layer, value, head, position % PAGE_POSITIONS, x, partial);
}

// ---- sliding

struct sliding {
    kv_shape kv;
    void *const *from, *const *to;
    int first, count, length;
    const float *cos, *sin;
};

/* Blocks are (kv head, layer). Positions go upwards, so that a page that stays in place is read
 * ahead of where it is written. */
template <uint32_t KV> __global__ void slide(sliding s) {
    const kv_shape &kv = s.kv;
    const int dim = kv.head_dim, head = (int)blockIdx.x, layer = (int)blockIdx.y;
    float *x = shared_memory<float>(), *partial = x + dim;
    for (int p = s.first; p < s.length; p++) {
        const int q = p + s.count, old = q % PAGE_POSITIONS, slot = p % PAGE_POSITIONS;
        void *from = s.from[q / PAGE_POSITIONS], *to = s.to[p / PAGE_POSITIONS];
        const auto *key = head_in<KV>(kv, from, layer, 0, head);
        const auto *value = head_in<KV>(kv, from, layer, 1, head);
        auto *moved = head_in<KV>(kv, to, layer, 1, head);
        const float scale = KV == LLAMA_Q8 ? scales_in(kv, from, layer, 0, head)[old] : 1;
        for (int i = (int)threadIdx.x; i < dim; i += THREADS) {
            x[i] = element<KV>::get(key[element_at(kv, 0, old, i)]) * scale;
            moved[element_at(kv, 1, slot, i)] = value[element_at(kv, 1, old, i)];
        }
        if (KV == LLAMA_Q8 && !threadIdx.x)
            scales_in(kv, to, layer, 1, head)[slot] = scales_in(kv, from, layer, 1, head)[old];
        __syncthreads();
        if (KV == LLAMA_Q8) { // turned twice it is the key again, times the matrix's size
            hadamard(x, dim);
            for (int i = (int)threadIdx.x; i < dim; i += THREADS) x[i] /= (float)(dim & -dim);
            __syncthreads();
        }
        turn(x, s.cos, s.sin, dim);
        if (KV == LLAMA_Q8) hadamard(x, dim);
        put<KV>(kv, to, layer, 0, head, slot, x, partial);
        __syncthreads();
    }
}

// ---- the plain layout

struct copying {
    kv_shape kv;
    void *page;
    int first;
    uint8_t *plain; // of position FIRST
    bool read;
};

/* Blocks are (position, layer, kv head and then value). */
template <uint32_t KV> __global__ void copy_page(copying c) {
    using type = typename element<KV>::type;
    const kv_shape &kv = c.kv;
    const int dim = kv.head_dim, slot = (c.first + (int)blockIdx.x) % PAGE_POSITIONS;
    const int layer = (int)blockIdx.y, value = (int)blockIdx.z / kv.n_kv_heads;
    const int head = (int)blockIdx.z % kv.n_kv_heads;
    const size_t row = dim * sizeof(type) + (KV == LLAMA_Q8 ? sizeof(float) : 0);
    const size_t number = ((blockIdx.x * (size_t)kv.n_layers + layer) * 2 + value) * kv.n_kv_heads;
    uint8_t *plain = c.plain + (number + head) * row;
    type *page = head_in<KV>(kv, c.page, layer, value, head);
    for (int i = (int)threadIdx.x; i < dim; i += THREADS) {
        type *one = page + element_at(kv, value, slot, i);
        if (c.read) memcpy(plain + i * sizeof(type), one, sizeof(type));
        else memcpy(one, plain + i * sizeof(type), sizeof(type));
    }
    if (KV != LLAMA_Q8 || threadIdx.x) return;
    float *scale = scales_in(kv, c.page, layer, value, head) + slot;
    if (c.read) memcpy(plain + dim * sizeof(type), scale, sizeof *scale);
    else memcpy(scale, plain + dim * sizeof(type), sizeof *scale);
}

/* KERNEL for the kind of the pages, with room for a head in shared memory. */
template <class JOB>
cudaError_t launch(const JOB &job, dim3 grid, void (*f32)(JOB), void (*f16)(JOB),
                   void (*q8)(JOB), cudaStream_t stream) {
    cudaLaunchConfig_t how = {};
    how.gridDim = grid;
    how.blockDim = dim3(THREADS);
    how.dynamicSmemBytes = ((size_t)job.kv.head_dim + THREADS / WARP) * sizeof(float);
    how.stream = stream;
    return cudaLaunchKernelEx(&how, job.kv.kind == LLAMA_F32   ? f32
                                    : job.kv.kind == LLAMA_F16 ? f16
                                                               : q8, job);
}

} // namespace

cudaError_t launch_rope_store(const kv_shape &kv, int layer, const batch_rows &rows, float *q,
                              const float *k, const float *v, int n_heads, cudaStream_t stream) {
    const storing job = {kv, layer, n_heads, rows, q, k, v};
    return launch(job, dim3((unsigned)rows.n, (unsigned)(n_heads + 2 * kv.n_kv_heads)),
                  rope_store<LLAMA_F32>, rope_store<LLAMA_F16>, rope_store<LLAMA_Q8>, stream);
}

cudaError_t launch_slide(const kv_shape &kv, void *const *from, void *const *to, int first,
                         int count, int length, const float *cos, const float *sin,
                         cudaStream_t stream) {
    const sliding job = {kv, from, to, first, count, length, cos, sin};
    return launch(job, dim3((unsigned)kv.n_kv_heads, (unsigned)kv.n_layers), slide<LLAMA_F32>,
                  slide<LLAMA_F16>, slide<LLAMA_Q8>, stream);
}

cudaError_t launch_copy_page(const kv_shape &kv, void *page, int first, int n, uint8_t *plain,
                             bool read, cudaStream_t stream) {
    const copying job = {kv, page, first, plain, read};
    return launch(job, dim3((unsigned)n, (unsigned)kv.n_layers, 2 * (unsigned)kv.n_kv_heads),
                  copy_page<LLAMA_F32>, copy_page<LLAMA_F16>, copy_page<LLAMA_Q8>, stream);
}
