/* ptx_on_cpu.cpp: the matrix product of a warp, from its lanes' fragments. Compiled without
 * ThreadSanitizer's instrumentation: registers of other lanes are no memory. */
#include "ptx_on_cpu.h"

float half_to_float(uint16_t bits) {
    static float *const table = [] {
        float *made = new float[65536];
        for (int i = 0; i < 65536; i++) made[i] = f16_to_f32((uint16_t)i);
        return made;
    }();
    return table[bits];
}

void cuda_on_cpu::do_mma(void **lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; l++) {
        const fragments *f = (const fragments *)lanes[l];
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[g + i % 2 * 8][2 * t + half + i / 2 * 8] =
                    half_to_float((uint16_t)(f->a[i] >> 16 * half));
        for (int i = 0; i < 2; i++)
            for (int half = 0; half < 2; half++)
                b[2 * t + half + 8 * i][g] = half_to_float((uint16_t)(f->b[i] >> 16 * half));
    }
    for (int l = 0; l < 32; l++) {
        float *c = ((const fragments *)lanes[l])->c;
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 16; k++) c[i] += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
    }
}
