/* cuda_bench.cu: the kernels of lib/cuda timed at the shapes of Llama 2 7B, each as a share of the
 * limit that is measured in the same run: bytes read a second, or the matrix units' rate.
 *
 * Weights pass by in many copies, more than any cache holds, and are random: timing zeros flatters.
 *
 *     cuda_bench          on a GPU
 *     cuda_bench small    shapes for the emulator: that it runs, not how fast */
#include "../lib/cuda/device.cuh"
#include "../lib/cuda/kernels.h"
extern "C" {
#include "../lib/llama.h"
#include "../lib/quant.h"
}
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

static cudaStream_t stream;
static bool small;

static void must(cudaError_t error) {
    if (error == cudaSuccess) return;
    printf("cuda_bench: %s\n", cudaGetErrorString(error));
    exit(1);
}

__global__ void fill(uint32_t *to, size_t n, uint32_t mask) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t v = (uint32_t)i * 2654435761u;
        v = (v ^ v >> 15) * 2246822519u;
        to[i] = (v ^ v >> 13) & mask;
    }
}

__global__ void read_all(const uint4 *from, size_t n, uint32_t *out) {
    uint32_t sum = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        const uint4 v = stream16(from + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 1) *out = sum; // so that the reads are wanted
}

constexpr int CHAINS = 8;
__global__ void multiply_only(float *out, int n) {
    const uint32_t a[4] = {0x3c003800 + threadIdx.x, 0x38003c00, 0x3a003b00, 0x3b003a00};
    const uint32_t b[2] = {0x3c013802, 0x38043c00 + threadIdx.x};
    float c[CHAINS][4] = {};
    for (int i = 0; i < n; i++)
        for (int j = 0; j < CHAINS; j++) mma(c[j], a, b);
    float sum = 0;
    for (int j = 0; j < CHAINS; j++) sum += c[j][0] + c[j][3];
    if (sum == 1) *out = sum;
}

static cudaLaunchConfig_t grid(unsigned blocks, unsigned threads) {
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(blocks);
    how.blockDim = dim3(threads);
    how.stream = stream;
    return how;
}

template <class T> static T *memory(size_t n, uint32_t mask = 0x3fff3fff) { // halves up to 2
    T *at = nullptr;
    must(cudaMalloc((void **)&at, n * sizeof(T)));
    const cudaLaunchConfig_t how = grid(small ? 2 : 1024, 256);
    must(cudaLaunchKernelEx(&how, fill, (uint32_t *)at, n * sizeof(T) / 4, mask));
    return at;
}

/* The median time of WORK(i), one of several runs that follow each other, in seconds. */
template <class WORK> static double timed(WORK work) {
    const int runs = small ? 1 : 20, batches = small ? 1 : 7;
    std::vector<double> seconds;
    cudaEvent_t from, to;
    must(cudaEventCreate(&from));
    must(cudaEventCreate(&to));
    for (int batch = 0; batch < batches + 1; batch++) { // the first warms up
        must(cudaEventRecord(from, stream));
        for (int i = 0; i < runs; i++) must(work(batch * runs + i));
        must(cudaEventRecord(to, stream));
        must(cudaEventSynchronize(to));
        float ms = 0;
        must(cudaEventElapsedTime(&ms, from, to));
        if (batch) seconds.push_back(ms / 1e3 / runs);
    }
    must(cudaEventDestroy(from));
    must(cudaEventDestroy(to));
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
}

static void line(const char *name, double seconds, double amount, double limit, const char *unit) {
    printf("%-34s %9.1f us  %8.1f G%s/s  %3.0f%%\n", name, 1e6 * seconds, amount / seconds / 1e9,
           unit, 100 * amount / seconds / limit);
    fflush(stdout);
}

static device_matrix matrix(uint32_t kind, int rows, int columns, const uint8_t *data) {
    return {data, (size_t)kind_strip_bytes(kind_find(kind), (uint64_t)columns), rows, columns,
            (rows + TILE_ROWS - 1) / TILE_ROWS, kind, false, nullptr, 1};
}

struct shape { const char *name; int rows, columns; after then; bool normed; };

/* N rows against copies of a matrix in turn; by gemv below 17 rows, by gemm above. */
static void bench_product(uint32_t kind, const shape &s, int n, int processors, double bandwidth,
                          double rate) {
    const int pieces = s.then == SWIGLU ? 2 : 1;
    const size_t bytes = kind_matrix_bytes(kind_find(kind), (uint64_t)s.rows, (uint64_t)s.columns);
    const size_t copies = small ? 1 : ((size_t)1 << 30) / bytes / pieces + 1;
    uint8_t *data = memory<uint8_t>(bytes * copies * pieces);
    float *x = memory<float>((size_t)n * s.columns), *norm = memory<float>((size_t)s.columns);
    float *y = memory<float>((size_t)n * s.rows);
    const int stride = (s.columns + HALVES_UNIT - 1) / HALVES_UNIT * HALVES_UNIT;
    const halves ready = {memory<uint16_t>((size_t)n * stride), memory<float>((size_t)n), stride, n,
                          false, false};
    const vectors in = {x, s.columns, n, nullptr, s.normed ? norm : nullptr, 1e-5f};
    const double seconds = timed([&](int i) {
        product p = {pieces, {}, s.then};
        for (int k = 0; k < pieces; k++)
            p.targets[k] = {matrix(kind, s.rows, s.columns,
                                   data + ((size_t)i % copies * pieces + k) * bytes), y, s.rows};
        if (n <= GEMV_ROWS) return launch_gemv(p, in, processors, stream);
        const cudaError_t error = launch_prepare(in, s.columns, ready, stream);
        if (error) return error;
        return n <= 16 ? launch_gemv_ready(p, ready, processors, stream)
                       : launch_gemm(p, ready, stream);
    });
    char name[80];
    snprintf(name, sizeof name, "%s %s, %d rows", kind_find(kind)->name, s.name, n);
    if (n <= 16) line(name, seconds, (double)bytes * pieces, bandwidth, "B");
    else line(name, seconds, 2.0 * n * s.rows * s.columns * pieces, rate, "FLOP");
    void *all[] = {data, x, norm, y, ready.x, ready.unscale};
    for (void *one : all) must(cudaFree(one));
}

