/* kernels.c: asks the CPU what it has and fills one table for each kernel set it can run.
 *
 * A set is a fill function and the features it was compiled for; a table starts as scalar and
 * is overwritten by what the set improves. The tables are filled once and never change. */
#include "kernels.h"
#include <pthread.h>
#include <string.h>

/* What a kernel set asks of the CPU. */
enum {
    HAS_AVX2 = 1,         // AVX2, FMA, F16C, and the system saves the ymm registers
    HAS_AVX_VNNI = 2,     // vpdpbusd on ymm, VEX encoded
    HAS_AVX512 = 4,       // F, CD, BW, DQ, VL, and the system saves the zmm registers
    HAS_AVX512_VNNI = 8,  // vpdpbusd on zmm
    HAS_AVX512_VBMI = 16, // vpermb on zmm
    HAS_DOTPROD = 32      // arm64's sdot; NEON itself is in every arm64 CPU
};

#if defined(__x86_64__)
#include <cpuid.h>

/* The register state the operating system saves (Intel SDM vol. 1, 13.3). */
static unsigned saved_state(void) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Bits as in Intel SDM vol. 2, CPUID. Our own reading, since compilers' built-in names for
 * these differ and older ones lack AVX-VNNI. */
static unsigned cpu_features(void) {
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, F16C = 1 << 29, AVX2 = 1 << 5 };
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;
    unsigned a, b, c, d, highest, features = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if ((c & (FMA | OSXSAVE | F16C)) != (FMA | OSXSAVE | F16C) || (saved_state() & 6) != 6)
        return 0;
    if (!__get_cpuid_count(7, 0, &highest, &b, &c, &d) || !(b & AVX2)) return 0;
    features |= HAS_AVX2;
    if ((b & avx512) == avx512 && (saved_state() & 0xe6) == 0xe6)
        features |= HAS_AVX512 | (c & 1 << 11 ? HAS_AVX512_VNNI : 0)
                    | (c & 1 << 1 ? HAS_AVX512_VBMI : 0);
    if (highest >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1 << 4)
        features |= HAS_AVX_VNNI;
    return features;
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static unsigned cpu_features(void) {
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? HAS_DOTPROD : 0;
}
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static unsigned cpu_features(void) {
    int there = 0;
    size_t size = sizeof there;
    if (sysctlbyname("hw.optional.arm.FEAT_DotProd", &there, &size, NULL, 0)) return 0;
    return there ? HAS_DOTPROD : 0;
}
#else
static unsigned cpu_features(void) {
    return 0;
}
#endif

static const struct {
    unsigned needs;
    void (*fill)(struct kernels *k);
} sets[] = { // best first
#if defined(__x86_64__)
    {HAS_AVX2 | HAS_AVX512 | HAS_AVX512_VNNI | HAS_AVX512_VBMI, kernels_avx512vbmi},
    {HAS_AVX2 | HAS_AVX512 | HAS_AVX512_VNNI, kernels_avx512vnni},
    {HAS_AVX2 | HAS_AVX512, kernels_avx512},
    {HAS_AVX2 | HAS_AVX_VNNI, kernels_avxvnni},
    {HAS_AVX2, kernels_avx2},
#elif defined(__aarch64__)
    {HAS_DOTPROD, kernels_neondot},
    {0, kernels_neon},
#endif
    {0, kernels_scalar},
};

static struct kernels tables[sizeof sets / sizeof *sets];
static size_t n_tables;
static pthread_once_t filled = PTHREAD_ONCE_INIT;

static void fill_tables(void) {
    unsigned features = cpu_features();
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if ((features & sets[i].needs) == sets[i].needs) {
            kernels_scalar(&tables[n_tables]);
            sets[i].fill(&tables[n_tables++]);
        }
}

const struct kernels *kernels_at(size_t i) {
    pthread_once(&filled, fill_tables);
    return i < n_tables ? &tables[i] : NULL;
}

const struct kernels *kernels_find(const char *name) {
    const struct kernels *k;
    for (size_t i = 0; (k = kernels_at(i)); i++)
        if (!name || strcmp(name, k->isa) == 0) return k;
    return NULL;
}
