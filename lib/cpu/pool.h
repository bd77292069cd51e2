/* pool.h: the worker threads of one session.
 *
 * pool_run splits [0, n) into ranges that the threads, the caller among them, take in turn, and
 * returns when all are done. Who takes which range is chance, so the work in a range must not
 * depend on it: here each output element is computed whole, by one thread, in one order. */
#ifndef POOL_H
#define POOL_H
#include <stddef.h>

struct pool;

/* THREADS 0: one for each core this process may run on. NULL with fail() on failure. */
struct pool *pool_open(int threads);
void pool_close(struct pool *pool);
int pool_threads(const struct pool *pool);
/* Calls work(context, first, last) for ranges of at least GRAIN, but for the last, that cover
 * [0, n); n is below 2^31. A single range, or a single thread, runs in the caller without waking
 * anyone. */
void pool_run(struct pool *pool, size_t n, size_t grain,
              void (*work)(void *context, size_t first, size_t last), void *context);
#endif
