/* must.h: what a fuzz target demands of the library; where it is not so, the fuzzer keeps the input. */
#ifndef MUST_H
#define MUST_H
#include "llama.h"
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #condition, \
                    llama_error()); \
            abort(); \
        } \
    } while (0)
#endif
