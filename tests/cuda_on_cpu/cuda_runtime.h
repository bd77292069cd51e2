/* cuda_runtime.h: what lib/cuda/ uses of CUDA's header of this name, on a CPU. Compiled with this
 * folder in front of the include path, the same .cu files run without a GPU.
 *
 * The threads of a block are fibers of one system thread, which go on one after the other between
 * __syncthreads() and the operations of a warp; blocks follow each other, and so do launches. All
 * shared memory is dynamic: each block's is its own, which a static variable could not be. What
 * a GPU leaves open stays open: fresh memory holds NaN, and so does where a copy by cp.async goes
 * till it is waited for; a stream does what it is given when it is waited for; AddressSanitizer
 * and ThreadSanitizer see fibers as threads. What would hang or trap on a GPU (a barrier or a warp
 * operation that some threads never reach, a load across its own alignment) ends the program with
 * a line, and what the runtime would refuse is refused: other launches than every GPU from Turing
 * on takes, and to wait or to take memory while a stream is recorded. */
#ifndef CUDA_ON_CPU_RUNTIME_H
#define CUDA_ON_CPU_RUNTIME_H
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- inside a kernel

namespace cuda_on_cpu {
struct place { dim3 thread, block, threads, blocks; };
extern place *here;
void sync_threads();
/* Waits until all lanes of MASK are here with the same STEP, which then runs once: LANES[i] is
 * what lane i brought. */
void together(unsigned mask, void *mine, void (*step)(void **lanes, unsigned mask));
void sync_warp(unsigned mask);
void *dynamic_shared();
[[noreturn]] void misaligned();
inline void must_align(const void *p, size_t bytes) {
    if ((uintptr_t)p % bytes) misaligned();
}
unsigned lane();

struct copy { char *to; const char *from; int bytes, given; }; // beyond GIVEN come zeros
void copy_later(void *to, const void *from, int bytes, int given);
/* It may land as soon as it is asked for: what stood there is gone, and ThreadSanitizer sees that,
 * as it would not see a memset that the compiler writes out. */
inline void copy_async(void *to, const void *from, int bytes, int given) {
    must_align(to, (size_t)bytes);
    must_align(from, (size_t)bytes);
    for (int i = 0; i < bytes; i += 4) *(volatile unsigned *)((char *)to + i) = ~0u;
    copy_later(to, from, bytes, given);
}
void copy_commit();
bool copy_due(int left, copy *c); // the next one that is not among the LEFT last groups
inline void copy_wait(int left) {
    for (copy c; copy_due(left, &c);) { // here, where ThreadSanitizer sees it
        memcpy(c.to, c.from, (size_t)c.given);
        memset(c.to + c.given, 0, (size_t)(c.bytes - c.given));
    }
}

struct shuffle { uint64_t value, result; int lane; };
void do_shuffle(void **lanes, unsigned mask);
void do_ballot(void **lanes, unsigned mask);

template <class T> T shuffled(unsigned mask, T value, int from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    shuffle s = {0, 0, from & 31};
    memcpy(&s.value, &value, sizeof value);
    together(mask, &s, do_shuffle);
    memcpy(&value, &s.result, sizeof value);
    return value;
}
} // namespace cuda_on_cpu

/* One of threadIdx and its like: reads the fiber that runs. */
template <dim3 cuda_on_cpu::place::*What> struct cuda_on_cpu_index {
    struct { operator unsigned() const { return (cuda_on_cpu::here->*What).x; } } x;
    struct { operator unsigned() const { return (cuda_on_cpu::here->*What).y; } } y;
    struct { operator unsigned() const { return (cuda_on_cpu::here->*What).z; } } z;
};
const cuda_on_cpu_index<&cuda_on_cpu::place::thread> threadIdx{};
const cuda_on_cpu_index<&cuda_on_cpu::place::block> blockIdx{};
const cuda_on_cpu_index<&cuda_on_cpu::place::threads> blockDim{};
const cuda_on_cpu_index<&cuda_on_cpu::place::blocks> gridDim{};

using std::max;
using std::min;
inline void __syncthreads() { cuda_on_cpu::sync_threads(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::sync_warp(mask); }
inline void __threadfence() {}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int with) {
    return cuda_on_cpu::shuffled(mask, value, (int)cuda_on_cpu::lane() ^ with);
}
template <class T> T __shfl_sync(unsigned mask, T value, int from) {
    return cuda_on_cpu::shuffled(mask, value, from);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    const int l = (int)cuda_on_cpu::lane();
    return cuda_on_cpu::shuffled(mask, value, l < (int)by ? l : l - (int)by);
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
    cuda_on_cpu::shuffle s = {(uint64_t)(yes != 0), 0, 0};
    cuda_on_cpu::together(mask, &s, cuda_on_cpu::do_ballot);
    return (unsigned)s.result;
}

/* They order memory too, which on a GPU takes a fence: a missing __threadfence() goes unseen. */
inline int atomicAdd(int *p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
inline unsigned atomicAdd(unsigned *p, unsigned v) {
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
inline int atomicExch(int *p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); }
inline unsigned atomicMax(unsigned *p, unsigned v) {
    unsigned old = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL,
                                                   __ATOMIC_ACQUIRE)) {
    }
    return old;
}

inline unsigned __float_as_uint(float v) { unsigned b; memcpy(&b, &v, 4); return b; }
inline float __uint_as_float(unsigned b) { float v; memcpy(&v, &b, 4); return v; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) { // a selector's fourth bit spreads the byte's sign
        const unsigned s = selector >> 4 * i & 15, byte = (unsigned)(both >> 8 * (s & 7)) & 255;
        out |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}

// ---- outside

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
    cudaErrorInvalidResourceHandle = 400, cudaErrorSystemNotReady = 802,
    cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
enum { cudaStreamNonBlocking = 1 };
typedef struct cuda_on_cpu_stream *cudaStream_t;
typedef struct cuda_on_cpu_graph *cudaGraph_t;
typedef struct cuda_on_cpu_graph *cudaGraphExec_t;
typedef struct cuda_on_cpu_event *cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem, sharedMemPerBlockOptin;
};
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
/* Tests call it from outside, too. */
extern "C" __attribute__((visibility("default"))) cudaError_t cudaMemGetInfo(size_t *free,
                                                                            size_t *total);
cudaError_t cudaMalloc(void **pointer, size_t bytes);
cudaError_t cudaFree(void *pointer);
cudaError_t cudaMallocHost(void **pointer, size_t bytes);
cudaError_t cudaFreeHost(void *pointer);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to);

namespace cuda_on_cpu {
cudaError_t launch(const cudaLaunchConfig_t &how, std::function<void()> thread);
void run_grid(dim3 grid, dim3 threads, size_t shared, const std::function<void()> &thread);
}

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *how, void (*kernel)(Wanted...),
                               Given &&...given) {
    // arguments are copied when the launch is made, also into a graph
    std::tuple<Wanted...> copies(given...);
    return cuda_on_cpu::launch(*how, [kernel, copies] { std::apply(kernel, copies); });
}
#endif
