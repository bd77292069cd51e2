/* kernels.c: every ISA x every entry x awkward sizes against scalar.c, to the last bit; and
 * scalar.c, the conversions and the encoders against plain double arithmetic.
 *
 * Each buffer ends at a page that may not be touched, so a kernel that reads or writes one byte
 * too far stops the program; gaps inside buffers hold NaN. Any NaN equals any other.
 *
 *     kernels                  run all; the last line is "N passed, M failed"
 *     kernels --quick          fewer numbers and smaller matrices, for emulators
 *     kernels --bench [ISA]    time each entry instead (kernels_bench.c) */
#define _DEFAULT_SOURCE
#include "kernels_check.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const struct kernels *sets[8];
size_t n_sets;
int quick;
static size_t passed, failed;

void check(int good, const char *format, ...) {
    va_list args;
    if (good) {
        passed++;
        return;
    }
    if (failed++ > 40 || quick > 1)
        return;
    printf("FAILED: ");
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

// ---- memory that ends at a forbidden page

static struct {
    void *base;
    size_t bytes;
} held[64];
static size_t n_held;

void *guarded(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    uint8_t *base = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                         -1, 0);
    if (base == MAP_FAILED || mprotect(base + whole, page, PROT_NONE) || n_held == 64) {
        printf("out of memory\n");
        exit(1);
    }
    held[n_held].base = base;
    held[n_held++].bytes = whole + page;
    memset(base, 0xff, whole); // NaN as f32 and as f16
    return base + whole - bytes;
}

void release_all(void) {
    while (n_held > 0) {
        n_held--;
        munmap(held[n_held].base, held[n_held].bytes);
    }
}

// ---- numbers

static uint64_t state = 1;

uint32_t random_bits(void) { // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (uint32_t)(z >> 32);
}

float uniform(void) {
    return (float)(int32_t)random_bits() * 0x1p-31f;
}

static const float specials[] = {NAN,     INFINITY, -INFINITY, 0.0f,    -0.0f,   1e-40f,
                                 -1e-45f, 3e38f,    -3e38f,    65504.f, 6e-8f,   1.0f};

float special(void) {
    return specials[random_bits() % (sizeof specials / sizeof *specials)];
}

