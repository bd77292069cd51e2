/* sampler.cu: logits become a token where they are: twin of lib/sampler.c, whose choices it makes.
 *
 * One block does all of it. Filters need no sorting: whether a token stays depends on how many, or
 * how much probability, stands before it, and both only grow with rank; so the last logit that
 * stays is found bit by bit, from the highest, each bit by one sum over all. Sums are f64, each
 * thread's own run of tokens in their order and then these in theirs. */
#include "device.cuh"
#include "kernels.h"

namespace {

constexpr int THREADS = 1024, WARPS = THREADS / WARP;

struct desk {              // what threads tell each other, in shared memory
    double sums[WARPS], whole;
    float tops[WARPS];
    int ids[WARPS], chosen, bad, last;
};

/* A number that is larger where the logit is. */
__device__ uint32_t rank_of(float logit) {
    const uint32_t bits = __float_as_uint(logit);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

/* The sum of everybody's V, and in *BEFORE that of the threads before this one. */
__device__ double sum_all(desk *d, double v, double *before) {
    const int lane = lane_number(), warp = warp_number();
    double up = v;
    for (unsigned step = 1; step < WARP; step *= 2) {
        const double other = __shfl_up_sync(ALL_LANES, up, step);
        if (lane >= (int)step) up += other;
    }
    const double own = __shfl_up_sync(ALL_LANES, up, 1); // up to the lane before
    if (lane == WARP - 1) d->sums[warp] = up;
    __syncthreads();
    double sum = 0, earlier = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) earlier = sum;
        sum += d->sums[w];
    }
    __syncthreads();
    *before = lane ? earlier + own : earlier;
    return sum;
}

__device__ double sum_all(desk *d, double v) {
    double before;
    return sum_all(d, v, &before);
}

/* Biases and penalties, as lib/sampler.c applies them. COUNTS is for tokens that were seen. */
__device__ void penalise(const choice &c) {
    if (!threadIdx.x) // in their order: a token may stand there twice
        for (int i = 0; i < c.n_bias; i++) c.work[c.bias_tokens[i]] += c.bias_values[i];
    __syncthreads();
    const bool talks = c.presence != 0 || c.frequency != 0;
    if (!c.n_seen || (c.repetition == 1 && !talks)) return;
    for (int i = (int)threadIdx.x; i < c.n_seen; i += THREADS) atomicExch(c.counts + c.seen[i], -1);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < c.n_seen; i += THREADS)
        if (atomicExch(c.counts + c.seen[i], 0) == -1) { // the first to come does it
            float *logit = c.work + c.seen[i];
            *logit = *logit < 0 ? *logit * c.repetition : *logit / c.repetition;
        }
    __syncthreads();
    if (!talks) return;
    const int first = c.n_seen - c.n_said;
    for (int i = first + (int)threadIdx.x; i < c.n_seen; i += THREADS)
        atomicAdd(c.counts + c.seen[i], 1);
    __syncthreads();
    for (int i = first + (int)threadIdx.x; i < c.n_seen; i += THREADS) {
        int times = atomicExch(c.counts + c.seen[i], 0);
        if (times) c.work[c.seen[i]] -= c.presence;
        for (; times; times--) c.work[c.seen[i]] -= c.frequency;
    }
    __syncthreads();
}

/* The largest logit's index, the first of equals; d->bad where one is NaN or +infinity, or all
 * are -infinity. */
__device__ int largest(const choice &c, desk *d) {
    float top = -INFINITY;
    int best = c.n;
    bool bad = false;
    for (int i = (int)threadIdx.x; i < c.n; i += THREADS) {
        const float v = c.work[i];
        bad |= !(v <= 0x1.fffffep127f);
        if (v > top) top = v, best = i;
    }
    if (__ballot_sync(ALL_LANES, bad) && !lane_number()) atomicExch(&d->bad, 1);
    for (int step = WARP / 2; step; step /= 2) {
        const float v = __shfl_xor_sync(ALL_LANES, top, step);
        const int i = __shfl_xor_sync(ALL_LANES, best, step);
        if (v > top || (v == top && i < best)) top = v, best = i;
    }
    if (!lane_number()) d->tops[warp_number()] = top, d->ids[warp_number()] = best;
    __syncthreads();
    for (int w = 0; w < WARPS; w++)
        if (d->tops[w] > top || (d->tops[w] == top && d->ids[w] < best))
            top = d->tops[w], best = d->ids[w];
    if (best == c.n && !threadIdx.x) atomicExch(&d->bad, 1);
    __syncthreads();
    return best;
}

/* The threads' tokens: each has a run of them. */
struct run { int first, last; };
__device__ run own_run(const choice &c) {
    const int each = (c.n + THREADS - 1) / THREADS, first = (int)threadIdx.x * each;
    return {min(first, c.n), min(first + each, c.n)};
}

