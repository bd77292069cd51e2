/* rope.c: frequency i is theta^(-2i / head_dim), slowed down where the model was stretched. */
#include "rope.h"
#include <math.h>

/* Llama 3.1's stretch: waves shorter than original / high stay, those longer than original / low
 * slow down by factor, and between the two the change is gradual. */
static float llama3(float frequency, const float *numbers) {
    const float factor = numbers[0], low = numbers[1], high = numbers[2], original = numbers[3];
    const float wavelength = (float)(2 * 3.14159265358979323846) / frequency;
    if (wavelength < original / high) return frequency;
    if (wavelength > original / low) return frequency / factor;
    const float smooth = (original / wavelength - low) / (high - low);
    return (1 - smooth) * frequency / factor + smooth * frequency;
}

void rope_frequencies(const llama_config *config, float *frequencies) {
    for (uint32_t i = 0; i < config->head_dim / 2; i++) {
        const float exponent = (float)(2 * i) / (float)config->head_dim;
        float f = 1.0f / (float)pow((double)config->rope_theta, (double)exponent);
        if (config->rope_scaling == LLAMA_ROPE_LINEAR) f /= config->rope_numbers[0];
        if (config->rope_scaling == LLAMA_ROPE_LLAMA3) f = llama3(f, config->rope_numbers);
        frequencies[i] = f;
    }
}

void rope_angles(const float *frequencies, size_t n, int32_t position, float *cos, float *sin) {
    for (size_t i = 0; i < n; i++) {
        const float angle = (float)position * frequencies[i];
        cos[i] = cosf(angle);
        sin[i] = sinf(angle);
    }
}
