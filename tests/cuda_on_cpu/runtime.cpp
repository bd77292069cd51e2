/* runtime.cpp: memory, streams, graphs and what a device is, behind cuda_runtime.h.
 *
 * The environment says what a machine would be like:
 *     CUDA_ON_CPU_MEMORY   bytes of device memory (default: 4 GiB)
 *     CUDA_ON_CPU_TAKEN    bytes that are free when asked and gone when wanted (default: 0)
 *     CUDA_ON_CPU_DEVICE   none: no driver; old: a driver for CUDA 12.4; pascal: an old GPU;
 *                          unready: a GPU that does not answer; second: new threads have chosen
 *                          another GPU than the first
 *     CUDA_ON_CPU_STREAMS  early: what a stream is given runs at once, not when it is waited for
 *     CUDA_ON_CPU_ORDER    reverse: threads and blocks run last to first
 * Compiled without ThreadSanitizer's instrumentation: what happens here orders nothing. */
#include "cuda_runtime.h"
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <vector>

using namespace cuda_on_cpu;

// ---- memory

namespace {

std::map<void *, size_t> allocated;
size_t in_use;
std::mutex books;

bool device_is(const char *what) {
    const char *device = getenv("CUDA_ON_CPU_DEVICE");
    return device && !strcmp(device, what);
}

size_t number_of(const char *name, size_t otherwise) {
    const char *bytes = getenv(name);
    return bytes ? strtoull(bytes, nullptr, 10) : otherwise;
}

size_t memory_bytes() { return number_of("CUDA_ON_CPU_MEMORY", (size_t)4 << 30); }

} // namespace

struct cuda_on_cpu_graph { std::vector<std::function<void()>> steps; };
struct cuda_on_cpu_stream {
    cuda_on_cpu_graph *capturing;
    bool spoilt;                               // by a call that may not be made meanwhile
    std::deque<std::function<void()>> waiting; // what it was given and has not done
};
struct cuda_on_cpu_event {
    std::chrono::steady_clock::time_point at;
    cudaStream_t of;
    int recorded, reached;
};

namespace {

std::recursive_mutex queues;              // of all streams; held while one works
std::set<cudaStream_t> streams;
thread_local cudaStream_t captured;       // by this thread

/* The GPU that the thread has chosen; each starts with the first, unless a test says otherwise. */
int &chosen() {
    thread_local int device = device_is("second");
    return device;
}

/* While a stream is recorded its thread may neither take memory nor wait. */
cudaError_t not_recording() {
    if (!captured) return cudaSuccess;
    captured->spoilt = true;
    return cudaErrorStreamCaptureUnsupported;
}

/* A stream works when it is waited for, as late as a GPU might; the default one at once. */
cudaError_t give(cudaStream_t stream, std::function<void()> step) {
    std::lock_guard<std::recursive_mutex> lock(queues);
    if (chosen()) return cudaErrorInvalidResourceHandle;
    const char *when = getenv("CUDA_ON_CPU_STREAMS");
    const bool early = !stream || (when && !strcmp(when, "early"));
    if (stream && stream->capturing) stream->capturing->steps.push_back(std::move(step));
    else if (early) step();
    else stream->waiting.push_back(std::move(step));
    return cudaSuccess;
}

void work_off(cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> lock(queues);
    while (!stream->waiting.empty()) {
        const auto step = std::move(stream->waiting.front());
        stream->waiting.pop_front();
        step();
    }
}

} // namespace

cudaError_t cuda_on_cpu::launch(const cudaLaunchConfig_t &how, std::function<void()> body) {
    const dim3 grid = how.gridDim, threads = how.blockDim;
    const size_t n = (size_t)threads.x * threads.y * threads.z, shared = how.dynamicSmemBytes;
    if (!n || n > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 ||
        grid.z > 65535 || shared > 48 << 10)
        return cudaErrorInvalidConfiguration;
    return give(how.stream, [=] { run_grid(grid, threads, shared, body); });
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    *pointer = nullptr;
    if (const cudaError_t error = not_recording()) return error;
    if (chosen()) return cudaErrorInvalidResourceHandle; // it would be the other GPU's
    std::lock_guard<std::mutex> lock(books);
    if (in_use + bytes + number_of("CUDA_ON_CPU_TAKEN", 0) > memory_bytes())
        return cudaErrorMemoryAllocation;
    if (posix_memalign(pointer, 256, bytes)) return cudaErrorMemoryAllocation;
    memset(*pointer, 0xff, bytes);
    allocated[*pointer] = bytes;
    in_use += bytes;
    return cudaSuccess;
}

