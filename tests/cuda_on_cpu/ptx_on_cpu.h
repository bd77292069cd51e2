/* ptx_on_cpu.h: what device.cuh takes from PTX on a GPU, in plain C++; the contracts stand there. */
#ifndef PTX_ON_CPU_H
#define PTX_ON_CPU_H
#include <cuda_runtime.h>

extern "C" {
float f16_to_f32(uint16_t bits); // lib/quant.c
uint16_t f32_to_f16(float value);
}

template <class T> T *shared_memory() { return (T *)cuda_on_cpu::dynamic_shared(); }
float half_to_float(uint16_t bits);
inline uint16_t float_to_half(float value) { return f32_to_f16(value); }
inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector & 0x7777);
}

inline uint32_t add_halves(uint32_t a, uint32_t b) {
    const float low = half_to_float((uint16_t)a) + half_to_float((uint16_t)b);
    const float high = half_to_float((uint16_t)(a >> 16)) + half_to_float((uint16_t)(b >> 16));
    return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
}

namespace cuda_on_cpu {
struct fragments { float *c; const uint32_t *a, *b; };
void do_mma(void **lanes, unsigned mask);
} // namespace cuda_on_cpu

inline void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    cuda_on_cpu::fragments f = {c, a, b};
    cuda_on_cpu::together(~0u, &f, cuda_on_cpu::do_mma);
}

inline void copy16(void *shared, const void *global, bool there) {
    cuda_on_cpu::copy_async(shared, global, 16, there ? 16 : 0);
}
inline void commit_copies() { cuda_on_cpu::copy_commit(); }
template <int N> void wait_copies() { cuda_on_cpu::copy_wait(N); }
inline uint4 stream16(const void *p) {
    cuda_on_cpu::must_align(p, 16);
    return *(const uint4 *)p;
}
inline uint2 stream8(const void *p) {
    cuda_on_cpu::must_align(p, 8);
    return *(const uint2 *)p;
}
#endif
