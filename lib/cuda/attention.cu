/* attention.cu: softmax(q k) v over the pages of a sequence, eight queries at a time.
 *
 * Keys and values are read once for all the queries that share them: the heads of a group, and in
 * a prompt several rows. The queries' numbers are halves in two parts, coarse and fine, which
 * stand in rows g and g + 8 of the matrix units' operand; so are the weights that softmax gives.
 * With keys and values that are halves or codes, exactly, products count with 22 bits.
 *
 * A warp takes a page of 32 positions at a time. Lane 4 g + t gets the scores of query g for
 * positions 8t to 8t + 7, which are, without any exchange, its part of the second product's
 * operand: the columns of the first are taken in the order that makes it so. Softmax runs along
 * (arXiv:1805.02867); warps, and then the blocks of a long context, are joined at the end
 * (arXiv:2205.14135, arXiv:2311.01282). */
#include "kv.cuh"

namespace {

constexpr int QUERIES = 8, WARPS = 4;
constexpr int TILES = PAGE_POSITIONS / 8;

/* Eight neighbouring elements as pairs of halves: keys and values are exact in them. */
template <uint32_t KIND> __device__ __forceinline__ void load8(const void *p, uint32_t pairs[4]);
template <> __device__ __forceinline__ void load8<LLAMA_F16>(const void *p, uint32_t pairs[4]) {
    const uint4 v = *(const uint4 *)p;
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
}
template <> __device__ __forceinline__ void load8<LLAMA_Q8>(const void *p, uint32_t pairs[4]) {
    const uint2 v = *(const uint2 *)p;
    const uint32_t u[2] = {v.x ^ 0x80808080, v.y ^ 0x80808080}; // code + 128; less 1152 in a half
    for (int i = 0; i < 4; i++)
        pairs[i] = add_halves(pick_bytes(u[i / 2], 0x64646464, i % 2 ? 0x4342 : 0x4140),
                              0xe480e480);
}

/* What a warp knows of its queries: lane 4 g + t of query g. */
template <int DIM> struct queries {
    const uint4 *q;           // operands of the first product, WARP apart, in shared memory
    float unscale;            // what a score is multiplied with
    int last;                 // the query's own position; -1: there is no such query
    float largest, sum;       // of the scores so far; sum of weights, the lane's own part
    float out[DIM / 8][4];    // sums of weights times values, in both their parts,
    float unit;               // times this
};

/* Where a query's numbers stand among those of all; -1: there is none. */
__device__ int query_at(const attention &a, const attend_item &item, int g, int *row) {
    const int group = a.n_heads / a.kv.n_kv_heads, query = item.query + g;
    *row = item.first + query / group;
    if (*row >= item.first + item.n) return -1;
    return *row * a.n_heads + (int)blockIdx.y * group + query % group;
}

/* ROOM (DIM / 16, WARP): the operands, which all warps share. Ends with a barrier. */
template <int DIM>
__device__ void load_queries(const attention &a, const attend_item &item, queries<DIM> *s,
                             uint4 *room) {
    const int g = lane_number() / 4, t = lane_number() % 4;
    int row;
    const int at = query_at(a, item, g, &row);
    const float *q = a.q + (size_t)(at < 0 ? 0 : at) * DIM;
    s->last = at < 0 ? -1 : a.rows.positions[row];
    float largest = 0;
    for (int c = 0; c < DIM / 32; c++)
        for (int i = 0; i < 8; i++)
            if (at >= 0) largest = fmaxf(largest, fabsf(q[32 * c + 8 * t + i]));
    for (int with = 1; with < 4; with *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, with));
    const float scale = half_scale(largest);
    s->unscale = 1 / scale;
    for (int i = warp_number(); i < DIM / 16; i += WARPS) {
        const int d = i / 2 * 32 + 8 * t + i % 2 * 4; // four of the lane's dimensions
        float v[4];
        for (int j = 0; j < 4; j++) v[j] = at < 0 ? 0 : q[d + j] * scale;
        uint4 o;
        split_halves(v[0], v[1], &o.x, &o.y);
        split_halves(v[2], v[3], &o.z, &o.w);
        room[i * WARP + lane_number()] = o;
    }
    s->q = room + lane_number();
    __syncthreads();
    s->largest = -INFINITY;
    s->sum = 0;
    s->unit = 1;
#pragma unroll
    for (int i = 0; i < DIM / 8; i++)
        for (int j = 0; j < 4; j++) s->out[i][j] = 0;
}

/* Scores of a page: position 8 t + 2 j + e of it at [2 j + e]; -infinity where the query may not
 * look. */
