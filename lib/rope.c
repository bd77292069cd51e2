/* rope.c: frequency i is theta^(-2i / head_dim), slowed down where the model was stretched. */
#include "rope.h"
#include <math.h>

static const double pi = 3.14159265358979323846;

/* Llama 3.1's stretch: waves shorter than original / high stay, those longer than original / low
 * slow down by factor, and between the two the change is gradual. */
static float llama3(float frequency, const float *numbers) {
    const float factor = numbers[0], low = numbers[1], high = numbers[2], original = numbers[3];
    const float wavelength = 1 / frequency * (float)(2 * pi); // torch divides a number so
    if (wavelength < original / high) return frequency;
    if (wavelength > original / low) return frequency / factor;
    const float smooth = (1 / wavelength * original - low) / (high - low);
    return (1 - smooth) * frequency / factor + smooth * frequency;
}

/* The pair that turns TURNS times within the ORIGINAL context, counted in fractions. */
static double yarn_pair(const llama_config *c, double turns) {
    const double original = c->rope_numbers[1];
    return c->head_dim * log(original / (turns * 2 * pi)) / (2 * log((double)c->rope_theta));
}

/* YaRN (arXiv:2309.00071, section 3.2): pairs up to the one that turns beta_fast times within
 * the original context stay, those from the one that turns beta_slow times on slow down by
 * factor, and between them the share changes with the pair's number. */
static void yarn(const llama_config *c, float *frequencies) {
    double low = yarn_pair(c, c->rope_numbers[2]), high = yarn_pair(c, c->rope_numbers[3]);
    if (c->rope_numbers[5] != 0) low = floor(low), high = ceil(high);
    low = low > 0 ? low : 0;
    high = high < c->head_dim - 1 ? high : c->head_dim - 1;
    if (low == high) high += 0.001;
    for (uint32_t i = 0; i < c->head_dim / 2; i++) {
        const float ramp = ((float)i - (float)low) / (float)(high - low);
        const float stay = 1 - (ramp < 0 ? 0 : ramp > 1 ? 1 : ramp);
        const float wave = frequencies[i];
        frequencies[i] = 1 / (c->rope_numbers[0] * wave) * (1 - stay) + 1 / wave * stay;
    }
}

uint32_t rope_length(const llama_config *c, int32_t asked, int32_t position) {
    if (c->rope_scaling != LLAMA_ROPE_DYNAMIC) return 0;
    const uint32_t length = (uint32_t)(asked > position ? asked : position + 1);
    return (float)length > c->rope_numbers[1] ? length : 0;
}

/* NTK-aware scaling: the base grows with the length, so that the slowest pair turns as far as it
 * did within the original length while the fastest stay nearly as they were. */
static float dynamic(const llama_config *c, uint32_t length) {
    const float factor = c->rope_numbers[0], original = c->rope_numbers[1];
    const float stretch = factor * (float)length / original - (factor - 1);
    const double exponent = (double)c->head_dim / (c->head_dim - 2); // a double in torch, too
    return c->rope_theta * (float)pow((double)stretch, exponent);
}

void rope_frequencies(const llama_config *c, uint32_t length, float *frequencies) {
    const float theta = length ? dynamic(c, length) : c->rope_theta;
    for (uint32_t i = 0; i < c->head_dim / 2; i++) {
        const float exponent = (float)(2 * i) / (float)c->head_dim;
        frequencies[i] = (float)pow((double)theta, (double)exponent);
    }
    if (c->rope_scaling == LLAMA_ROPE_YARN) {
        yarn(c, frequencies);
        return;
    }
    for (uint32_t i = 0; i < c->head_dim / 2; i++) {
        float f = 1 / frequencies[i];
        if (c->rope_scaling == LLAMA_ROPE_LINEAR) f /= c->rope_numbers[0];
        if (c->rope_scaling == LLAMA_ROPE_LLAMA3) f = llama3(f, c->rope_numbers);
        frequencies[i] = f;
    }
}

void rope_angles(const llama_config *c, const float *frequencies, int32_t position, float *cos,
                 float *sin) {
    const float factor = c->rope_scaling == LLAMA_ROPE_YARN ? c->rope_numbers[4] : 1;
    for (uint32_t i = 0; i < c->head_dim / 2; i++) {
        const float angle = (float)position * frequencies[i];
        cos[i] = cosf(angle) * factor;
        sin[i] = sinf(angle) * factor;
    }
}

void rope_back(const llama_config *c, const float *frequencies, uint32_t count, float *cos,
               float *sin) {
    for (uint32_t i = 0; i < c->head_dim / 2; i++) {
        const float angle = (float)count * frequencies[i];
        cos[i] = cosf(angle);
        sin[i] = -sinf(angle);
    }
}
