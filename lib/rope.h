/* rope.h: the angles of rotary position embedding (arXiv:2104.09864), the same for every device.
 *
 * All of it is float32 in the order transformers computes it, so that positions far out turn by
 * the same angle as there. */
#ifndef ROPE_H
#define ROPE_H
#include "llama.h"

/* The length of text that sets the frequencies of a row at POSITION, ASKED being its entry in
 * llama_batch's rope_lengths; 0 where they are the same for every length. */
uint32_t rope_length(const llama_config *config, int32_t asked, int32_t position);
/* frequencies (head_dim / 2): radians a position, after the model's scaling; LENGTH is of
 * rope_length. */
void rope_frequencies(const llama_config *config, uint32_t length, float *frequencies);
/* cos, sin (head_dim / 2) at POSITION, times the attention factor where the scaling has one. */
void rope_angles(const llama_config *config, const float *frequencies, int32_t position,
                 float *cos, float *sin);
/* cos, sin (head_dim / 2) that turn a stored key COUNT positions back. Without the attention
 * factor, which the key has already. */
void rope_back(const llama_config *config, const float *frequencies, uint32_t count, float *cos,
               float *sin);
#endif
