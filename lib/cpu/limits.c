/* limits.c: reads a buffer larger than the caches, as a matrix would be, and repeats a kernel set's
 * best multiply-add instruction on registers alone. Each is the best of several passes, since
 * other work on the machine only ever makes one slower. */
#include "limits.h"
#include "../error.h"
#include "pool.h"
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PASSES = 6 };

typedef void work_fn(void *context, size_t first, size_t last);

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Seconds of the fastest pass over N pieces of WORK. */
static double fastest(struct pool *pool, size_t n, size_t grain, work_fn *work, void *context) {
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        const double start = seconds();
        pool_run(pool, n, grain, work, context);
        const double time = seconds() - start;
        if (!pass || time < best) best = time;
    }
    return best;
}

// ---- memory

enum { CHUNK = 1 << 20 };

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

int limits_bandwidth(int threads, size_t bytes, double *bytes_per_second) {
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
    const double time = fastest(pool, chunks, 4, read_range, &reading);
    free(buffer);
    pool_close(pool);
    *bytes_per_second = (double)(chunks * CHUNK) / time;
    return 0;
}

// ---- arithmetic

enum { ROUNDS = 1 << 16 }; // of one piece
enum { PLAIN = 48 };       // independent sums, enough for twelve registers of four

/* What the compiler makes of plain C, without an instruction set of its own. */
static void plain_f32(void *context, size_t first, size_t last) {
    volatile float *seed = context;
    const float a = seed[0], b = seed[1];
    float sum[PLAIN];
    for (int i = 0; i < PLAIN; i++) sum[i] = (float)i;
    for (size_t n = (last - first) * ROUNDS; n; n--)
        for (int i = 0; i < PLAIN; i++) sum[i] = sum[i] * a + b;
    for (int i = 1; i < PLAIN; i++) sum[0] += sum[i];
    if (sum[0] == 0) seed[2] = 0; // never: the sum must be needed
}

static void plain_int8(void *context, size_t first, size_t last) {
    volatile float *seed = context;
    int8_t x[64 + PLAIN], w[PLAIN];
    uint32_t sum[PLAIN] = {0};
    for (int i = 0; i < 64 + PLAIN; i++) x[i] = (int8_t)(i * (int)seed[0]);
    for (int i = 0; i < PLAIN; i++) w[i] = (int8_t)(i + 3 * (int)seed[0]);
    for (size_t n = (last - first) * ROUNDS; n; n--)
        for (int i = 0; i < PLAIN; i++) sum[i] += (uint32_t)(x[n % 64 + (size_t)i] * w[i]);
    for (int i = 1; i < PLAIN; i++) sum[0] ^= sum[i];
    if (sum[0] == 1) seed[2] = 0;
}

#if defined(__x86_64__)
/* Independent sums hide the instructions' latency: of at most 5 cycles, at two a cycle. Operands
 * are ordinary numbers: zeros would need less power and let the clock run faster. */
#define SIX(op, r)                                                                                 \
    op(r, 0, 6) op(r, 1, 7) op(r, 2, 8) op(r, 3, 9) op(r, 4, 10) op(r, 5, 11)
#define TWELVE(op, r) SIX(op, r) op(r, 6, 0) op(r, 7, 0) op(r, 8, 0) op(r, 9, 0) op(r, 10, 0)      \
    op(r, 11, 0)
#define FMA(r, sum, room) "vfmadd231ps %%" r "12, %%" r "13, %%" r #sum "\n"
#define DOT(r, sum, room) "vpdpbusd %%" r "12, %%" r "13, %%" r #sum "\n"
#define DOT_VEX(r, sum, room) "%{vex%} vpdpbusd %%" r "12, %%" r "13, %%" r #sum "\n"
#define PAIRS(r, sum, room)                                                                        \
    "vpmaddubsw %%" r "12, %%" r "13, %%" r #room "\n"                                             \
    "vpmaddwd %%" r "14, %%" r #room ", %%" r #room "\n"                                           \
    "vpaddd %%" r #room ", %%" r #sum ", %%" r #sum "\n"
