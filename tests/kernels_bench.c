/* kernels_bench.c: times each entry of each kernel set, beside this machine's own limits, which
 * lib/cpu/limits.c measures in the same run. Best of several passes, for
 * one thread and for all. */
#define _DEFAULT_SOURCE
#include "../lib/cpu/limits.h"
#include "../lib/error.h"
#include "kernels_check.h"
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MOST_THREADS = 64, PASSES = 7 };

typedef void part_work(void *context, size_t part, size_t parts);

struct part {
    part_work *work;
    void *context;
    size_t part, parts;
};

static void *run_part(void *p) {
    struct part *part = p;
    part->work(part->context, part->part, part->parts);
    return NULL;
}

/* Seconds of the fastest of several passes of WORK, cut in PARTS, each on its thread. */
static double seconds_of(part_work *work, void *context, size_t parts) {
    double best = 1e9;
    for (int pass = 0; pass < PASSES; pass++) {
        pthread_t threads[MOST_THREADS];
        struct part all[MOST_THREADS];
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        for (size_t i = 0; i < parts; i++) {
            all[i] = (struct part){work, context, i, parts};
            if (i > 0)
                pthread_create(&threads[i], NULL, run_part, &all[i]);
        }
        run_part(&all[0]);
        for (size_t i = 1; i < parts; i++)
            pthread_join(threads[i], NULL);
        clock_gettime(CLOCK_MONOTONIC, &end);
        double time = (double)(end.tv_sec - start.tv_sec)
                      + (double)(end.tv_nsec - start.tv_nsec) * 1e-9;
        best = time < best ? time : best;
    }
    return best;
}

// ---- the machine's limits

static struct {
    double bandwidth, fma, dot; // bytes, multiply-adds, int8 multiply-adds a second
} limits[2];                    // one thread, all threads

static uint8_t *weights; // as large as any matrix here, larger than the caches
enum { WEIGHT_BYTES = 512 << 20 };

/* Here a failure of the library's own ends the program. */
int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    exit(1);
}

/* Of kernel set ISA; one that only tests have is measured as the best set is. */
static void measure_limits(const char *isa, size_t threads) {
    const char *known = (kernels_find(isa) ? kernels_find(isa) : kernels_find(NULL))->isa;
    for (int all = 0; all < 2; all++) {
        int n = all ? (int)threads : 1;
        limits_bandwidth(n, WEIGHT_BYTES, &limits[all].bandwidth);
        limits_peaks(n, known, &limits[all].fma, &limits[all].dot);
        printf("%-12s %2d thread%s: reads %.1f GB/s, f32 %.1f GMAC/s, int8 %.1f GMAC/s\n", isa, n,
               n > 1 ? "s" : "", limits[all].bandwidth * 1e-9, limits[all].fma * 1e-9,
               limits[all].dot * 1e-9);
    }
}

// ---- matmul

struct matmul_job {
    struct matmul m;
    size_t strips;
    void (*entry)(const struct matmul *m, size_t first, size_t last);
};

static void run_matmul(void *context, size_t part, size_t parts) {
    struct matmul_job *job = context;
    // in chunks of 8 strips, as a forward pass hands them out
    for (size_t s = part * 8; s < job->strips; s += parts * 8)
        job->entry(&job->m, s, s + 8 < job->strips ? s + 8 : job->strips);
}

/* One line: COLUMNS wide, N tokens, as many rows as fill memory (n <= 8) or 768. BITS of a
 * quantised kind's input, 16 counted twice; 8 for the others. */
