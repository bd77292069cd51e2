/* bandwidth.c: reads a buffer larger than the caches, as a matrix would be, and takes the best of
 * several passes, since other work on the machine only ever makes one slower. */
#include "bandwidth.h"
#include "../error.h"
#include "pool.h"
#include <stdint.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PASSES = 6, CHUNK = 1 << 20 };

struct reading {
    const uint64_t *words;
    atomic_uint_fast64_t sum;  // keeps the reads from being optimised away
};

static void read_range(void *context, size_t first, size_t last) {
    struct reading *r = context;
    const size_t words = CHUNK / sizeof(uint64_t);
    uint64_t sum[16] = {0};    // independent sums, so that the compiler may use whole registers
    for (const uint64_t *p = r->words + first * words; p < r->words + last * words; p += 16)
        for (int i = 0; i < 16; i++) sum[i] ^= p[i];
    for (int i = 1; i < 16; i++) sum[0] ^= sum[i];
    atomic_fetch_xor(&r->sum, sum[0]);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int bandwidth_measure(int threads, size_t bytes, double *bytes_per_second) {
    if (!bytes) bytes = (size_t)256 << 20;
    const size_t chunks = bytes / CHUNK + (bytes % CHUNK > 0);
    struct pool *pool = pool_open(threads);
    if (!pool) return -1;
    void *buffer = NULL;
    if (chunks > SIZE_MAX / CHUNK || posix_memalign(&buffer, 4096, chunks * CHUNK)) {
        pool_close(pool);
        return fail("out of memory for a buffer of %zu bytes", bytes);
    }
    memset(buffer, 1, chunks * CHUNK);
    struct reading reading = {.words = buffer};
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        const double start = seconds();
        pool_run(pool, chunks, 4, read_range, &reading);
        const double rate = (double)(chunks * CHUNK) / (seconds() - start);
        if (rate > best) best = rate;
    }
    free(buffer);
    pool_close(pool);
    *bytes_per_second = best;
    return 0;
}
