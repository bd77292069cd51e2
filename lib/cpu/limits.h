/* limits.h: what this machine allows: the rates that decoding and reading a prompt run against. */
#ifndef LIMITS_H
#define LIMITS_H
#include <stddef.h>

/* The contract of llama_measure_bandwidth in llama.h. */
int limits_bandwidth(int threads, size_t bytes, double *bytes_per_second);
/* The contract of llama_measure_peaks in llama.h; ISA is a kernel set that this CPU runs. */
int limits_peaks(int threads, const char *isa, double *f32, double *int8);
#endif