static void bench_matmul(const struct kernels *k, uint32_t kind, size_t columns, size_t n,
                         int bits, size_t threads) {
    void (*entries[])(const struct matmul *, size_t, size_t) = {
        k->matmul_f32, k->matmul_f16, k->matmul_bf16, k->matmul_q8, [LLAMA_Q4] = k->matmul_q4};
    size_t strip = kind_strip_bytes(kind_find(kind), columns), groups = (columns + 31) / 32;
    size_t strips = n <= 8 ? WEIGHT_BYTES / strip : 48;
    float *x = malloc(n * columns * sizeof *x), *d = malloc(n * groups * sizeof *d);
    const size_t code_bytes = groups * GROUP * (size_t)bits / 8;
    int8_t *q = malloc(n * code_bytes);
    int32_t *sum = malloc(n * groups * sizeof *sum);
    float *y = malloc(n * strips * TILE_ROWS * sizeof *y);
    fill(x, n * columns, 1);
    for (size_t t = 0; t < n; t++)
        k->quantize_row(x + t * columns, columns, bits, q + t * code_bytes, d + t * groups,
                        sum + t * groups);
    struct input in = {n, columns, x, columns, bits, q, d, sum};
    const int8_t *levels = kind == LLAMA_Q4 ? kind_find(kind)->levels->at : NULL;
    struct matmul_job job = {{weights, strip, &in, y, strips * TILE_ROWS, levels}, strips,
                             entries[kind]};
    printf("%-12s matmul_%-5s %5zu columns, %3zu tokens%s:", k->isa, kind_find(kind)->name, columns,
           n, kind < 3 ? "           " : bits == 8 ? " of 8 bits " : " of 16 bits");
    for (int all = 0; all < 2; all++) {
        double time = seconds_of(run_matmul, &job, all ? threads : 1);
        double products = (double)(strips * TILE_ROWS * columns * n) * bits / 8;
        double rate = (n == 1 ? (double)(strips * strip) : products) / time;
        double limit = n == 1 ? limits[all].bandwidth : kind < 3 ? limits[all].fma
                                                                 : limits[all].dot;
        printf("  %7.1f %s %3.0f%%", rate * 1e-9, n == 1 ? "GB/s" : "GMAC/s",
               100 * rate / limit);
    }
    printf("\n");
    fflush(stdout);
    free(x), free(d), free(q), free(sum), free(y);
}

// ---- attention and rows, one thread

enum { POSITIONS = 2048, HEAD_DIM = 128, ROW = 4096 };

struct row_job {
    const struct kernels *k;
    int entry, n_queries;
    const uint8_t *pages[POSITIONS / PAGE_POSITIONS];
    float x[ROW], y[ROW], out[8 * HEAD_DIM], q[8 * HEAD_DIM];
    int8_t codes[ROW];
    int32_t sum[ROW / 32];
};

static const size_t value_bytes[11] = {4 * HEAD_DIM, 2 * HEAD_DIM, HEAD_DIM + 4}; // a position's

static void run_row(void *context, size_t part, size_t parts) {
    struct row_job *j = context;
    const struct kernels *k = j->k;
    struct attention a = {.q = j->q, .out = j->out, .n_rows = 1,
                          .n_heads = 1, .n_queries = (size_t)j->n_queries,
                          .head_dim = HEAD_DIM, .pages = j->pages, .n_positions = POSITIONS,
                          .most_positions = POSITIONS};
    (void)part, (void)parts;
    for (int i = 0; i < 20; i++)
        switch (j->entry) {
        case 0: k->attend_f32(&a); break;
        case 1: k->attend_f16(&a); break;
        case 2: k->attend_q8(&a); break;
        case 3: k->quantize_row(j->x, ROW, 8, j->codes, j->y, j->sum); break;
        case 4: k->rms_norm(j->out, j->x, j->y, 8 * HEAD_DIM, 1e-5f); break;
        case 5: k->rope(j->out, j->x, j->y, HEAD_DIM); break;
        case 6: k->swiglu(j->y, j->x, ROW); break;
        case 7: k->add(j->y, j->x, ROW); break;
        case 8: k->to_f16((uint16_t *)j->out, j->x, HEAD_DIM); break;
        case 9: k->to_q8(j->codes, 1, j->y, j->x, HEAD_DIM); break;
        case 10: k->hadamard(j->out, HEAD_DIM); break;
        }
}

