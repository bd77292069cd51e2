/* pool.c: workers spin for a moment after each step, since the next one comes within
 * microseconds while a token is computed, and sleep when it does not. */
#include "pool.h"
#include "../error.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SPINS = 4000, MOST_THREADS = 1024, RANGES_A_THREAD = 8, STACK_BYTES = 1 << 20 };

struct pool {
    int threads;              // the caller included
    pthread_t *workers;       // (threads - 1)
    int started;

    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    int sleepers;             // workers that wait for `wake`; under the lock
    atomic_bool stop;
    atomic_uint step;         // counts up with every pool_run
    atomic_int working;       // workers that have not finished this step

    // the step's work, written before `step` moves on
    void (*work)(void *context, size_t first, size_t last);
    void *context;
    size_t n, range;
    atomic_size_t next;       // first item nobody has taken
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_ranges(struct pool *p) {
    for (;;) {
        size_t first = atomic_fetch_add_explicit(&p->next, p->range, memory_order_relaxed);
        if (first >= p->n) return;
        p->work(p->context, first, p->n - first > p->range ? first + p->range : p->n);
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
    for (unsigned seen = 0; wait_for_step(p, seen); seen++) {
        take_ranges(p);
        if (atomic_fetch_sub(&p->working, 1) == 1) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->lock);
        }
    }
    return NULL;
}

/* Starts the next step; the lock makes sure that nobody falls asleep past it. */
static void begin_step(struct pool *p) {
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add_explicit(&p->step, 1, memory_order_release);
    if (p->sleepers) pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

void pool_run(struct pool *p, size_t n, size_t grain,
              void (*work)(void *context, size_t first, size_t last), void *context) {
    if (p->threads == 1 || n <= grain) {
        if (n) work(context, 0, n);
        return;
    }
    size_t range = n / ((size_t)p->threads * RANGES_A_THREAD);
    p->range = range > grain ? range : grain;
    p->work = work, p->context = context, p->n = n;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store(&p->working, p->threads - 1);
    begin_step(p);
    take_ranges(p);
    for (int i = 0; i < SPINS && atomic_load(&p->working); i++) relax();
    if (!atomic_load(&p->working)) return;
    pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->working)) pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
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
    begin_step(p);
    for (int i = 0; i < p->started; i++) pthread_join(p->workers[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
    free(p->workers);
    free(p);
}

int pool_threads(const struct pool *p) { return p->threads; }