template <uint32_t KV, int DIM>
__device__ void score(const attention &a, const queries<DIM> &s, void *page, int position,
                      float scores[8]) {
    const int g = lane_number() / 4, t = lane_number() % 4, head = (int)blockIdx.y;
    const auto *keys = head_in<KV>(a.kv, page, a.layer, 0, head);
    const float *scales = KV == LLAMA_Q8 ? scales_in(a.kv, page, a.layer, 0, head) : nullptr;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        const auto *key = keys + (g / 2 * 8 + 2 * j + g % 2) * DIM + 8 * t;
        float c[4] = {0, 0, 0, 0};
#pragma unroll
        for (int d = 0; d < DIM / 32; d++) {
            uint32_t pairs[4];
            load8<KV>(key + 32 * d, pairs);
            for (int step = 0; step < 2; step++) {
                const uint4 q = s.q[(2 * d + step) * WARP];
                const uint32_t operand[4] = {q.x, q.y, q.z, q.w};
                mma(c, operand, pairs + 2 * step);
            }
        }
        for (int e = 0; e < 2; e++) {
            const int at = 8 * t + 2 * j + e;
            float v = (c[e] + c[2 + e]) * s.unscale;
            if (KV == LLAMA_Q8) v *= scales[at];
            scores[2 * j + e] = position + at <= s.last ? v : -INFINITY;
        }
    }
}

/* Weights of the page's positions in the place of their scores; returns what all before it are to
 * be multiplied with. */
template <int DIM> __device__ float weigh(queries<DIM> *s, float scores[8]) {
    float largest = s->largest;
    for (int i = 0; i < 8; i++) // a NaN stays in the scores, and shows
        largest = fmaxf(largest, scores[i]);
    for (int with = 1; with < 4; with *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, with));
    const float before = s->largest == -INFINITY ? 0 : expf(s->largest - largest);
    s->sum *= before;
    for (int i = 0; i < 8; i++) {
        scores[i] = scores[i] == -INFINITY ? 0 : expf(scores[i] - largest);
        s->sum += scores[i];
    }
    s->largest = largest;
    return before;
}

/* In q8 weights take their positions' scales with them, all in one power of two as unit. */
template <int DIM>
__device__ float take_scales(queries<DIM> *s, const float *scales, int end, float weights[8]) {
    const int t = lane_number() % 4;
    float largest = 0, own[8];
    for (int i = 0; i < 8; i++) {
        own[i] = 8 * t + i < end ? scales[8 * t + i] : 0;
        largest = fmaxf(largest, own[i]);
    }
    for (int with = 1; with < 4; with *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, with));
    const float unit = half_scale(largest), change = unit / s->unit;
    for (int i = 0; i < 8; i++) weights[i] *= own[i] * unit;
    s->unit = unit;
    return change;
}

/* END: positions of the page that hold anything. */
template <uint32_t KV, int DIM>
__device__ void add_values(const attention &a, queries<DIM> *s, void *page, int end,
                           float weights[8], float before) {
    const int g = lane_number() / 4, t = lane_number() % 4, head = (int)blockIdx.y;
    const auto *values = head_in<KV>(a.kv, page, a.layer, 1, head);
    if (KV == LLAMA_Q8)
        before *= take_scales(s, scales_in(a.kv, page, a.layer, 1, head), end, weights);
    uint32_t p[2][4];
    for (int j = 0; j < TILES; j++)
        split_halves(weights[2 * j], weights[2 * j + 1], &p[j / 2][j % 2 * 2],
                     &p[j / 2][j % 2 * 2 + 1]);
#pragma unroll
    for (int i = 0; i < DIM / 8; i++) {
        uint32_t pairs[4];
        load8<KV>(values + (8 * i + g) * PAGE_POSITIONS + 8 * t, pairs);
        if (end < PAGE_POSITIONS) // what was never written may be NaN, which 0 does not undo
            for (int j = 0; j < TILES; j++) {
                const int at = 8 * t + 2 * j;
                pairs[j] &= at + 1 < end ? 0xffffffff : at < end ? 0xffff : 0;
            }
        for (int j = 0; j < 4; j++) s->out[i][j] *= before;
        mma(s->out[i], p[0], pairs);
        mma(s->out[i], p[1], pairs + 2);
    }
}

/* Leaves the warp's part in shared memory: out (8, DIM), largest (8), sum (8). */
template <int DIM> __device__ void leave(queries<DIM> *s, float *mine) {
    const int g = lane_number() / 4, t = lane_number() % 4;
    for (int with = 1; with < 4; with *= 2)
        s->sum += __shfl_xor_sync(ALL_LANES, s->sum, with);
#pragma unroll
    for (int i = 0; i < DIM / 8; i++)
        for (int e = 0; e < 2; e++)
            mine[g * DIM + 8 * i + 2 * t + e] = (s->out[i][e] + s->out[i][2 + e]) / s->unit;
    if (t) return;
    mine[QUERIES * DIM + g] = s->largest;
    mine[QUERIES * DIM + QUERIES + g] = s->sum;
}

