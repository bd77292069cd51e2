/* device.cuh: the few things below CUDA C++ that kernels share: halves in bits, reductions, and
 * the instructions that only PTX has, each in a function of its own.
 *
 * What a whole warp must do together is volatile, so that no compiler moves it into a branch.
 * On the CPU (tests/cuda_on_cpu) the same functions have plain definitions, so that nothing above
 * this file knows what it runs on. All shared memory is dynamic. */
#ifndef DEVICE_CUH
#define DEVICE_CUH
#include <cstdint>
#include <cuda_runtime.h>

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = ~0u;

#ifdef CUDA_ON_CPU
#include "ptx_on_cpu.h"
#else
#include <cuda_fp16.h>

/* The block's shared memory, as large as its launch says. */
template <class T> __device__ __forceinline__ T *shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return reinterpret_cast<T *>(bytes);
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float value) { // half to even
    return __half_as_ushort(__float2half_rn(value));
}

/* Two halves in one register: each sum rounded once. */
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

/* Byte i of the result is byte (selector >> 4 i) & 7 of b:a. Selectors have no fourth bits. */
__device__ __forceinline__ uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t picked;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(a), "r"(b), "r"(selector));
    return picked;
}

/* c (16, 8) += a (16, 16) b (16, 8) by a whole warp; lane 4 g + t holds, in halves,
 *     a[0]: row g, columns 2t, 2t + 1     a[1]: row g + 8      a[2], a[3]: the same, columns + 8
 *     b[0]: rows 2t, 2t + 1, column g     b[1]: rows + 8
 *     c[0], c[1]: row g, columns 2t, 2t + 1                    c[2], c[3]: row g + 8 */
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int i = 0; i < 2; i++) // Turing's has half the depth
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

/* 16 bytes go from global to shared memory behind the thread's back, zeros unless THERE; copies
 * up to a commit are a group, and wait_copies<N> waits for all groups but the last N. */
__device__ __forceinline__ void copy16(void *shared, const void *global, bool there) {
#if __CUDA_ARCH__ >= 800
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
#else
    *(uint4 *)shared = there ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

/* Weights are read once: they pass L1 by. */
__device__ __forceinline__ uint4 stream16(const void *p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 stream8(const void *p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
#endif

__device__ __forceinline__ int lane_number() { return (int)(threadIdx.x % WARP); }
__device__ __forceinline__ int warp_number() { return (int)(threadIdx.x / WARP); }

/* LOW and HIGH as two halves in one register. */
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
}

__device__ __forceinline__ float low_half(uint32_t pair) { return half_to_float((uint16_t)pair); }
__device__ __forceinline__ float high_half(uint32_t pair) {
    return half_to_float((uint16_t)(pair >> 16));
}

/* LOW and HIGH as two pairs of halves: what the first pair lost stands in the second. */
__device__ __forceinline__ void split_halves(float low, float high, uint32_t *coarse,
                                             uint32_t *fine) {
    *coarse = pack_halves(low, high);
    *fine = pack_halves(low - low_half(*coarse), high - high_half(*coarse));
}

__device__ __forceinline__ float warp_sum(float v) {
    for (int step = WARP / 2; step; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int step = WARP / 2; step; step /= 2)
        v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

/* Lane i's sum with lane i + h, and lane i + h's difference, of those among LANES. */
__device__ __forceinline__ float butterfly(unsigned lanes, float v, int h) {
    const float other = __shfl_xor_sync(lanes, v, h);
    return lane_number() & h ? other - v : v + other;
}

/* Half a warp has a group of 32, two neighbours a lane: turns it as rotate_group in quant.h does,
 * times SIZE. */
__device__ __forceinline__ void rotate_pairs(float v[2], float size) {
    const unsigned half = lane_number() < 16 ? 0xffffu : 0xffff0000u;
    const float sum = v[0] + v[1];
    v[1] = v[0] - v[1];
    v[0] = sum;
    for (int h = 1; h < 16; h *= 2)
        for (int e = 0; e < 2; e++) v[e] = butterfly(half, v[e], h);
    v[0] *= size;
    v[1] *= size;
}

/* The power of two that brings LARGEST, if it is an ordinary number, to [2^13, 2^14): halves hold
 * all that lies up to 2^28 below it to their full precision. */
__device__ __forceinline__ float half_scale(float largest) {
    const int exponent = (int)(__float_as_uint(largest) >> 23 & 255);
    if (exponent < 16 || exponent > 240) return 1;
    return __uint_as_float((unsigned)(127 + 13 - (exponent - 127)) << 23);
}
#endif