/* One query row of 32 heads of 128 behind LENGTH positions. */
static void bench_attention(uint32_t kind, int length, int processors, double bandwidth) {
    const int heads = small ? 2 : 32, dim = 128, n_pages = (length + 31) / 32;
    const kv_shape kv = {kind, 1, heads, dim};
    const size_t element = kind == LLAMA_F16 ? 2 : 1;
    const size_t page = (size_t)2 * heads * 32 * (dim * element + (kind == LLAMA_Q8 ? 4 : 0));
    const int copies = small ? 1 : (int)(((size_t)1 << 30) / (page * (size_t)n_pages)) + 1;
    uint8_t *data = memory<uint8_t>(page * (size_t)n_pages * copies);
    std::vector<void *> list;
    for (int i = 0; i < n_pages * copies; i++) list.push_back(data + (size_t)i * page);
    std::vector<int32_t> tables;
    for (int i = 0; i < copies; i++) tables.push_back(i * n_pages);
    const int32_t position = length - 1;
    const attend_item item = {0, 1, 0};
    void **pages = memory<void *>(list.size());
    int32_t *at = memory<int32_t>(1), *table = memory<int32_t>(tables.size());
    attend_item *items = memory<attend_item>(1);
    const cudaMemcpyKind up = cudaMemcpyHostToDevice;
    must(cudaMemcpyAsync(pages, list.data(), list.size() * sizeof(void *), up, stream));
    must(cudaMemcpyAsync(table, tables.data(), tables.size() * 4, up, stream));
    must(cudaMemcpyAsync(at, &position, 4, up, stream));
    must(cudaMemcpyAsync(items, &item, sizeof item, up, stream));
    const int wish = std::max(1, 4 * processors / heads);
    int a_split = 4;
    while (a_split * wish < n_pages) a_split *= 2;
    float *q = memory<float>((size_t)heads * dim), *out = memory<float>((size_t)heads * dim);
    float *partial = memory<float>((size_t)heads * wish * 8 * (dim + 2));
    const double seconds = timed([&](int i) {
        const batch_rows rows = {1, at, table + i % copies, pages, nullptr, nullptr};
        const attention a = {kv, 0, heads, rows, q, out, items, 1, wish, a_split, partial};
        return launch_attend(a, stream);
    });
    char name[80];
    snprintf(name, sizeof name, "attend %s, %d positions", kind_find(kind)->name, length);
    line(name, seconds, (double)page * length / 32, bandwidth, "B");
    void *all[] = {data, pages, at, table, items, q, out, partial};
    for (void *one : all) must(cudaFree(one));
}

int main(int n_words, char **words) {
    small = n_words > 1 && words[1][0] == 's';
    cudaDeviceProp device;
    must(cudaGetDeviceProperties(&device, 0));
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const int processors = device.multiProcessorCount;
    const size_t bytes = small ? 1 << 16 : (size_t)2 << 30;
    uint4 *from = memory<uint4>(bytes / 16);
    uint32_t *out = memory<uint32_t>(1);
    const cudaLaunchConfig_t how = grid((unsigned)(small ? 2 : processors * 8), 512);
    const double reading = timed([&](int) {
        return cudaLaunchKernelEx(&how, read_all, (const uint4 *)from, bytes / 16, out);
    });
    must(cudaFree(from));
    const double bandwidth = (double)bytes / reading;
    const int times = small ? 1 : 4096;
    const cudaLaunchConfig_t full = grid((unsigned)(small ? 1 : processors * 4), 256);
    const double multiplying =
        timed([&](int) { return cudaLaunchKernelEx(&full, multiply_only, (float *)out, times); });
    const double rate = 2.0 * 16 * 8 * 16 * CHAINS * times * full.gridDim.x * 8 / multiplying;
    printf("%s: reads %.1f GB/s, multiplies halves at %.1f GFLOP/s (mma.sync)\n", device.name,
           bandwidth / 1e9, rate / 1e9);
    const int dim = small ? 128 : 4096, hidden = small ? 96 : 11008;
    const shape shapes[] = {{"qkv", 3 * dim, dim, STORE, true}, {"output", dim, dim, ADD, false},
                            {"gate_up", hidden, dim, SWIGLU, true}, {"down", dim, hidden, ADD, false},
                            {"logits", small ? 100 : 32000, dim, STORE, true}};
    for (uint32_t kind : {LLAMA_Q4, LLAMA_Q8, LLAMA_F16})
        for (const shape &s : shapes)
            for (int n : {1, 4, 16, 512})
                if (kind == LLAMA_Q4 || n == 1 || n == 512)
                    bench_product(kind, s, small && n > 16 ? 20 : n, processors, bandwidth, rate);
    for (uint32_t kind : {LLAMA_F16, LLAMA_Q8})
        for (int length : {256, 4096}) bench_attention(kind, small ? length / 16 : length, processors,
                                                       bandwidth);
    printf("limits: %.6g B/s, %.6g FLOP/s\n", bandwidth, rate);
    return 0;
}