/* N parts of one query, STEP floats apart, largest and sum at LARGEST and SUM, joined: dimension
 * D's sum; *LARGEST_OF and *SUM_OF get those of all. */
__device__ float join(const float *parts, int n, size_t step, const float *largest,
                      const float *sum, int d, float *largest_of, float *sum_of) {
    float most = -INFINITY, total = 0, out = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, largest[i * step]);
    for (int i = 0; i < n; i++) {
        if (largest[i * step] == -INFINITY && sum[i * step] == 0) continue; // saw nothing
        const float by = expf(largest[i * step] - most);
        total += by * sum[i * step];
        out += by * parts[i * step + d];
    }
    *largest_of = most;
    *sum_of = total;
    return out;
}

__device__ float *partial_of(const attention &a, int item, int split) {
    const size_t block = ((size_t)item * a.kv.n_kv_heads + blockIdx.y) * a.splits + split;
    return a.partial + block * QUERIES * (a.kv.head_dim + 2);
}

template <uint32_t KV, int DIM>
__global__ void __launch_bounds__(WARPS *WARP) attend(attention a) {
    constexpr int STEP = QUERIES * (DIM + 2);
    float *parts = shared_memory<float>(); // (WARPS, STEP)
    const attend_item item = a.items[blockIdx.x];
    const int group = a.n_heads / a.kv.n_kv_heads;
    const int last_row = min(item.first + item.n - 1,
                             item.first + (item.query + QUERIES - 1) / group);
    const int n = a.rows.positions[last_row] + 1; // positions that any query looks at
    const int pages = (n + PAGE_POSITIONS - 1) / PAGE_POSITIONS;
    const int first = (int)blockIdx.z * a.pages_a_split;
    const int last = min(first + a.pages_a_split, pages);
    queries<DIM> s;
    if (first >= last) return; // its part is never looked at
    load_queries<DIM>(a, item, &s, (uint4 *)(parts + WARPS * STEP));
    void *const *table = a.rows.pages + a.rows.tables[item.first];
    for (int p = first + warp_number(); p < last; p += WARPS) {
        float w[8];
        score<KV, DIM>(a, s, table[p], p * PAGE_POSITIONS, w);
        const float before = weigh(&s, w);
        add_values<KV, DIM>(a, &s, table[p], min(n - p * PAGE_POSITIONS, (int)PAGE_POSITIONS), w,
                            before);
    }
    leave(&s, parts + warp_number() * STEP);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < QUERIES * DIM; i += WARPS * WARP) {
        const int g = i / DIM, d = i % DIM;
        int row;
        const int at = query_at(a, item, g, &row);
        if (at < 0) continue;
        float largest, sum;
        const float out = join(parts + g * DIM, WARPS, STEP, parts + QUERIES * DIM + g,
                               parts + QUERIES * (DIM + 1) + g, d, &largest, &sum);
        if (pages <= a.pages_a_split) {
            a.out[(size_t)at * DIM + d] = out / sum;
            continue;
        }
        float *to = partial_of(a, (int)blockIdx.x, (int)blockIdx.z);
        to[i] = out;
        if (d) continue;
        to[QUERIES * DIM + g] = largest;
        to[QUERIES * (DIM + 1) + g] = sum;
    }
}

/* The splits of each item that has several. */
__global__ void join_splits(attention a) {
    const int dim = a.kv.head_dim, step = QUERIES * (dim + 2), group = a.n_heads / a.kv.n_kv_heads;
    const attend_item item = a.items[blockIdx.x];
    const int last_row = min(item.first + item.n - 1,
                             item.first + (item.query + QUERIES - 1) / group);
    const int pages = a.rows.positions[last_row] / PAGE_POSITIONS + 1;
    const int splits = (pages + a.pages_a_split - 1) / a.pages_a_split;
    if (splits <= 1) return;
    const float *parts = partial_of(a, (int)blockIdx.x, 0);
    for (int i = (int)threadIdx.x; i < QUERIES * dim; i += (int)blockDim.x) {
        const int g = i / dim, d = i % dim;
        int row;
        const int at = query_at(a, item, g, &row);
        if (at < 0) continue;
        float largest, sum;
        const float out = join(parts + g * dim, splits, (size_t)step, parts + QUERIES * dim + g,
                               parts + QUERIES * (dim + 1) + g, d, &largest, &sum);
        a.out[(size_t)at * dim + d] = out / sum;
    }
}

// ---- any shape

