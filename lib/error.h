/* error.h: how a function inside lib/ says what went wrong.
 *
 * It writes one sentence that names the thing, what was expected and what was found, and returns
 * -1; its callers pass the -1 on. The sentence is kept per thread, in llama.c. */
#ifndef ERROR_H
#define ERROR_H

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
int fail(const char *format, ...); // always -1

#endif