/* The highest rank at and above which stand MOST of what WEIGHS says; 0 if nowhere so much does. */
template <class WEIGHS>
__device__ uint32_t rank_with(const choice &c, desk *d, double most, WEIGHS weighs) {
    const run own = own_run(c);
    uint32_t under = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const uint32_t tried = under | 1u << bit;
        double sum = 0;
        for (int i = own.first; i < own.last; i++)
            if (rank_of(c.work[i]) >= tried) sum += weighs(i);
        if (sum_all(d, sum) >= most) under = tried;
    }
    return under;
}

/* Which tokens stay: all of higher rank, and of this rank the first FEW. */
struct kept { uint32_t rank; int few; double least; };

__device__ kept filter(const choice &c, desk *d) {
    kept k = {0, c.n, c.min_p};
    const run own = own_run(c);
    if (c.top_k && c.top_k < c.n)
        k.rank = rank_with(c, d, c.top_k, [](int) { return 1.0; });
    if (c.top_p == 1) return k;
    double sum = 0, above = 0;
    for (int i = own.first; i < own.last; i++)
        if (rank_of(c.work[i]) >= k.rank) sum += c.weights[i];
    const double reach = (double)c.top_p * sum_all(d, sum);
    const uint32_t rank = rank_with(c, d, reach, [&](int i) {
        return rank_of(c.work[i]) >= k.rank ? c.weights[i] : 0.0;
    });
    if (rank < k.rank) return k;
    k.rank = rank;
    for (int i = own.first; i < own.last; i++)
        if (rank_of(c.work[i]) > rank) above += c.weights[i];
    above = sum_all(d, above);
    // of equals as many as it takes
    const uint32_t bits = rank & 0x80000000 ? rank & 0x7fffffff : ~rank;
    const double each = exp((double)__uint_as_float(bits));
    for (k.few = 0; k.few < c.n && above < reach; k.few++) {
        if (!(above + each > above)) k.few = c.n - 1; // they weigh nothing: all of them
        above += each;
    }
    return k;
}

/* The token at which the running sum of weights passes RANDOM of their total. */
__device__ int draw(const choice &c, desk *d, const kept &k) {
    const run own = own_run(c);
    int equals = 0;
    for (int i = own.first; i < own.last; i++) equals += rank_of(c.work[i]) == k.rank;
    double before;
    sum_all(d, equals, &before);
    const int seen = (int)before;
    const auto weight = [&](int i, int *of_rank) {
        const uint32_t rank = rank_of(c.work[i]);
        const bool stays = rank > k.rank || (rank == k.rank && (*of_rank)++ < k.few);
        return stays && c.weights[i] >= k.least ? c.weights[i] : 0;
    };
    double sum = 0;
    int n = seen, last = -1;
    for (int i = own.first; i < own.last; i++) {
        const double w = weight(i, &n);
        sum += w;
        if (w > 0) last = i;
    }
    const double total = sum_all(d, sum, &before), reach = c.random * total;
    if (last >= 0) atomicMax((unsigned *)&d->last, (unsigned)last);
    if (last >= 0 && before <= reach && before + sum > reach) {
        double running = before;
        n = seen;
        int chosen = last;
        for (int i = own.first; i < own.last; i++) {
            running += weight(i, &n);
            if (running <= reach) continue;
            chosen = i;
            break;
        }
        d->chosen = chosen;
    }
    __syncthreads();
    return d->chosen >= 0 ? d->chosen : d->last;
}

__global__ void __launch_bounds__(THREADS, 1) sample(choice c) {
    desk *d = shared_memory<desk>();
    if (!threadIdx.x) d->bad = 0, d->chosen = -1, d->last = 0;
    for (int i = (int)threadIdx.x; i < c.n; i += THREADS) c.work[i] = c.logits[i];
    __syncthreads();
    penalise(c);
    int token = largest(c, d);
    if (d->bad) {
        if (!threadIdx.x) *c.token = -1;
        return;
    }
    if (c.temperature > 0) {
        const float top = c.work[token];
        __syncthreads();
        for (int i = (int)threadIdx.x; i < c.n; i += THREADS) {
            c.work[i] = (c.work[i] - top) / c.temperature;
            c.weights[i] = exp((double)c.work[i]);
        }
        __syncthreads();
        token = draw(c, d, filter(c, d));
    }
    if (!threadIdx.x) *c.token = token;
}

} // namespace

cudaError_t launch_sample(const choice &c, cudaStream_t stream) {
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(1);
    how.blockDim = dim3(THREADS);
    how.dynamicSmemBytes = sizeof(desk);
    how.stream = stream;
    return cudaLaunchKernelEx(&how, sample, c);
}
