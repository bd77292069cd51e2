/* faults.cu: mistakes that kernels make, planted one at a time, to prove that the emulator and the
 * sanitizers catch them. "faults NAME" makes one; "faults none" makes none and must end well. */
#include "../../lib/cuda/device.cuh"
#include <cstdio>
#include <cstdlib>
#include <cstring>

constexpr int THREADS = 64;

/* Each thread's number comes back from its neighbour by way of shared memory. */
__global__ void pass_on(int *out, bool wait, int beyond) {
    int *shared = shared_memory<int>();
    const int i = (int)threadIdx.x, from = (i + 1) % THREADS;
    shared[i + beyond] = i;
    if (wait) __syncthreads();
    out[blockIdx.x * THREADS + i] = shared[from];
}

__global__ void warp_pass_on(int *out, bool wait) {
    int *shared = shared_memory<int>();
    const int i = (int)threadIdx.x;
    shared[i] = i;
    if (wait) __syncwarp();
    out[i] = shared[i ^ 1];
}

__global__ void write(int *out, int n) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i < n) out[i] = i;
}

/* Every block adds to one number: without atomics, over each other. */
__global__ void count(int *out, bool atomic) {
    if (threadIdx.x != blockIdx.x) return;
    if (atomic) atomicAdd(out, 1);
    else *out += 1;
}

__global__ void barrier_without_the_rest(int *out) {
    if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1, 1);
    else __syncthreads();
}

__global__ void shuffle_without_lanes(int *out) {
    if (threadIdx.x % WARP < 16) return;
    out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1, 1);
}

__global__ void unwaited_copy(const uint4 *in) {
    copy16(shared_memory<uint4>() + threadIdx.x, in + threadIdx.x, true);
    commit_copies();
}

/* Each thread reads its neighbour's bytes, and then has its own replaced, which may be at once. */
__global__ void copy_over(const uint4 *in, uint4 *out, bool wait) {
    uint4 *shared = shared_memory<uint4>();
    const int i = (int)threadIdx.x;
    shared[i] = in[i];
    __syncthreads();
    out[i] = shared[(i + 1) % THREADS];
    if (wait) __syncthreads();
    copy16(shared + i, in + THREADS + i, true);
    commit_copies();
    __syncthreads();
    wait_copies<0>();
    __syncthreads();
    out[i] = shared[(i + 1) % THREADS];
}

/* Loads begin 4 bytes past their own alignment. */
__global__ void load_across(const uint4 *in, uint4 *out, int past, bool stream) {
    const uint4 *from = (const uint4 *)((const char *)in + past);
    out[threadIdx.x] = stream ? stream16(from + threadIdx.x) : from[threadIdx.x];
}

/* What the runtime says, if not that all is well, ends the program. */
static void must(cudaError_t error) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "refused: %s\n", cudaGetErrorString(error));
    exit(1);
}

/* Memory is taken, a copy made or waited for while a stream is recorded. */
static void record(int *out, const char *fault) {
    cudaStream_t stream;
    cudaGraph_t graph;
    int host = 0;
    void *more;
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    if (!strcmp(fault, "taken")) cudaMalloc(&more, 1);
    if (!strcmp(fault, "waited")) cudaStreamSynchronize(stream);
    if (!strcmp(fault, "copied"))
        cudaMemcpyAsync(out, &host, sizeof host, cudaMemcpyHostToDevice, stream);
    must(cudaStreamEndCapture(stream, &graph));
    must(cudaGraphDestroy(graph));
    must(cudaStreamDestroy(stream));
}

/* What a copy reads is overwritten before it is waited for. */
static void send(int *out, bool wait) {
    cudaStream_t stream;
    int sent = 1, back = 0;
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    must(cudaMemcpyAsync(out, &sent, sizeof sent, cudaMemcpyHostToDevice, stream));
    if (wait) must(cudaStreamSynchronize(stream));
    sent = 2;
    must(cudaMemcpyAsync(&back, out, sizeof back, cudaMemcpyDeviceToHost, stream));
    must(cudaStreamSynchronize(stream));
    must(cudaStreamDestroy(stream));
    if (back == 1) return;
    fprintf(stderr, "a copy took what was written after it was asked for\n");
    exit(1);
}

int main(int count_of_words, char **words) {
    const char *fault = count_of_words > 1 ? words[1] : "none";
    const auto is = [&](const char *name) { return !strcmp(fault, name); };
    int *out;
    if (cudaMalloc((void **)&out, 4 * THREADS * sizeof(uint4))) return 2;
    cudaMemsetAsync(out, 0, 4 * THREADS * sizeof(uint4), 0);
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(4);
    how.blockDim = dim3(THREADS);
    how.dynamicSmemBytes = THREADS * sizeof(int);
    cudaLaunchKernelEx(&how, pass_on, out, !is("race"), (int)is("shared"));
    cudaLaunchKernelEx(&how, write, out, is("global") ? 16 * THREADS + 1 : 4 * THREADS);
    if (is("global")) { // one more block: its first thread is past the end
        how.gridDim = dim3(17);
        cudaLaunchKernelEx(&how, write, out, 16 * THREADS + 1);
        how.gridDim = dim3(4);
    }
    cudaLaunchKernelEx(&how, count, out, !is("blocks"));
    how.gridDim = dim3(1);
    cudaLaunchKernelEx(&how, warp_pass_on, out, !is("warp"));
    how.dynamicSmemBytes = THREADS * sizeof(uint4);
    cudaLaunchKernelEx(&how, copy_over, (const uint4 *)out, (uint4 *)out + 2 * THREADS,
                       !is("copy race"));
    if (is("barrier")) cudaLaunchKernelEx(&how, barrier_without_the_rest, out);
    if (is("lanes")) cudaLaunchKernelEx(&how, shuffle_without_lanes, out);
    cudaLaunchKernelEx(&how, load_across, (const uint4 *)out, (uint4 *)out + 2 * THREADS,
                       is("across") || is("stream across") ? 4 : 0, !is("across"));
    record(out, fault);
    send(out, !is("late copy"));
    if (is("tall")) how.gridDim.y = 65536;
    if (is("large")) how.dynamicSmemBytes = (48 << 10) + 16;
    must(cudaLaunchKernelEx(&how, write, out, 0));
    if (is("copy")) cudaLaunchKernelEx(&how, unwaited_copy, (const uint4 *)out);
    cudaFree(out);
    printf("%s: ended\n", fault);
    return 0;
}