#define PROBE(name, r, instructions)                                                               \
    static void name(void *context, size_t first, size_t last) {                                   \
        const float *seed = context;                                                               \
        size_t n = (last - first) * ROUNDS;                                                        \
        if (!n) return;                                                                            \
        __asm__ volatile("vzeroall\n"                                                              \
                         "vbroadcastss %1, %%" r "12\n"                                            \
                         "vbroadcastss %2, %%" r "13\n"                                            \
                         "vpbroadcastd %3, %%" r "14\n"                                            \
                         "1:\n" instructions "dec %0\n"                                            \
                         "jnz 1b\n"                                                                \
                         "vzeroupper\n"                                                            \
                         : "+r"(n)                                                                 \
                         : "m"(seed[0]), "m"(seed[1]), "m"(ones)                                   \
                         : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",   \
                           "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");  \
    }
static const uint32_t ones = 0x00010001; // two int16
PROBE(fma_512, "zmm", TWELVE(FMA, "zmm"))
PROBE(fma_256, "ymm", TWELVE(FMA, "ymm"))
PROBE(dot_512, "zmm", TWELVE(DOT, "zmm"))
PROBE(dot_256, "ymm", TWELVE(DOT_VEX, "ymm"))
PROBE(pairs_512, "zmm", SIX(PAIRS, "zmm"))
PROBE(pairs_256, "ymm", SIX(PAIRS, "ymm"))
#elif defined(__aarch64__)
/* 24 independent sums hide a latency of 4 cycles at up to six instructions a cycle. Without sdot,
 * pairs of products, which 16 bits hold, are added to sums of 32 bits, one kind of instruction
 * after the other for CPUs that keep their order. sdot stands as a number, since assemblers differ
 * in how they are told to allow it. */
#define TWELVE(op)                                                                                 \
    op(0, 12) op(1, 13) op(2, 14) op(3, 15) op(4, 16) op(5, 17) op(6, 18) op(7, 19) op(8, 20)      \
    op(9, 21) op(10, 22) op(11, 23)
#define ZERO(sum, room) "movi v" #sum ".4s, #0\nmovi v" #room ".4s, #0\n"
#define FMLA(sum, other)                                                                           \
    "fmla v" #sum ".4s, v24.4s, v25.4s\n"                                                          \
    "fmla v" #other ".4s, v24.4s, v25.4s\n"
#define SDOT(sum, other) /* v.4s, v24.16b, v25.16b */                                              \
    ".inst 0x4e999700 + " #sum "\n"                                                                \
    ".inst 0x4e999700 + " #other "\n"
#define SMULL(sum, room) "smull v" #room ".8h, v24.8b, v25.8b\n"
#define SMLAL(sum, room) "smlal2 v" #room ".8h, v24.16b, v25.16b\n"
#define SADALP(sum, room) "sadalp v" #sum ".4s, v" #room ".8h\n"
#define PROBE(name, instructions)                                                                  \
    static void name(void *context, size_t first, size_t last) {                                   \
        const float *seed = context;                                                               \
        size_t n = (last - first) * ROUNDS;                                                        \
        if (!n) return;                                                                            \
        __asm__ volatile(TWELVE(ZERO)                                                              \
                         "ld1r {v24.4s}, [%1]\n"                                                   \
                         "ld1r {v25.4s}, [%2]\n"                                                   \
                         "1:\n" instructions "subs %0, %0, #1\n"                                   \
                         "b.ne 1b\n"                                                               \
                         : "+r"(n)                                                                 \
                         : "r"(seed), "r"(seed + 1)                                                \
                         : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8",   \
                           "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18",    \
                           "v19", "v20", "v21", "v22", "v23", "v24", "v25");                       \
    }
PROBE(fmla, TWELVE(FMLA))
PROBE(sdot, TWELVE(SDOT))
PROBE(smlal, TWELVE(SMULL) TWELVE(SMLAL) TWELVE(SADALP))
#endif

/* What a kernel set's best instructions are, and the multiply-adds of one round of each probe. */
static const struct {
    const char *isa;
    work_fn *f32, *int8;
    int f32_round, int8_round;
} probes[] = {
#if defined(__x86_64__)
    {"avx512vbmi", fma_512, dot_512, 12 * 16, 12 * 64},
    {"avx512vnni", fma_512, dot_512, 12 * 16, 12 * 64},
    {"avx512", fma_512, pairs_512, 12 * 16, 6 * 64},
    {"avxvnni", fma_256, dot_256, 12 * 8, 12 * 32},
    {"avx2", fma_256, pairs_256, 12 * 8, 6 * 32},
#elif defined(__aarch64__)
    {"neondot", fmla, sdot, 24 * 4, 24 * 16},
    {"neon", fmla, smlal, 24 * 4, 12 * 16},
#endif
    {"scalar", plain_f32, plain_int8, PLAIN, PLAIN},
};

int limits_peaks(int threads, const char *isa, double *f32, double *int8) {
    struct pool *pool = pool_open(threads);
    if (!pool) return -1;
    size_t i = 0;
    while (i + 1 < sizeof probes / sizeof *probes && strcmp(isa, probes[i].isa) != 0) i++;
    const size_t pieces = 64 * (size_t)pool_threads(pool);
    float seed[3] = {0.999f, 1.001f, 1};
    const double rounds = (double)pieces * ROUNDS;
    *f32 = rounds * probes[i].f32_round / fastest(pool, pieces, 1, probes[i].f32, seed);
    seed[0] = 1.999f; // bytes that are not zero, and (int)seed[0] is 1
    *int8 = rounds * probes[i].int8_round / fastest(pool, pieces, 1, probes[i].int8, seed);
    pool_close(pool);
    return 0;
}
