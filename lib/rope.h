/* rope.h: the angles of rotary position embedding (arXiv:2104.09864), the same for every device.
 *
 * All of it is float32 in the order transformers computes it, so that positions far out turn by
 * the same angle as there. */
#ifndef ROPE_H
#define ROPE_H
#include "llama.h"

/* frequencies (head_dim / 2): radians a position, after the model's scaling. */
void rope_frequencies(const llama_config *config, float *frequencies);
/* cos, sin (head_dim / 2) at POSITION, times the attention factor where the scaling has one. */
void rope_angles(const llama_config *config, const float *frequencies, int32_t position,
                 float *cos, float *sin);
#endif
