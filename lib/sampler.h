/* sampler.h: logits -> token. Nothing is remembered between calls: each position's random number
 * is a function of (seed, completion, position), so the same text comes out alone, in a batch,
 * verified in one go, or on another device. */
#ifndef SAMPLER_H
#define SAMPLER_H
#include "llama.h"

/* 0, or -1 with the reason: which setting is impossible. */
int sampling_check(const llama_sampling *sampling);
/* SEEN (n_seen) are valid token ids. The contract of llama_sample_logits in llama.h. */
int sampler_pick(const float *logits, size_t vocab_size, const llama_sampling *sampling,
                 const int32_t *seen, size_t n_seen, uint64_t completion, uint64_t position,
                 int32_t *token);
/* The random number of a position: uniform in [0, 1), a multiple of 2^-53. */
double sampler_random(uint64_t seed, uint64_t completion, uint64_t position);
#endif
