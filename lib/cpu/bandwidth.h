/* bandwidth.h: how fast this machine's memory can be read: the wall that decoding runs against. */
#ifndef BANDWIDTH_H
#define BANDWIDTH_H
#include <stddef.h>

/* The contract of llama_measure_bandwidth in llama.h. */
int bandwidth_measure(int threads, size_t bytes, double *bytes_per_second);
#endif