/* A block for each row and head: scores of blockDim positions, then their values, in turn. */
template <uint32_t KV> __global__ void attend_any(attention a) {
    const int dim = a.kv.head_dim, row = (int)blockIdx.x, head = (int)blockIdx.y;
    const int from = head / (a.n_heads / a.kv.n_kv_heads), threads = (int)blockDim.x;
    const int n = a.rows.positions[row] + 1;
    float *q = shared_memory<float>(), *out = q + dim, *w = out + dim, *partial = w + threads;
    const size_t at = ((size_t)row * a.n_heads + head) * dim;
    for (int d = (int)threadIdx.x; d < dim; d += threads) q[d] = a.q[at + d], out[d] = 0;
    __syncthreads();
    void *const *table = a.rows.pages + a.rows.tables[row];
    float most = -INFINITY, sum = 0;
    for (int first = 0; first < n; first += threads) {
        const int p = first + (int)threadIdx.x, slot = p % PAGE_POSITIONS;
        float score = -INFINITY;
        if (p < n) {
            void *page = table[p / PAGE_POSITIONS];
            const auto *key = head_in<KV>(a.kv, page, a.layer, 0, from) + slot * dim;
            score = 0;
            for (int d = 0; d < dim; d++) score += q[d] * element<KV>::get(key[d]);
            if (KV == LLAMA_Q8) score *= scales_in(a.kv, page, a.layer, 0, from)[slot];
        }
        const float own = warp_max(score);
        if (!lane_number()) partial[warp_number()] = own;
        __syncthreads();
        float now = most;
        for (int i = 0; i < threads / WARP; i++) now = fmaxf(now, partial[i]);
        const float before = most == -INFINITY ? 0 : expf(most - now);
        most = now;
        w[threadIdx.x] = p < n ? expf(score - now) : 0;
        __syncthreads();
        const int here = min(threads, n - first);
        sum *= before;
        for (int i = 0; i < here; i++) sum += w[i]; // each thread the same
        for (int d = (int)threadIdx.x; d < dim; d += threads) {
            float v = out[d] * before;
            for (int i = 0; i < here; i++) {
                void *page = table[(first + i) / PAGE_POSITIONS];
                const int s = (first + i) % PAGE_POSITIONS;
                const auto *values = head_in<KV>(a.kv, page, a.layer, 1, from);
                float weight = w[i];
                if (KV == LLAMA_Q8) weight *= scales_in(a.kv, page, a.layer, 1, from)[s];
                v += weight * element<KV>::get(values[d * PAGE_POSITIONS + s]);
            }
            out[d] = v;
        }
        __syncthreads();
    }
    for (int d = (int)threadIdx.x; d < dim; d += threads) a.out[at + d] = out[d] / sum;
}

template <uint32_t KV, int DIM>
cudaError_t launch(const attention &a, cudaStream_t stream) {
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)a.n_items, (unsigned)a.kv.n_kv_heads, (unsigned)a.splits);
    how.blockDim = dim3(WARPS * WARP);
    how.dynamicSmemBytes = WARPS * QUERIES * (DIM + 2) * sizeof(float) +
                           DIM / 16 * WARP * sizeof(uint4);
    how.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&how, attend<KV, DIM>, a);
    if (error || a.splits == 1) return error;
    how.gridDim.z = 1;
    how.dynamicSmemBytes = 0;
    return cudaLaunchKernelEx(&how, join_splits, a);
}

} // namespace

bool attend_fits(const kv_shape &kv) {
    return kv.kind != LLAMA_F32 && (kv.head_dim == 64 || kv.head_dim == 128);
}

cudaError_t launch_attend(const attention &a, cudaStream_t stream) {
    if (!attend_fits(a.kv)) return cudaErrorInvalidValue;
    if (a.kv.kind == LLAMA_F16)
        return a.kv.head_dim == 64 ? launch<LLAMA_F16, 64>(a, stream)
                                   : launch<LLAMA_F16, 128>(a, stream);
    return a.kv.head_dim == 64 ? launch<LLAMA_Q8, 64>(a, stream)
                               : launch<LLAMA_Q8, 128>(a, stream);
}

cudaError_t launch_attend_any(const attention &a, cudaStream_t stream) {
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3((unsigned)a.rows.n, (unsigned)a.n_heads);
    how.blockDim = dim3(WARPS * WARP);
    how.dynamicSmemBytes = ((size_t)2 * a.kv.head_dim + WARPS * WARP + WARPS) * sizeof(float);
    how.stream = stream;
    switch (a.kv.kind) {
    case LLAMA_F32: return cudaLaunchKernelEx(&how, attend_any<LLAMA_F32>, a);
    case LLAMA_F16: return cudaLaunchKernelEx(&how, attend_any<LLAMA_F16>, a);
    default: return cudaLaunchKernelEx(&how, attend_any<LLAMA_Q8>, a);
    }
}
