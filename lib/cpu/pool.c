/* pool.c: workers spin for a moment after each step, since the next one comes within
 * microseconds while a token is computed, and sleep when it does not.
 *
 * A step is over when all its items are done, not when all workers have seen it: one that the
 * system has put aside holds up nobody unless it has taken a range. */
#include "pool.h"
#include "../error.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SPINS = 4000, MOST_THREADS = 1024, STACK_BYTES = 1 << 20 };
#define NOTHING 0xffffffffu // an item beyond any

typedef void work_fn(void *context, size_t first, size_t last);

struct pool {
    int threads;              // the caller included
    pthread_t *workers;       // (threads - 1)
    int started;

    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    int sleepers;             // workers that wait for `wake`; under the lock
    atomic_bool stop;
    atomic_bool waiting;      // the caller sleeps until `done`
    atomic_uint step;         // counts up with every pool_run

    /* The step's number << 32 | the first item nobody has taken. A worker reads the fields below,
     * then takes a range by moving `next` on: that fails if the step is not the one they were
     * read in, so a late worker never runs one step's work with another's fields. */
    _Atomic uint64_t next;
    _Atomic(work_fn *) work;
    _Atomic(void *) context;
    atomic_size_t n, grain;
    atomic_size_t finished;   // items
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* A range is half a thread's share of what is left: few are taken, and the last ones are small, so
 * that all threads end together. */
static size_t range_of(const struct pool *p, size_t left, size_t grain) {
    const size_t share = left / (2 * (size_t)p->threads) / grain * grain;
    const size_t range = share > grain ? share : grain;
    return left < range ? left : range;
}

static void take_ranges(struct pool *p) {
    for (;;) {
        uint64_t next = atomic_load(&p->next);
        const size_t first = next & NOTHING, n = atomic_load(&p->n);
        const size_t grain = atomic_load(&p->grain);
        work_fn *work = atomic_load(&p->work);
        void *context = atomic_load(&p->context);
        if (first >= n) return;
        const size_t count = range_of(p, n - first, grain);
        if (!atomic_compare_exchange_strong(&p->next, &next, next + count)) continue;
        work(context, first, first + count);
        if (atomic_fetch_add(&p->finished, count) + count == n && atomic_load(&p->waiting)) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->lock);
        }
    }
}

/* Waits until the step differs from SEEN; false when the pool closes. */
static bool wait_for_step(struct pool *p, unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&p->step, memory_order_acquire) != seen) return !p->stop;
        relax();
    }
    pthread_mutex_lock(&p->lock);
    p->sleepers++;
    while (atomic_load(&p->step) == seen) pthread_cond_wait(&p->wake, &p->lock);
    p->sleepers--;
    pthread_mutex_unlock(&p->lock);
    return !p->stop;
}

static void *worker(void *argument) {
    struct pool *p = argument;
    unsigned seen = 0;
    while (wait_for_step(p, seen)) {
        seen = atomic_load(&p->step);
        take_ranges(p);
    }
    return NULL;
}

/* Tells the workers; the lock makes sure that nobody falls asleep past it. */
static void announce_step(struct pool *p) {
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->step, 1);
    if (p->sleepers) pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void wait_until_finished(struct pool *p, size_t n) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&p->finished) == n) return;
        relax();
    }
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->waiting, true);
    while (atomic_load(&p->finished) != n) pthread_cond_wait(&p->done, &p->lock);
    atomic_store(&p->waiting, false);
    pthread_mutex_unlock(&p->lock);
}

void pool_run(struct pool *p, size_t n, size_t grain, work_fn *work, void *context) {
    if (p->threads == 1 || n <= grain) {
        if (n) work(context, 0, n);
        return;
    }
    const uint64_t step = (uint64_t)(atomic_load(&p->step) + 1) << 32;
    atomic_store(&p->next, step | NOTHING);
    atomic_store(&p->work, work);
    atomic_store(&p->context, context);
    atomic_store(&p->n, n);
    atomic_store(&p->grain, grain);
    atomic_store(&p->finished, 0);
    atomic_store(&p->next, step);
    announce_step(p);
    take_ranges(p);
    wait_until_finished(p, n);
}

static int cores(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

struct pool *pool_open(int threads) {
    if (threads < 0 || threads > MOST_THREADS) {
        fail("threads is %d, expected 1 to %d, or 0 for one a core", threads, MOST_THREADS);
        return NULL;
    }
    struct pool *p = calloc(1, sizeof *p);
    if (!p) return fail("out of memory for the thread pool"), NULL;
    p->threads = threads ? threads : cores();
    if (p->threads > MOST_THREADS) p->threads = MOST_THREADS;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    p->workers = calloc((size_t)p->threads, sizeof *p->workers);
    if (!p->workers) {
        fail("out of memory for %d threads", p->threads);
        return pool_close(p), NULL;
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES); // some systems give 128 KB
    int error = 0;
    while (!error && p->started < p->threads - 1) {
        error = pthread_create(&p->workers[p->started], &attributes, worker, p);
        if (!error) p->started++;
    }
    pthread_attr_destroy(&attributes);
    if (!error) return p;
    fail("cannot start thread %d of %d: %s", p->started + 2, p->threads, strerror(error));
    return pool_close(p), NULL;
}

void pool_close(struct pool *p) {
    if (!p) return;
    atomic_store(&p->stop, true);
    announce_step(p);
    for (int i = 0; i < p->started; i++) pthread_join(p->workers[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
    free(p->workers);
    free(p);
}

int pool_threads(const struct pool *p) { return p->threads; }