void fill(float *x, size_t n, float scale) {
    for (size_t i = 0; i < n; i++)
        x[i] = uniform() * scale;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The index of the first difference, or N. */
static size_t first_difference(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (bits_of(a[i]) != bits_of(b[i]) && !(isnan(a[i]) && isnan(b[i])))
            return i;
    return n;
}

void same(const char *isa, const char *what, const float *want, const float *got, size_t n) {
    size_t i = first_difference(want, got, n);
    check(i == n, "%s %s: [%zu] is %a, scalar has %a", isa, what, i, i < n ? got[i] : 0.f,
          i < n ? want[i] : 0.f);
}

int near(double want, double got, double bound) {
    return isnan(want) ? isnan(got) : want == got || fabs(got - want) <= bound;
}

int code_at(const int8_t *q, size_t i, int bits, enum wide wide) {
    const int8_t *group = q + i / GROUP * GROUP * (size_t)bits / 8;
    const size_t c = i % GROUP;
    int16_t pairs[GROUP];
    if (bits == 8) return group[c];
    if (wide == PLANES) return 256 * group[c] + group[GROUP + c];
    memcpy(pairs, group, sizeof pairs);
    return pairs[c / 4 * 4 + c % 2 * 2 + c % 4 / 2];
}

// ---- matmul

enum { N_KINDS = LLAMA_Q4E + 1 };
enum scene { PLAIN, LOW, HIGH, LOWEST, LOW_HIGH, HIGH_LOW, LOW_BYTES, TINY, HUGE_SCALES, SPECIAL,
             ZEROS, N_SCENES };
static const char *const scene_names[] = {
    "plain", "codes -127", "codes 127", "codes -128", "codes -128, inputs 127",
    "codes 127, inputs -127", "codes -128, inputs' low bytes -128", "tiny scales", "huge",
    "specials", "zeros"};

typedef void matmul_entry(const struct matmul *m, size_t first, size_t last);

static matmul_entry *matmul_of(const struct kernels *k, uint32_t kind) {
    matmul_entry *entries[N_KINDS] = {k->matmul_f32, k->matmul_f16, k->matmul_bf16, k->matmul_q8,
                                      [LLAMA_Q4] = k->matmul_q4, [LLAMA_Q4E] = k->matmul_q4};
    return entries[kind];
}

/* Weights of any bytes that a file could hold. */
static uint8_t *make_weights(uint32_t kind, size_t strips, size_t columns, enum scene scene) {
    const struct kind *k = kind_find(kind);
    size_t blocks = strips * kind_strip_bytes(k, columns) / k->block_bytes;
    uint8_t *data = guarded(blocks * k->block_bytes), *p = data;
    for (size_t b = 0; b < blocks; b++, p += k->block_bytes) {
        float values[TILE_ROWS * GROUP], size = scene == HUGE_SCALES ? 60000.f : 1.f;
        for (size_t i = 0; i < TILE_ROWS * k->columns; i++)
            values[i] = scene == ZEROS                                 ? 0
                        : scene == TINY                                ? uniform() * 1e-6f
                        : scene == SPECIAL && random_bits() % 50 == 0 ? special()
                                                                       : uniform() * size;
        if (kind < 3) {
            k->encode(values, p);
            continue;
        }
        for (uint32_t i = 2 * TILE_ROWS; i < k->block_bytes; i++) {
            uint32_t at = (i - 2 * TILE_ROWS) % 64 / 4 * k->columns;
            p[i] = scene == LOW                           ? (kind == 3 ? 0x81 : 0x11)
                   : scene == HIGH || scene == HIGH_LOW   ? (kind == 3 ? 0x7f : 0xff)
                   : scene == LOWEST || scene == LOW_HIGH || scene == LOW_BYTES
                       ? (kind == 3 ? 0x80 : 0x00)
                   : scene == ZEROS                       ? (kind == 3 ? 0x00 : 0x88)
                                                          : (uint8_t)random_bits();
            uint16_t d = f32_to_f16(values[at] * (scene == TINY ? 1 : 0.1f));
            memcpy(p + at / k->columns * 2, &d, sizeof d);
        }
    }
    return data;
}

/* The input's codes as a set of kernels makes them; rows lie STRIDE apart, with NaN between. */
static struct input quantized(const struct kernels *k, const float *x, size_t n, size_t columns,
                              size_t stride, int bits) {
    const size_t groups = (columns + GROUP - 1) / GROUP, bytes = groups * GROUP * (size_t)bits / 8;
    float *d = guarded(n * groups * sizeof *d);
    int8_t *q = guarded(n * bytes);
    int32_t *sum = guarded(n * groups * sizeof *sum);
    for (size_t t = 0; t < n; t++)
        k->quantize_row(x + t * stride, columns, bits, q + t * bytes, d + t * groups,
                        sum + t * groups);
    return (struct input){n, columns, x, stride, bits, q, d, sum};
}

static float *make_x(size_t n, size_t columns, size_t stride, enum scene scene) {
    float *x = guarded((n * stride - (stride - columns)) * sizeof *x);
    for (size_t t = 0; t < n; t++)
        for (size_t c = 0; c < columns; c++)
            x[t * stride + c] =
                scene == SPECIAL && random_bits() % 100 == 0              ? special()
                : scene == LOW || scene == LOWEST || scene == HIGH_LOW ? -3.f
                : scene == HIGH || scene == LOW_HIGH                    ? 3.f
                : scene == LOW_BYTES ? (c % GROUP ? 0.5f : 127.f) // codes of 128, of 16 bits
                                                                        : uniform();
    return x;
}

/* The scalar result against a sum in double, whose terms' sizes give the bound. */
static void check_scalar_matmul(uint32_t kind, const struct matmul *m, size_t strips) {
    const struct input *in = m->in;
    size_t groups = (in->columns + GROUP - 1) / GROUP, bad = 0;
    float *w = malloc(in->columns * sizeof *w);
    for (size_t row = 0; row < strips * TILE_ROWS; row++) {
        kind_decode_row(kind_find(kind), m->w, in->columns, row, w);
        for (size_t t = 0; t < in->n; t++) {
            double sum = 0, size = 0;
            for (size_t c = 0; c < in->columns; c++) {
                double x = kind < 3 ? in->x[t * in->x_stride + c]
                                    : (double)in->d[t * groups + c / GROUP]
                                          * code_at(in->q, t * groups * GROUP + c, in->bits,
                                                    sets[n_sets - 1]->wide);
                sum += w[c] * x;
                size += fabs(w[c] * x);
            }
            double bound = size * 0x1p-23 * (double)(kind < 3 ? in->columns : groups + 2);
            bad += !near(sum, m->y[t * m->y_stride + row], bound + 1e-37);
        }
    }
    free(w);
    check(bad == 0, "scalar matmul_%s %zux%zux%zu: %zu elements off", kind_find(kind)->name,
          strips * TILE_ROWS, in->columns, in->n, bad);
}

/* BITS: of a quantised kind's input; 8 for the others. */
static void test_matmul(uint32_t kind, size_t strips, size_t columns, size_t n, int bits,
                        enum scene scene) {
    char what[128];
    const size_t x_stride = columns + 3;
    const float *x = make_x(n, columns, x_stride, scene);
    struct input in = quantized(sets[n_sets - 1], x, n, columns, x_stride, bits);
    size_t stride = strips * TILE_ROWS + 5, size = n * stride - 5;
    float *want = guarded(size * sizeof *want);
    struct matmul m = {make_weights(kind, strips, columns, scene),
                       kind_strip_bytes(kind_find(kind), columns), &in, want, stride,
                       kind_find(kind)->levels ? kind_find(kind)->levels->at : NULL};
    matmul_of(sets[n_sets - 1], kind)(&m, 0, strips);
    if (scene != SPECIAL && scene != HUGE_SCALES)
        check_scalar_matmul(kind, &m, strips);
    snprintf(what, sizeof what, "matmul_%s %zu strips, %zu columns, %zu tokens of %d bits, %s",
             kind_find(kind)->name, strips, columns, n, bits, scene_names[scene]);
    for (size_t i = 0; i + 1 < n_sets; i++) {
        matmul_entry *entry = matmul_of(sets[i], kind);
        in = quantized(sets[i], x, n, columns, x_stride, bits);
        m.y = guarded(size * sizeof *m.y);
        entry(&m, 0, strips);
        same(sets[i]->isa, what, want, m.y, size);
        m.y = guarded(size * sizeof *m.y); // in pieces, the last first
        entry(&m, strips / 3, strips);
        entry(&m, 0, strips / 3);
        same(sets[i]->isa, what, want, m.y, size);
    }
    release_all();
}

static void test_matmuls(void) {
    static const size_t columns[] = {1, 31, 32, 33, 100, 576, 2081, 4600},
                        strips[] = {1, 2, 3, 5, 9}, tokens[] = {1, 2, 3, 5, 6, 7, 8, 13, 64};
    const size_t most = quick > 1 ? 3000 : quick ? 30000 : 300000; // scalar.c takes its time
    for (uint32_t kind = 0; kind < N_KINDS; kind++) {
        if (!kind_find(kind) || kind_find(kind)->rotated) continue; // the same kernels
        for (int bits = 8; bits <= (kind_find(kind)->columns > 1 ? 16 : 8); bits += 8) {
            for (size_t s = 0; s < 5; s++)
                for (size_t c = 0; c < 8; c++)
                    for (size_t n = 0; n < 9; n++)
                        if (strips[s] * columns[c] * tokens[n] < most)
                            test_matmul(kind, strips[s], columns[c], tokens[n], bits, PLAIN);
            for (int scene = LOW; scene < N_SCENES && quick < 2; scene++)
                for (size_t n = 0; n < 9; n++)
                    test_matmul(kind, 3, n % 2 ? 100 : 576, tokens[n], bits, (enum scene)scene);
        }
    }
}

// ---- every entry has a test

static void nothing(void) {}

/* Whatever stands in struct kernels must have a test: the checks fail for a set whose entry does
 * nothing, one entry after the other. */
static void test_tests(void) {
    enum { FIRST = offsetof(struct kernels, matmul_f32),
           ENTRIES = (sizeof(struct kernels) - FIRST) / sizeof(&nothing) };
    const struct kernels *const scalar = sets[n_sets - 1], *const first = sets[0];
    const size_t n = n_sets;
    const int before = quick;
    for (size_t i = 0; i < ENTRIES; i++) {
        struct kernels idle = *scalar;
        void (*entry)(void) = nothing;
        memcpy((char *)&idle + FIRST + i * sizeof entry, &entry, sizeof entry);
        const size_t good = passed, bad = failed;
        quick = 2, n_sets = 2, sets[0] = &idle, sets[1] = scalar;
        test_matmuls(), test_rows(), test_attention(), test_fits();
        const size_t found = failed - bad;
        quick = before, passed = good, failed = bad;
        check(found > 0, "entry %zu of struct kernels has no test", i + 1);
    }
    n_sets = n, sets[0] = first;
}

// ---- all

static void find_sets(void) {
#if defined(__x86_64__)
    static struct kernels evex;
    if (kernels_find("avx512vnni")) { // runs the code of "avxvnni" where there is no AVX-VNNI
        kernels_scalar(&evex);
        kernels_evexvnni(&evex);
        sets[n_sets++] = &evex;
    }
#endif
    for (size_t i = 0; kernels_at(i); i++)
        sets[n_sets++] = kernels_at(i);
}

static void run(const char *name, void (*test)(void)) {
    size_t before = passed;
    test();
    printf("%-10s %zu checks\n", name, passed - before);
    fflush(stdout);
}

int main(int argc, char **argv) {
    find_sets();
    if (argc >= 2 && strcmp(argv[1], "--bench") == 0) {
        kernels_bench(argc > 2 ? argv[2] : NULL);
        return 0;
    }
    quick = argc >= 2 && strcmp(argv[1], "--quick") == 0;
    for (size_t i = 0; i < n_sets; i++)
        printf("%s%s", sets[i]->isa, i + 1 < n_sets ? ", " : "\n");
    run("numbers", test_numbers);
    run("matmul", test_matmuls);
    run("rows", test_rows);
    run("attention", test_attention);
    run("fits", test_fits);
    run("tests", test_tests);
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed > 0;
}
