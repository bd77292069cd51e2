/* kv.cuh: what stands where in a KV page on the device.
 *
 * A page holds 32 positions: for each layer the keys of its kv heads, (32, head_dim) each, then
 * their values the other way round, (head_dim, 32), so that either is read 16 bytes a lane in the
 * order in which the matrix units take it (attention.cu). In q8 both are codes, and behind all of
 * them stand the scales, f32 (n_layers, 2, n_kv_heads, 32). */
#ifndef KV_CUH
#define KV_CUH
#include "device.cuh"
#include "kernels.h"
extern "C" {
#include "../llama.h"
#include "../quant.h"
}

template <uint32_t KIND> struct element;
template <> struct element<LLAMA_F32> {
    using type = float;
    __device__ static float get(float v) { return v; }
    __device__ static float put(float v) { return v; }
};
template <> struct element<LLAMA_F16> {
    using type = uint16_t;
    __device__ static float get(uint16_t v) { return half_to_float(v); }
    __device__ static uint16_t put(float v) { return float_to_half(v); }
};
template <> struct element<LLAMA_Q8> {
    using type = int8_t;
    __device__ static float get(int8_t v) { return (float)v; }
    __device__ static int8_t put(float v) { return (int8_t)rintf(v); } // half to even
};

/* Keys (values: VALUE 1) of one head in a page. */
template <uint32_t KIND>
__device__ __forceinline__ typename element<KIND>::type *
head_in(const kv_shape &kv, void *page, int layer, int value, int head) {
    using type = typename element<KIND>::type;
    const size_t at = ((size_t)layer * 2 + value) * kv.n_kv_heads + head;
    return (type *)page + at * PAGE_POSITIONS * kv.head_dim;
}

/* Their scales, in q8. */
__device__ __forceinline__ float *scales_in(const kv_shape &kv, void *page, int layer, int value,
                                            int head) {
    const size_t heads = (size_t)kv.n_layers * 2 * kv.n_kv_heads;
    const size_t at = ((size_t)layer * 2 + value) * kv.n_kv_heads + head;
    return (float *)((int8_t *)page + heads * PAGE_POSITIONS * kv.head_dim) + at * PAGE_POSITIONS;
}

/* Element I of SLOT's key or value. */
__device__ __forceinline__ int element_at(const kv_shape &kv, int value, int slot, int i) {
    return value ? i * PAGE_POSITIONS + slot : slot * kv.head_dim + i;
}
#endif
