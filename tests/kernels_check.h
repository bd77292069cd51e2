/* kernels_check.h: what the files of the kernel test share; kernels.c says what they test. */
#ifndef KERNELS_CHECK_H
#define KERNELS_CHECK_H
#include <stddef.h>
#include <stdint.h>
#include "../lib/cpu/kernels.h"
#include "../lib/llama.h"

extern const struct kernels *sets[8]; // what this CPU runs, best first, scalar last
extern size_t n_sets;
extern int quick;                     // less of what takes long; 2: the least, and nothing said

/* Counts a check; when it is not GOOD, prints which. */
void check(int good, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Checks WANT (n), of scalar, against GOT (n) to the last bit. */
void same(const char *isa, const char *what, const float *want, const float *got, size_t n);
/* |got - want| <= bound, infinities and NaN alike. */
int near(double want, double got, double bound);

/* Code I of a row of codes of BITS whose 16-bit groups lie as WIDE says. */
int code_at(const int8_t *q, size_t i, int bits, enum wide wide);

/* Memory full of NaN whose end is followed by a page that may not be touched. */
void *guarded(size_t bytes);
void release_all(void);

uint32_t random_bits(void);
float uniform(void); // [-1, 1)
float special(void); // NaN, infinities, subnormals, huge, zeros
void fill(float *x, size_t n, float scale);

void test_rows(void);      // kernels_rows.c
void test_attention(void);
void test_fits(void);
void test_numbers(void);   // kernels_numbers.c
void kernels_bench(const char *isa); // kernels_bench.c; NULL: all
#endif