/* Waits for all that the GPU was given. */
cudaError_t cudaFree(void *pointer) {
    if (!pointer) return cudaSuccess;
    if (const cudaError_t error = not_recording()) return error;
    {
        std::lock_guard<std::recursive_mutex> lock(queues);
        for (cudaStream_t stream : streams) work_off(stream);
    }
    std::lock_guard<std::mutex> lock(books);
    const auto found = allocated.find(pointer);
    if (found == allocated.end()) return cudaErrorInvalidValue;
    in_use -= found->second;
    allocated.erase(found);
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    std::lock_guard<std::mutex> lock(books);
    *total = memory_bytes();
    *free_bytes = *total - (in_use < *total ? in_use : *total);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes) {
    if (const cudaError_t error = not_recording()) return error;
    return posix_memalign(pointer, 256, bytes) ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer) {
    if (const cudaError_t error = not_recording()) return error;
    free(pointer);
    return cudaSuccess;
}

/* Late, also from memory that is not pinned, which a GPU may read late, too. A graph would keep
 * the host's address: no step may. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    if (kind != cudaMemcpyDeviceToDevice)
        if (const cudaError_t error = not_recording()) return error;
    return give(stream, [=] { memcpy(to, from, bytes); });
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    return give(stream, [=] { memset(to, value, bytes); });
}

// ---- the device

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorSystemNotReady: return "system not yet initialized";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
        return "operation failed due to a previous error during capture";
    default: return "invalid argument";
    }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int *version) {
    *version = device_is("none") ? 0 : device_is("old") ? 12040 : 13000;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = device_is("none") ? 0 : 2;
    if (device_is("unready")) return cudaErrorSystemNotReady;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return cudaErrorInvalidValue;
    chosen() = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = chosen();
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = cudaDeviceProp{};
    snprintf(p->name, sizeof p->name, "emulated on the CPU");
    p->major = device_is("pascal") ? 6 : 8;
    p->minor = device_is("pascal") ? 1 : 0;
    p->multiProcessorCount = 4;
    p->totalGlobalMem = memory_bytes();
    p->sharedMemPerBlockOptin = 99 << 10;
    return cudaSuccess;
}

// ---- streams, graphs, events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    if (chosen()) return cudaErrorInvalidResourceHandle;
    std::lock_guard<std::recursive_mutex> lock(queues);
    *stream = new cuda_on_cpu_stream{};
    streams.insert(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> lock(queues);
    work_off(stream);
    streams.erase(stream);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (const cudaError_t error = not_recording()) return error;
    if (stream) work_off(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (!stream || stream->capturing || captured) return cudaErrorInvalidValue;
    stream->capturing = new cuda_on_cpu_graph{};
    stream->spoilt = false;
    captured = stream;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (captured != stream) return cudaErrorInvalidValue;
    *graph = stream->capturing;
    stream->capturing = nullptr;
    captured = nullptr;
    if (!stream->spoilt) return cudaSuccess;
    delete *graph;
    *graph = nullptr;
    return cudaErrorStreamCaptureInvalidated;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new cuda_on_cpu_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    return give(stream, [exec] { for (const auto &step : exec->steps) step(); });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return cudaGraphDestroy(exec); }

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = new cuda_on_cpu_event{};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    std::lock_guard<std::recursive_mutex> lock(queues);
    if (streams.count(event->of)) work_off(event->of);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->of = stream;
    event->recorded++;
    return give(stream, [event] {
        event->at = std::chrono::steady_clock::now();
        event->reached++;
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (const cudaError_t error = not_recording()) return error;
    std::lock_guard<std::recursive_mutex> lock(queues);
    while (event->of && event->reached < event->recorded && !event->of->waiting.empty()) {
        const auto step = std::move(event->of->waiting.front());
        event->of->waiting.pop_front();
        step();
    }
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return cudaSuccess;
}