static void bench_rows(const struct kernels *k) {
    static const char *const names[] = {"attend_f32", "attend_f16", "attend_q8", "quantize_row",
                                        "rms_norm",   "rope",       "swiglu",    "add",
                                        "to_f16",     "to_q8",      "hadamard"};
    static const int elements[] = {0,   0,   0,        ROW,      8 * HEAD_DIM, HEAD_DIM,
                                   ROW, ROW, HEAD_DIM, HEAD_DIM, HEAD_DIM};
    static struct row_job job;
    job.k = k;
    for (int i = 0; i < POSITIONS / PAGE_POSITIONS; i++)
        job.pages[i] = weights + (size_t)i * PAGE_POSITIONS * HEAD_DIM * 8;
    fill(job.q, 8 * HEAD_DIM, 0.1f);
    fill(job.x, ROW, 1);
    for (job.entry = 0; job.entry < 11; job.entry++) {
        printf("%-12s %-12s", k->isa, names[job.entry]);
        if (job.entry > 2) {
            fill(job.y, ROW, 1);
            printf(" %.3f ns an element\n", seconds_of(run_row, &job, 1) * 1e9 / 20
                                                / elements[job.entry]);
            continue;
        }
        for (job.n_queries = 1; job.n_queries <= 8; job.n_queries *= 2) {
            double time = seconds_of(run_row, &job, 1) / 20;
            printf("  %d queries %.1f GB/s %.1f GMAC/s;", job.n_queries,
                   2.0 * POSITIONS * (double)value_bytes[job.entry] / time * 1e-9,
                   2.0 * POSITIONS * HEAD_DIM * job.n_queries / time * 1e-9);
        }
        printf("\n");
    }
}

void kernels_bench(const char *isa) {
    enum { N_KINDS = 5, N_FLOATS = 3 };
    static const uint32_t kinds[N_KINDS] = {LLAMA_F32, LLAMA_F16, LLAMA_BF16, LLAMA_Q8, LLAMA_Q4};
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    size_t threads = online < 1 ? 1 : online > MOST_THREADS ? MOST_THREADS : (size_t)online;
    weights = aligned_alloc(2 << 20, WEIGHT_BYTES);
#if defined(MADV_HUGEPAGE)
    madvise(weights, WEIGHT_BYTES, MADV_HUGEPAGE); // as a file's pages are at best
#endif
    for (size_t i = 0; i < WEIGHT_BYTES / 2; i++) // bytes that are small numbers in any kind
        ((uint16_t *)weights)[i] = (uint16_t)(0x2c00 + i % 509);
    for (size_t i = 0; i + 1 < n_sets; i++) {
        if (isa && strcmp(isa, sets[i]->isa) != 0)
            continue;
        measure_limits(sets[i]->isa, threads);
        for (size_t j = 0; j < N_KINDS; j++)
            for (int bits = 8; bits <= (j < N_FLOATS ? 8 : 16); bits += 8)
                bench_matmul(sets[i], kinds[j], 4096, 1, bits, threads);
        for (size_t j = N_FLOATS; j < N_KINDS; j++)
            for (int bits = 8; bits <= 16; bits += 8) {
                bench_matmul(sets[i], kinds[j], 576, 1, bits, threads);
                bench_matmul(sets[i], kinds[j], 4096, 8, bits, threads);
            }
        for (size_t j = 0; j < N_KINDS; j++)
            for (int bits = 8; bits <= (j < N_FLOATS ? 8 : 16); bits += 8) {
                bench_matmul(sets[i], kinds[j], 4096, 64, bits, threads);
                bench_matmul(sets[i], kinds[j], 4096, 512, bits, threads);
            }
        bench_rows(sets[i]);
    }
    free(weights);
}
