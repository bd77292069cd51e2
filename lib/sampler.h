/* sampler.h: logits -> token. Nothing is remembered between calls, and mirostat's mu is the
 * caller's: each position's random number is a function of (seed, completion, position), so the
 * same text comes out alone, in a batch, verified in one go, or on another device. */
#ifndef SAMPLER_H
#define SAMPLER_H
#include "llama.h"

/* 0, or -1 with the reason: which setting is impossible, or which token. */
int sampler_check(size_t vocab_size, const llama_sampling *sampling, const int32_t *seen,
                  size_t n_seen, size_t n_said, const int32_t *token);
/* SEEN (n_seen) and the bias tokens are valid ids. The contract of llama_sample_logits in llama.h,
 * RANDOM in place of the key. */
int sampler_pick(const float *logits, size_t vocab_size, const llama_sampling *sampling,
                 const int32_t *seen, size_t n_seen, size_t n_said, double random,
                 int32_t *token);
/* The contract of llama_logprobs in llama.h; TOKEN is valid and N at most VOCAB_SIZE. */
int sampler_logprobs(const float *logits, size_t vocab_size, int32_t token, double *logprob,
                     size_t n, int32_t *ids, double *top);
/* The random number of a position: uniform in [0, 1), a multiple of 2^-53. */
double sampler_random(uint64_t seed, uint64_t completion, uint64_t position);
#endif
